"""How fast each part of a machine is taken to be: measured by the decode loop, else assumed.

Peak rates times the share of them that good code reaches; a calibration replaces what it measured.
Every rate comes with a line that says where it is from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mimo_local.sizes import GB

if TYPE_CHECKING:
    from mimo_local.plan.types import Budget

# Shares of the peak that good code reaches: RAM by 4-bit kernels (measured 0.75-0.95 here), a drive
# by whole experts with several reads in flight, VRAM and PCIe by large copies.
RAM_EFF, DISK_EFF, VRAM_EFF, PCIE_EFF = 0.75, 0.8, 0.75, 0.85
GPU_FLOPS = 80e12  # of an RTX 4090's 165 in bfloat16
# Waking threads and launches per layer; sampling and the loop per token.
LAYER_S, STEP_S = 90e-6, 2e-3
# A layer on a GPU: some thirty launches and one wait for the router's choice.
DEVICE_LAYER_S = 200e-6
# One core's 4-bit products in long prompts by instruction set, multiply-adds counted twice.
CORE_FLOPS = {"avx512": 180e9, "avx_vnni": 90e9, "avx2": 60e9}
SLOW_FLOPS = 5e9  # the scalar table and torch's reference


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the real decode loop gave with one pack on one machine; rates in bytes/s reached."""

    when: str
    """Date, ISO."""
    tokens: int
    prompt: int
    resident_s: float
    """Of a token: everything but experts."""
    expert_s: float
    """Of a token: its experts, all of them in RAM."""
    wait_s: float
    """Of a token: what misses added, at the hit rate of the calibration."""
    ram_rate: float
    rest_rate: float
    """The same for attention, dense layers and head."""
    layer_s: float
    flops: float
    """Of a prompt of `prompt` tokens, attention included; longer ones do better."""
    disk_rate: float | None = None
    """None: nothing was read from disk."""
    reads: float = 0.0
    """Misses of a layer's step that had any, mean: how many reads were in flight."""
    vram_rate: float | None = None
    """As `rest_rate`, on a GPU; None: not all layers were there."""
    device_layer_s: float | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates as they are reached, and `lines` that say where each is from."""

    ram: float
    rest: float
    disk: float
    vram: float
    pcie: float
    cpu_flops: float
    gpu_flops: float
    layer_s: float
    device_layer_s: float
    step_s: float
    lines: tuple[str, ...]

    @classmethod
    def of(cls, budget: Budget, *, gpu: bool, cpu: bool = True) -> Rates:
        """The budget's rates; `gpu`: a GPU computes, `cpu`: prompts run on the processor, too."""
        found = budget.calibration

        def line(name: str, value: float, share: float, key: str = "") -> str:
            how = "measured" if key in budget.measured else "assumed"
            how = "given" if key in budget.given else how
            return f"{name} {value / GB:.4g} GB/s ({how}), {share:.0%} of it reached"

        ram, disk = budget.ram_rate * RAM_EFF, budget.disk_rate * DISK_EFF
        vram, flops = budget.vram_rate * VRAM_EFF, budget.cores * budget.core_flops
        rest, layer_s, step_s, lines = ram, LAYER_S, STEP_S, []
        device_layer_s, there = DEVICE_LAYER_S, found is not None and found.vram_rate is not None
        if found is None:
            lines.append(line("RAM", budget.ram_rate, RAM_EFF, "ram"))
        else:
            ram, rest, flops = found.ram_rate, found.rest_rate, found.flops
            layer_s, step_s = found.layer_s, 0.0
            vram = vram if found.vram_rate is None else found.vram_rate
            each = found.device_layer_s
            device_layer_s = device_layer_s if each is None else each
            both = f", {rest / GB:.4g} GB/s for the rest, {1e6 * layer_s:.0f} us a layer"
            lines.append(
                f"RAM {ram / GB:.4g} GB/s for experts{'' if there else both} "
                f"(calibrated {found.when})"
            )
        if found is not None and found.disk_rate is not None:
            disk = found.disk_rate
            lines.append(
                f"disk {disk / GB:.4g} GB/s at {found.reads:.1f} experts in flight "
                f"(calibrated {found.when})"
            )
        else:
            lines.append(line("disk", budget.disk_rate, DISK_EFF, "disk"))
        if gpu:
            lines += _gpu_lines(budget, vram, device_layer_s)
        if not cpu:
            pass
        elif found is not None and not there:
            lines.append(f"{flops / 1e9:.0f} GFLOP/s in prompts (calibrated {found.when})")
        else:
            each = budget.core_flops / 1e9
            lines.append(f"{budget.cores} cores, {each:.0f} GFLOP/s each in prompts (assumed)")
        return cls(
            ram, rest, disk, vram, budget.pcie_rate * PCIE_EFF,
            flops, budget.gpu_flops, layer_s, device_layer_s, step_s, tuple(lines),
        )  # fmt: skip


def _gpu_lines(budget: Budget, vram: float, layer_s: float) -> list[str]:
    """Where a GPU's rates are from; `vram` and `layer_s` as they are reached."""
    how = budget.gpu if "gpu" in budget.measured else f"like an {budget.gpu}"
    given = "given" if "vram" in budget.given else how
    found, each = budget.calibration, f"{1e6 * layer_s:.0f} us a layer"
    pcie = f"PCIe {budget.pcie_rate / GB:.4g} GB/s ({how}), {PCIE_EFF:.0%} of it reached"
    flops = f"GPU {budget.gpu_flops / 1e12:.0f} TFLOP/s in long prompts ({how})"
    if found is not None and found.vram_rate is not None:
        return [f"VRAM {vram / GB:.4g} GB/s, {each} (calibrated {found.when})", pcie, flops]
    rate = f"VRAM {budget.vram_rate / GB:.4g} GB/s ({given}), {VRAM_EFF:.0%} of it reached"
    return [rate, pcie, f"{flops}, {each} besides (assumed)"]
