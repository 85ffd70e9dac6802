"""Where every byte of a model would live on a machine, and how fast that would be. Pure arithmetic.

Fills VRAM, then RAM, then disk with the bytes that `sizes` counts. Speeds are estimates from
bandwidths, with uniform routing, and say so; `mimo bench` measures. Knows no file and no tensor,
imports no torch; called by cli and doctor.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mimo_local.config import ModelConfig
from mimo_local.errors import DiskSpaceError, MimoError, NotEnoughMemoryError, UsageError
from mimo_local.sizes import (
    GB,
    PackSizes,
    activation_bytes,
    active_weights,
    gb,
    kv_bytes,
)
from quant.recipe import Recipe

VRAM_RESERVE = 2_500_000_000  # CUDA context, workspaces, the desktop's own use
RAM_SHARE, RAM_RESERVE = 8, 8 * GB  # left to the system: an eighth, at most 8 GB
PREFILL = 4096  # tokens of the prompt whose speed is predicted
LAYER_S, STEP_S = 90e-6, 2e-3  # waking threads per layer; sampling, launches per token


@dataclass(frozen=True, slots=True)
class Budget:
    """The machine to plan for: bytes, cores, peak rates in bytes/s (assumed unless measured)."""

    ram: int
    disk: int
    vram: int = 0
    cores: int = 8
    ram_rate: float = 70e9
    disk_rate: float = 7e9
    vram_rate: float = 1008e9
    pcie_rate: float = 25e9
    measured: tuple[str, ...] = ()
    """Names of the rates that were measured here: "ram", "disk"."""
    pack_present: bool = False
    """The pack is already on this disk: its bytes need no free space."""


# Shares of the peak that good code reaches, and arithmetic rates (multiply-adds count twice).
RAM_EFF, DISK_EFF, VRAM_EFF, PCIE_EFF = 0.75, 0.8, 0.75, 0.85
GPU_FLOPS, CORE_FLOPS = 80e12, 40e9


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the plan: how many of its bytes live where; `today`: this version can do so."""

    name: str
    nbytes: int
    vram: int = 0
    ram: int = 0
    disk: int = 0
    today: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """Estimated speeds of one placement."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    prefill_tokens: int
    load_s: float


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a plan cannot work: what is missing in bytes, and what would help."""

    kind: Literal["memory", "disk"]
    message: str
    hint: str
    missing: int

    def error(self) -> MimoError:
        """The same as the error a command raises."""
        cls = NotEnoughMemoryError if self.kind == "memory" else DiskSpaceError
        return cls(self.message, hint=self.hint)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer; `today_missing` is the RAM in bytes this version lacks to run it (0: it runs)."""

    context: int
    budget: Budget
    sizes: PackSizes
    table: tuple[Row, ...]
    problems: tuple[Problem, ...]
    prediction: Prediction | None
    today: Prediction | None
    today_needs: int
    today_missing: int
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def rows(self) -> tuple[Row, ...]:
        """What is placed where, largest decisions last."""
        return self.table

    @property
    def fits(self) -> bool:
        """Whether the planned placement works at all."""
        return not self.problems

    def check(self) -> None:
        """Raise the first problem as NotEnoughMemoryError or DiskSpaceError."""
        for problem in self.problems:
            raise problem.error()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json; every speed is an estimate."""
        return asdict(self) | {"fits": self.fits, "speeds": "estimated", "total": self.sizes.total}


def plan(
    config: ModelConfig,
    pack: PackSizes | None,
    budget: Budget,
    *,
    context: int = 8192,
    kv_itemsize: int = 2,
) -> Plan:
    """Place `pack` (estimated if None) on `budget` for one sequence of `context` tokens."""
    if not 0 < context <= config.max_context:
        raise UsageError(
            f"a context of {context} tokens is outside the model's 1 to {config.max_context}",
            hint=f"use `--context {config.max_context}` or less",
        )
    sizes = pack or PackSizes.estimate(config)
    kv = kv_bytes(config, context, kv_itemsize)
    work = activation_bytes(config)
    reserve = min(RAM_RESERVE, budget.ram // RAM_SHARE)
    layout = _place(config, sizes, budget, kv, work, reserve)
    problems = _problems(config, sizes, budget, layout)
    needs = _ram_for(sizes.resident + sizes.expert * sizes.experts + kv + work)
    missing = max(0, needs - budget.ram)
    on_cpu = _Layout(ram={**layout.sizes}, ram_experts=sizes.experts)
    return Plan(
        context=context,
        budget=budget,
        sizes=sizes,
        table=_rows(sizes, layout, kv, work, reserve),
        problems=problems,
        prediction=None if problems else _predict(config, sizes, budget, layout),
        today=_predict(config, sizes, budget, on_cpu) if not missing and not problems else None,
        today_needs=needs,
        today_missing=missing,
        assumptions=_assumptions(budget, layout),
        notes=layout.notes,
    )


# -- placing ---------------------------------------------------------------------------------------


def _ram_for(used: int) -> int:
    """The smallest RAM that leaves `used` bytes besides the system's share."""
    share = -(-used * RAM_SHARE // (RAM_SHARE - 1))
    return min(share, used + RAM_RESERVE)


@dataclass
class _Layout:
    """Bytes per component in VRAM and RAM, and experts per tier."""

    sizes: dict[str, int] = field(default_factory=dict)
    vram: dict[str, int] = field(default_factory=dict)
    ram: dict[str, int] = field(default_factory=dict)
    vram_experts: int = 0
    ram_experts: int = 0
    disk_experts: int = 0
    staging: int = 0
    short: int = 0
    notes: tuple[str, ...] = ()


def _place(
    config: ModelConfig, sizes: PackSizes, budget: Budget, kv: int, work: int, reserve: int
) -> _Layout:
    # Most bytes read per token and byte of room first; the embedding is one row per token.
    parts = {"routers, norms": sizes.exact, "KV cache": kv, "attention": sizes.attention}
    parts |= {"dense layers": sizes.dense, "output head": sizes.head}
    parts |= {"embedding": sizes.embedding}
    layout = _Layout(sizes=dict(parts))
    vram = max(0, budget.vram - VRAM_RESERVE)
    ram = budget.ram - reserve - work
    for name, nbytes in parts.items():
        if 0 < nbytes <= vram and name != "embedding":
            layout.vram[name], vram = nbytes, vram - nbytes
        else:
            layout.ram[name], ram = nbytes, ram - nbytes
    notes = []
    if 0 < budget.vram <= VRAM_RESERVE:
        notes.append(f"{gb(budget.vram)} of VRAM are less than the reserve: the GPU is not used")
    if sizes.mtp:
        if sizes.mtp <= vram:
            layout.vram["MTP drafter"], vram = sizes.mtp, vram - sizes.mtp
        elif sizes.mtp <= ram - 2 * config.experts_per_token * sizes.expert:
            layout.ram["MTP drafter"], ram = sizes.mtp, ram - sizes.mtp
        else:
            notes.append("the MTP drafter does not fit: it stays on disk, drafting is off")
    if sizes.experts:
        layout.vram_experts = min(sizes.experts, vram // sizes.expert)
        left = sizes.experts - layout.vram_experts
        if left * sizes.expert > ram:  # a disk tier: the layer at work and the next land in RAM
            layout.staging = 2 * config.experts_per_token * sizes.expert
            ram -= layout.staging
        layout.ram_experts = max(0, min(left, ram // sizes.expert))
        layout.disk_experts = left - layout.ram_experts
    layout.short = max(0, -ram)
    layout.notes = tuple(notes)
    return layout


def _problems(
    config: ModelConfig, sizes: PackSizes, budget: Budget, layout: _Layout
) -> tuple[Problem, ...]:
    problems = []
    if layout.short:
        small = PackSizes.estimate(config, Recipe.uniform("nf4"))
        saved = max(0, sizes.resident - small.resident)
        reserve = min(RAM_RESERVE, budget.ram // RAM_SHARE)
        needed = _ram_for(budget.ram - reserve + layout.short)
        short = needed - budget.ram
        helps = f"{gb(short)} more RAM"
        if saved:
            helps += f", or a pack with `--attention nf4 --dense nf4 --head nf4` (-{gb(saved)})"
        problems.append(
            Problem(
                "memory",
                f"{gb(needed)} of RAM are needed before the first expert, "
                f"{gb(budget.ram)} are there: {gb(short)} missing",
                f"{helps}, a GPU, or a smaller --context",
                short,
            )
        )
    missing = 0 if budget.pack_present else sizes.total - budget.disk
    if missing > 0:
        problems.append(
            Problem(
                "disk",
                f"the pack is {gb(sizes.total)}, {gb(budget.disk)} of disk are free: "
                f"{gb(missing)} missing",
                f"free {gb(missing)}, or keep packs on another disk (MIMO_HOME)",
                missing,
            )
        )
    return tuple(problems)


def _rows(sizes: PackSizes, layout: _Layout, kv: int, work: int, reserve: int) -> tuple[Row, ...]:
    rows = []
    for name, nbytes in layout.sizes.items():
        ram, vram = layout.ram.get(name, 0), layout.vram.get(name, 0)
        if nbytes:
            rows.append(Row(name, nbytes, vram=vram, ram=ram, today=not vram))
    if sizes.mtp:
        vram, ram = layout.vram.get("MTP drafter", 0), layout.ram.get("MTP drafter", 0)
        rows.append(Row("MTP drafter", sizes.mtp, vram, ram, sizes.mtp - vram - ram))
    rows.append(Row("activations", work, ram=work, today=True))
    if layout.staging:
        rows.append(Row("disk read buffers", layout.staging, ram=layout.staging))
    rows.append(Row("left to the system", reserve, ram=reserve, today=True))
    one = sizes.expert
    tiers = {"vram": layout.vram_experts, "ram": layout.ram_experts, "disk": layout.disk_experts}
    for tier, count in tiers.items():
        if count:
            share = round(100 * count / sizes.experts)
            name = f"experts, {count} of {sizes.experts} ({share} %)"
            where = {tier: count * one}
            rows.append(Row(name, count * one, **where, today=tier == "ram"))
    return tuple(rows)


# -- predicting ------------------------------------------------------------------------------------


def _predict(config: ModelConfig, sizes: PackSizes, budget: Budget, layout: _Layout) -> Prediction:
    ram, disk = budget.ram_rate * RAM_EFF, budget.disk_rate * DISK_EFF
    vram = budget.vram_rate * VRAM_EFF
    gpu = bool(layout.vram) or layout.vram_experts > 0
    step = STEP_S + LAYER_S * config.n_layers
    skip = {"MTP drafter"} if config.tie_embeddings else {"MTP drafter", "embedding"}
    step += sum(n for name, n in layout.vram.items() if name not in skip) / vram
    step += sum(n for name, n in layout.ram.items() if name not in skip) / ram
    if sizes.experts:
        moe = sum(layer.mlp == "moe" for layer in config.layers)
        shares = [n / sizes.experts for n in (layout.vram_experts, layout.disk_experts)]
        one = [sizes.expert / rate for rate in (vram, ram, disk)]
        step += moe * expected_layer_s(config.experts_per_token, shares[0], shares[1], *one)
    tokens = PREFILL
    flops = 2 * active_weights(config) * tokens
    on_disk = layout.disk_experts * sizes.expert
    off_gpu = on_disk + layout.ram_experts * sizes.expert
    if gpu:
        sweep = max(off_gpu / (budget.pcie_rate * PCIE_EFF), flops / GPU_FLOPS)
    else:
        sweep = max(off_gpu / ram, flops / (CORE_FLOPS * budget.cores))
    sweep = max(sweep, on_disk / disk)
    loaded = sizes.total - sizes.mtp - on_disk
    return Prediction(1 / step, tokens / sweep, tokens, loaded / disk)


def expected_layer_s(
    chosen: int, vram: float, disk: float, vram_s: float, ram_s: float, disk_s: float
) -> float:
    """Mean seconds of one MoE layer: `chosen` experts drawn uniformly over three tiers at once.

    `vram` and `disk` are the shares of experts there, the rest is in RAM; `*_s` is one expert's
    time in a tier. The tiers work side by side, so the slowest counts; what comes from disk is
    multiplied by the CPU too.
    """
    mean = 0.0
    ram = max(0.0, 1 - vram - disk)
    for v in range(chosen + 1):
        for d in range(chosen - v + 1):
            r = chosen - v - d
            ways = math.comb(chosen, v) * math.comb(chosen - v, d)
            chance = ways * vram**v * disk**d * ram**r
            mean += chance * max(v * vram_s, (r + d) * ram_s, d * disk_s)
    return mean


def _assumptions(budget: Budget, layout: _Layout) -> tuple[str, ...]:
    def rate(name: str, value: float, share: float) -> str:
        how = "measured" if name.split()[0].lower() in budget.measured else "assumed"
        return f"{name} {value / GB:.4g} GB/s ({how}), {share:.0%} of it reached"

    lines = [rate("RAM", budget.ram_rate, RAM_EFF), rate("disk", budget.disk_rate, DISK_EFF)]
    if layout.vram or layout.vram_experts:
        lines.append(rate("VRAM", budget.vram_rate, VRAM_EFF))
        lines.append(rate("PCIe", budget.pcie_rate, PCIE_EFF))
    else:
        lines.append(f"{budget.cores} cores, {CORE_FLOPS / 1e9:.0f} GFLOP/s each while prefilling")
    lines.append("every expert equally likely; no drafting")
    return tuple(lines)
