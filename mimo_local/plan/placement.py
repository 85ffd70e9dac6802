"""Which byte goes where: VRAM, then RAM, then disk, by bytes read per token and byte of room.

Fills the tiers in the order that gains most and never past a budget; says what is missing if the
part without experts does not fit. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

from mimo_local.config import ModelConfig
from mimo_local.plan.types import DRAFTER, Budget, Placement, Problem, Row
from mimo_local.settings import Draft
from mimo_local.sizes import (
    GB,
    PackSizes,
    activation_bytes,
    gb,
    hidden_bytes,
    kv_bytes,
    restart_bytes,
)
from quant.recipe import Recipe

VRAM_RESERVE = 2_500_000_000  # CUDA context, workspaces, the desktop's own use
RAM_SHARE, RAM_RESERVE = 8, 8 * GB  # left to the system: an eighth, at most 8 GB
PROGRAM = 500_000_000  # the interpreter with torch, before the model
HIDDEN_SHARE = 8  # at most an eighth of the RAM left goes to hidden states
DEFAULT_CONTEXT, SMALLEST_CONTEXT = 32_768, 2048
CONTEXT_SHARE = 4  # at most a quarter of the RAM left goes unasked to keys and values
KV, EMBEDDING = "KV cache", "embedding"
MTP, DRAFT_HEAD = DRAFTER


def reserve_of(budget: Budget) -> int:
    """Bytes of RAM the plan leaves alone."""
    if budget.reserve is not None:
        return budget.reserve
    return min(RAM_RESERVE, budget.ram // RAM_SHARE) + PROGRAM


def fitting_context(config: ModelConfig, sizes: PackSizes, budget: Budget, itemsize: int) -> int:
    """Tokens of context when nobody asked for a number: 32k, halved until it fits easily."""
    limit = min(config.max_context, DEFAULT_CONTEXT)
    work = activation_bytes(config, native=budget.native) + restart_bytes(config, itemsize)
    room = budget.ram - reserve_of(budget) - work - sizes.resident
    while limit > SMALLEST_CONTEXT and CONTEXT_SHARE * kv_bytes(config, limit, itemsize) > room:
        limit = max(SMALLEST_CONTEXT, limit // 2)
    return limit


def place(
    config: ModelConfig,
    sizes: PackSizes,
    budget: Budget,
    *,
    context: int,
    kv_itemsize: int,
    gpu_dense: bool,
    drafting: Draft = "auto",
) -> Placement:
    """Every part and expert in a tier; `gpu_dense`: parts besides experts may lie in VRAM.

    `drafting`: "on" puts the drafter before experts, "auto" after all of them.
    """
    # Most bytes read per token and byte of room first; the embedding is one row per token.
    kv = kv_bytes(config, context, kv_itemsize)
    parts = {"routers, norms": sizes.exact, KV: kv, "attention": sizes.attention}
    parts |= {"dense layers": sizes.dense, "output head": sizes.head, EMBEDDING: sizes.embedding}
    parts = {name: nbytes for name, nbytes in parts.items() if nbytes}
    work, reserve = activation_bytes(config, native=budget.native), reserve_of(budget)
    restarts = restart_bytes(config, kv_itemsize)
    vram, ram = max(0, budget.vram - VRAM_RESERVE), budget.ram - reserve - work - restarts
    in_vram, in_ram, on_disk = dict[str, int](), dict[str, int](), dict[str, int]()
    for name, nbytes in parts.items():
        if gpu_dense and nbytes <= vram and name != EMBEDDING:
            in_vram[name], vram = nbytes, vram - nbytes
        else:
            in_ram[name], ram = nbytes, ram - nbytes
    drafter = {MTP: sizes.mtp, DRAFT_HEAD: sizes.draft_head}
    if gpu_dense and 0 < sizes.drafter <= vram and drafting != "off":
        in_vram, vram = in_vram | drafter, vram - sizes.drafter
    elif sizes.mtp and drafting == "on":
        in_ram, ram = in_ram | drafter, ram - sizes.drafter
    # A byte spilled goes to disk and back in every layer; an expert that gives way to it is read
    # once per document. So what a prompt as long as the context needs, if the RAM is not tiny.
    slots = 2 * config.experts_per_token * sizes.ram_slot if sizes.experts else 0
    room, need = max(0, (ram - slots) // HIDDEN_SHARE), hidden_bytes(config, context)
    hidden, most = (need, need) if need <= room else (room, room // 2)
    ram -= hidden
    found = _experts(config, sizes, vram, ram)
    ram -= (found.ram_experts + found.copies + found.staging_slots) * found.ram_slot
    if sizes.mtp and drafting == "auto" and MTP not in in_vram:
        # Drafting pays when experts are at hand; while they come from disk it only takes room.
        if not found.disk_experts and sizes.drafter <= ram:
            in_ram, ram = in_ram | drafter, ram - sizes.drafter
        else:
            on_disk[MTP] = sizes.mtp
    return replace(
        found,
        context=context, kv_itemsize=kv_itemsize,
        vram=in_vram, ram=in_ram, disk=on_disk, work=work, restarts=restarts,
        reserve=reserve,
        hidden_bytes=hidden,
        hidden_budget=most,
        hidden_tokens=most // max(1, hidden_bytes(config, 1)),
        short=max(0, -ram),
        notes=_notes(budget, on_disk),
    )  # fmt: skip


def _experts(config: ModelConfig, sizes: PackSizes, vram: int, ram: int) -> Placement:
    """Counts of experts for the bytes that are left; everything else is still empty."""
    in_vram = in_ram = staging = copies = 0
    slot = sizes.expert
    if sizes.experts:
        in_vram = min(sizes.experts, vram // sizes.vram_slot)
        left = sizes.experts - in_vram
        if left * sizes.expert > ram:
            # A disk tier: the misses of the layer at work and guesses for the next one land here.
            staging, slot = 2 * config.experts_per_token, sizes.ram_slot
            ram -= staging * slot
        in_ram = max(0, min(left, ram // slot))
        if in_ram == left:
            copies = max(0, min(in_vram, ram // slot - in_ram))
    return Placement(
        context=0, kv_itemsize=0, vram={}, ram={}, disk={}, work=0, restarts=0, reserve=0,
        hidden_bytes=0, hidden_budget=0, hidden_tokens=0,
        vram_experts=in_vram, ram_experts=in_ram, disk_experts=sizes.experts - in_vram - in_ram,
        copies=copies, staging_slots=staging, ram_slot=slot,
    )  # fmt: skip


def _notes(budget: Budget, on_disk: dict[str, int]) -> tuple[str, ...]:
    notes = []
    if 0 < budget.vram <= VRAM_RESERVE:
        notes.append(
            f"{gb(budget.vram)} of VRAM are no more than the {gb(VRAM_RESERVE)} a GPU's own "
            "needs take: it is not used"
        )
    if MTP in on_disk:
        notes.append("the MTP drafter stays on disk: drafting hardly pays while experts do too")
    return tuple(notes)


# -- what does not work ----------------------------------------------------------------------------


def problems(
    config: ModelConfig, sizes: PackSizes, budget: Budget, found: Placement
) -> tuple[Problem, ...]:
    """What is missing for `found` to work: bytes of RAM, bytes of disk."""
    lacking = []
    if found.short:
        small = PackSizes.estimate(config, Recipe.uniform("nf4"))
        saved = max(0, sizes.resident - small.resident)
        needed = _ram_for(budget, found)
        short = needed - budget.ram
        helps = [f"{gb(short)} more RAM"]
        if saved:
            helps.append(f"a pack with `--attention nf4 --dense nf4 --head nf4` (-{gb(saved)})")
        kv = kv_bytes(config, found.context, found.kv_itemsize)
        least = kv_bytes(config, min(found.context, SMALLEST_CONTEXT), found.kv_itemsize)
        if KV in found.ram and kv > least:
            helps.append(f"`--context {SMALLEST_CONTEXT}` (-{gb(kv - least)})")
            if found.kv_itemsize > 1:
                saved = kv - kv_bytes(config, found.context, 1)
                helps.append(f"`kv_dtype = int8` (-{gb(saved)})")
        if not any(found.vram.values()):
            helps.append("a GPU")
        lacking.append(
            Problem(
                "memory",
                f"{gb(needed)} of RAM are needed before the first expert, "
                f"{gb(budget.ram)} are there: {gb(short)} missing",
                ", or ".join(helps),
                short,
            )
        )
    missing = 0 if budget.pack_present else sizes.total - budget.disk
    if missing > 0:
        lacking.append(
            Problem(
                "disk",
                f"the pack is {gb(sizes.total)}, {gb(budget.disk)} of disk are free: "
                f"{gb(missing)} missing",
                f"free {gb(missing)}, or keep packs on another disk (MIMO_HOME)",
                missing,
            )
        )
    return tuple(lacking)


def _ram_for(budget: Budget, found: Placement) -> int:
    """The smallest RAM that has what `found` uses besides what is left to the system."""
    used = budget.ram - found.reserve + found.short
    if budget.reserve is not None:
        return used + budget.reserve
    used += PROGRAM
    return min(-(-used * RAM_SHARE // (RAM_SHARE - 1)), used + RAM_RESERVE)


# -- the table -------------------------------------------------------------------------------------


def rows(sizes: PackSizes, found: Placement) -> tuple[Row, ...]:
    """The lines of the plan: parts, buffers, what is left alone, experts by tier."""
    lines = []
    for name in dict.fromkeys((*found.vram, *found.ram, *found.disk)):
        vram, ram, disk = (tier.get(name, 0) for tier in (found.vram, found.ram, found.disk))
        runs = not vram and name not in (MTP, DRAFT_HEAD)
        lines.append(Row(name, vram + ram + disk, vram, ram, disk, runs))
    if found.restarts:
        lines.append(Row("restart points", found.restarts, ram=found.restarts))
    lines.append(Row("activations", found.work, ram=found.work))
    if found.hidden_bytes:
        lines.append(Row("hidden states", found.hidden_bytes, ram=found.hidden_bytes))
    if found.staging_slots:
        size = found.staging_slots * found.ram_slot
        lines.append(Row(f"read slots, {found.staging_slots}", size, ram=size))
    lines.append(Row("left alone", found.reserve, ram=found.reserve))
    one = sizes.expert
    if growth := found.vram_experts * (sizes.vram_slot - one):
        lines.append(Row("wider scales in VRAM", growth, vram=growth))
    if ends := found.ram_experts * (found.ram_slot - one):
        lines.append(Row("ends of RAM slots", ends, ram=ends))
    if found.copies:
        size = found.copies * one
        lines.append(Row(f"copies of VRAM's experts, {found.copies}", size, ram=size))
    counts = (found.vram_experts, found.ram_experts, found.disk_experts)
    for tier, count in enumerate(counts):
        if count:
            share = round(100 * count / sizes.experts)
            name = f"experts, {count} of {sizes.experts} ({share} %)"
            vram, ram, disk = (count * one if i == tier else 0 for i in range(3))
            lines.append(Row(name, count * one, vram, ram, disk))
    return tuple(lines)
