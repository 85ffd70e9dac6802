"""This machine as a budget: what `hardware` found, what the decode loop measured before.

Calibrations are kept in one small JSON file of the user's data folder, one per machine and pack,
written whole or not at all; a file that is damaged or of another version counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from mimo_local.hardware import Gpu, Hardware
from mimo_local.kernels import REFERENCE
from mimo_local.plan import cards
from mimo_local.plan.placement import RAM_RESERVE, RAM_SHARE
from mimo_local.plan.rates import CORE_FLOPS, SLOW_FLOPS, Calibration
from mimo_local.plan.types import Budget
from mimo_local.settings import PACK_MANIFEST

FILE: Final = "calibrations.json"
VERSION: Final = 1
FREE_VRAM_RESERVE: Final = 1_500_000_000
"""Of VRAM that is free: the driver's context, its libraries' workspaces, gaps between buffers."""
KEPT: Final = 50
"""Calibrations kept; the oldest go first."""


def whole_machine(facts: Hardware, calibration: Calibration | None = None) -> Budget:
    """All memory of this machine, to plan for."""
    budget = Budget(
        ram=facts.ram_total,
        disk=facts.disk.free,
        cores=min(facts.cores_physical, facts.cores_usable),
        core_flops=CORE_FLOPS.get(facts.kernels, SLOW_FLOPS),
        native=facts.kernels != REFERENCE,
        calibration=calibration,
    )
    gpu = max(facts.gpus, key=lambda gpu: gpu.vram_total, default=None)
    return budget if gpu is None else with_gpu(budget, gpu.vram_total, gpu)


def with_gpu(budget: Budget, vram: int, gpu: Gpu | None = None) -> Budget:
    """`budget` with `vram` bytes of a card: of `gpu`, or of a usual one with so much memory."""
    known = None if gpu is None else cards.named(gpu.name)
    card = known or cards.like(vram if gpu is None else gpu.vram_total)
    return replace(
        budget,
        vram=vram,
        vram_rate=card.vram_rate * 1e9,
        pcie_rate=card.pcie_rate * 1e9,
        gpu_flops=card.tflops * 1e12,
        gpu=card.name,
        measured=(*budget.measured, "gpu") if known else budget.measured,
    )


def free_now(
    facts: Hardware,
    calibration: Calibration | None = None,
    *,
    limit: int | None = None,
    vram: int | None = 0,
) -> Budget:
    """What a model that is loaded now may take: the memory that is free, less a reserve.

    The pack is there already. `limit`: most bytes of RAM for the model; `vram`: of the GPU's
    memory, None: what is free of it.
    """
    gpu = max(facts.gpus, key=lambda gpu: gpu.vram_free, default=None)
    reserve = min(RAM_RESERVE, facts.ram_total // RAM_SHARE)  # as `experts.memory.reserve`
    ram = facts.ram_available
    if limit is not None:
        ram = min(ram, limit + reserve)
    budget = Budget(
        ram=ram,
        disk=facts.disk.free,
        cores=min(facts.cores_physical, facts.cores_usable),
        core_flops=CORE_FLOPS.get(facts.kernels, SLOW_FLOPS),
        native=facts.kernels != REFERENCE,
        pack_present=True,
        reserve=reserve,
        vram_reserve=FREE_VRAM_RESERVE,
        calibration=calibration,
    )
    if gpu is None:
        return budget
    return with_gpu(budget, gpu.vram_free if vram is None else min(vram, gpu.vram_free), gpu)


def machine_key(facts: Hardware) -> str:
    """Twelve characters that stay the same as long as speeds should."""
    gpus = ",".join(gpu.name for gpu in facts.gpus)
    text = f"{facts.cpu}|{facts.cores_usable}|{facts.kernels}|{gpus}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def model_key(folder: Path) -> str:
    """Twelve characters for what is in a pack or checkpoint folder: its manifest or its config."""
    for name in (PACK_MANIFEST, "config.json"):
        with contextlib.suppress(OSError):
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12]
    return "unknown"


def calibration_of(data_dir: Path, machine: str, model: str) -> Calibration | None:
    """What was measured with this pack on this machine, if it was."""
    entry = _entries(data_dir / FILE).get(f"{machine}-{model}")
    names = {f.name for f in fields(Calibration)}
    needed = {f.name for f in fields(Calibration) if f.default is MISSING}
    if not isinstance(entry, dict) or not needed <= set(entry) <= names:
        return None
    found = Calibration(**entry)
    numbers = [v for k, v in entry.items() if k != "when" and (v is not None or k in needed)]
    if not all(isinstance(v, (int, float)) and v >= 0 for v in numbers):
        return None
    rates = (found.ram_rate, found.rest_rate, found.flops, found.disk_rate, found.vram_rate)
    return None if 0 in rates else found


def keep_calibration(data_dir: Path, machine: str, model: str, found: Calibration) -> Path:
    """Store it, in place of an older one; OSError if the folder cannot be written."""
    path = data_dir / FILE
    entries = _entries(path)
    key = f"{machine}-{model}"
    entries.pop(key, None)
    entries[key] = asdict(found)
    kept = dict(list(entries.items())[-KEPT:])
    data_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"version": VERSION, "calibrations": kept}, indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Replace a file: whoever reads it sees the old text or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _entries(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict) or data.get("version") != VERSION:
        return {}
    entries = data.get("calibrations")
    return entries if isinstance(entries, dict) else {}
