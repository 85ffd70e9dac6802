"""Which byte goes where: VRAM, then RAM, then disk, by bytes read per token and byte of room.

Fills the tiers in the order that gains most and never past a budget; says what is missing if the
part without experts does not fit. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

from mimo_local.config import ModelConfig
from mimo_local.plan import residents
from mimo_local.plan.residents import STREAMS, VRAM_RESERVE, OnDevice
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


def fitting_context(
    config: ModelConfig,
    sizes: PackSizes,
    budget: Budget,
    itemsize: int,
) -> int:
    """Tokens of context when nobody asked for a number: 32k, halved until it fits easily."""
    limit = min(config.max_context, DEFAULT_CONTEXT)
    work = activation_bytes(config, native=budget.native) + restart_bytes(config, itemsize)
    room = (
        budget.ram
        - reserve_of(budget)
        - work
        - sizes.resident
        + max(0, budget.vram - vram_reserve(budget))
    )
    while limit > SMALLEST_CONTEXT and CONTEXT_SHARE * kv_bytes(config, limit, itemsize) > room:
        limit = max(SMALLEST_CONTEXT, limit // 2)
    return limit


def vram_reserve(budget: Budget) -> int:
    """Bytes of VRAM the plan leaves alone."""
    return VRAM_RESERVE if budget.vram_reserve is None else budget.vram_reserve


def place(
    config: ModelConfig,
    sizes: PackSizes,
    budget: Budget,
    *,
    context: int,
    kv_itemsize: int,
    drafting: Draft = "auto",
) -> Placement:
    """Every part and expert in a tier.

    `drafting`: "on" puts the drafter before experts, "auto" after all of them, but for a GPU that
    has room for it.
    """
    there = residents.on_device(
        config, sizes, budget.vram, vram_reserve(budget),
        context=context, kv_itemsize=kv_itemsize, drafting=drafting,
    )  # fmt: skip
    work, reserve = activation_bytes(config, native=budget.native), reserve_of(budget)
    restarts = restart_bytes(config, kv_itemsize) - there.restarts
    in_vram, in_ram = _parts(config, sizes, kv_bytes(config, context, kv_itemsize), there)
    ram = budget.ram - reserve - work - restarts - there.pinned - sum(in_ram.values())
    on_disk = dict[str, int]()
    drafter = {MTP: sizes.mtp, DRAFT_HEAD: sizes.draft_head}
    drafter = {name: nbytes for name, nbytes in drafter.items() if nbytes}
    undecided = bool(sizes.mtp) and not there.drafter
    if undecided and drafting == "on":
        in_ram, ram = in_ram | drafter, ram - sizes.drafter
    # A byte spilled goes to disk and back in every layer; an expert that gives way to it is read
    # once per document. So what a prompt as long as the context needs, if the RAM is not tiny.
    slots = 2 * config.experts_per_token * sizes.ram_slot if sizes.experts else 0
    room, need = max(0, (ram - slots) // HIDDEN_SHARE), hidden_bytes(config, context)
    if there.layers == config.n_layers:
        need = 0  # they are in VRAM
    hidden, most = (need, need) if need <= room else (room, room // 2)
    ram -= hidden
    found = _experts(config, sizes, there.left, ram)
    ram -= (found.ram_experts + found.copies + found.staging_slots) * found.ram_slot
    if undecided and drafting == "auto":
        # Drafting pays when experts are at hand; while they come from disk it only takes room.
        if not found.disk_experts and sizes.drafter <= ram:
            in_ram, ram = in_ram | drafter, ram - sizes.drafter
        else:
            on_disk[MTP] = sizes.mtp
    tokens = there.rows if not need else most // max(1, hidden_bytes(config, 1))
    return replace(
        found,
        context=context, kv_itemsize=kv_itemsize,
        vram=in_vram, ram=in_ram, disk=on_disk, work=work, restarts=restarts,
        reserve=reserve, device=there,
        hidden_bytes=hidden,
        hidden_budget=most,
        hidden_tokens=tokens,
        short=max(0, -ram),
        notes=_notes(config, budget, there, on_disk),
    )  # fmt: skip


def _parts(
    config: ModelConfig, sizes: PackSizes, kv: int, there: OnDevice
) -> tuple[dict[str, int], dict[str, int]]:
    """(VRAM, RAM): bytes of the parts every token needs; the embedding is one row per token."""
    moved = sizes.layers[: there.layers]
    exact = sizes.exact - there.exact
    head, norm = (0, 4 * config.hidden_size) if there.head else (sizes.head, 0)
    # What is of no layer: the norm before the head, those of the MTP layers.
    others = exact - norm if there.drafter else 0
    ram = {
        "routers, norms": exact - norm - others,
        KV: kv - there.kv,
        "attention": sizes.attention - sum(layer.attention for layer in moved),
        "dense layers": sizes.dense - sum(layer.dense for layer in moved),
        "output head": head,
        EMBEDDING: sizes.embedding,
    }
    mtp = max(0, there.drafter_bytes - others)
    copy = sizes.draft_head * 18 // 17 if mtp and sizes.draft_head else 0
    vram = {
        "routers, norms": there.exact + norm + others,
        KV: there.kv,
        "attention": there.attention,
        "dense layers": there.dense,
        "output head": there.head_bytes - norm,
        MTP: mtp - copy,
        DRAFT_HEAD: copy,
    }
    return tuple({n: b for n, b in tier.items() if b} for tier in (vram, ram))  # type: ignore[return-value]


def _experts(config: ModelConfig, sizes: PackSizes, vram: int, ram: int) -> Placement:
    """Counts of experts for the bytes that are left; everything else is still empty."""
    in_vram = in_ram = staging = copies = 0
    slot = sizes.mean
    if sizes.experts:
        in_vram = min(sizes.experts, vram // sizes.vram_slot)
        left = sizes.experts - in_vram
        if left * sizes.mean > ram:
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


def _notes(
    config: ModelConfig, budget: Budget, there: OnDevice, on_disk: dict[str, int]
) -> tuple[str, ...]:
    notes = [*residents.notes(config, budget.vram, there)]
    own = vram_reserve(budget)
    if 0 < budget.vram <= own:
        notes = [
            f"{gb(budget.vram)} of VRAM are no more than the {gb(own)} a GPU's own needs take: "
            "it is not used"
        ]
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
    lines, there = [], found.device
    for name in dict.fromkeys((*found.vram, *found.ram, *found.disk)):
        lines.append(_row(name, *(t.get(name, 0) for t in (found.vram, found.ram, found.disk))))
    lines += [
        _row("restart points", there.restarts, found.restarts),
        _row("activations", there.work, found.work),
        _row("hidden states", there.hidden if there.layers else 0, found.hidden_bytes),
        _row(f"experts passing through, {STREAMS}", there.streams),
        _row("pinned buffers", 0, there.pinned),
        _row(f"read slots, {found.staging_slots}", 0, found.staging_slots * found.ram_slot),
        _row("left alone", there.reserve, found.reserve),
    ]
    one, copies = sizes.mean, found.copies
    lines += [
        _row("wider scales in VRAM", found.vram_experts * max(0, sizes.vram_slot - one)),
        _row("ends of RAM slots", 0, found.ram_experts * (found.ram_slot - one)),
        _row(f"copies of VRAM's experts, {copies}", 0, copies * one),
    ]
    counts = (found.vram_experts, found.ram_experts, found.disk_experts)
    for tier, count in enumerate(counts):
        if count:
            share = round(100 * count / sizes.experts)
            name = f"experts, {count} of {sizes.experts} ({share} %)"
            # In VRAM an expert does not fill whole pages.
            size = min(one, sizes.vram_slot) if tier == 0 else one
            lines.append(_row(name, *(count * size if i == tier else 0 for i in range(3))))
    return tuple(line for line in lines if line.nbytes)


def _row(name: str, vram: int = 0, ram: int = 0, disk: int = 0) -> Row:
    return Row(name, vram + ram + disk, vram, ram, disk)
