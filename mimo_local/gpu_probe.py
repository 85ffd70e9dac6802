"""Whether a card works with this torch and this bitsandbytes: tries it, prints one JSON line.

`python -m mimo_local.gpu_probe 0`, by `gpu_facts.probe`: a broken driver may hang or crash the
process that asks, so it is not the user's. Every trial has an answer of its own, as the first thing
that fails is not always the only one. Trials run on any device, for the tests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

SIZE: Final = 256 << 20
"""Bytes copied to measure the bus: 10 ms at 25 GB/s."""


def examine(index: int) -> dict[str, Any]:
    """All answers about CUDA device `index`."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__, "cuda": torch.version.cuda or "", "available": False,
        "why": "", "archs": [], "name": "", "capability": [0, 0], "total": 0, "free": 0,
        "checks": {}, "rates": {},
    }  # fmt: skip
    if not found["cuda"]:
        return found
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        found["archs"] = torch.cuda.get_arch_list()
        found["name"] = torch.cuda.get_device_name(index)
        found["capability"] = list(torch.cuda.get_device_capability(index))
        found["free"], found["total"] = torch.cuda.mem_get_info(index)
        found["available"] = True
    except Exception as error:  # whatever class torch and the driver choose
        found["why"] = first_line(error)
        return found
    found["checks"], found["rates"] = trials(torch.device("cuda", index))
    return found


def trials(device: Any, size: int = SIZE) -> tuple[dict[str, str], dict[str, float]]:
    """(what was tried -> what went wrong, "" if nothing; bytes per second of the bus)."""
    rates: dict[str, float] = {}
    steps: dict[str, Callable[[Any], str]] = {
        "tensors": _tensors,
        "pinned memory": lambda device: _pinned(device, size, rates),
        "4-bit products": lambda device: _product(device, "nf4"),
        "8-bit products": lambda device: _product(device, "int8"),
        "Triton": _triton,
    }
    found = {}
    for name, step in steps.items():
        try:
            found[name] = step(device)
        except Exception as error:  # a missing library, a refused allocation, a lost card
            found[name] = first_line(error)
    return found, rates


def first_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tensors(device: Any) -> str:
    import torch

    x = torch.arange(64.0, device=device).view(8, 8)
    return "" if (x @ x.T).sum().item() == 510720.0 else "a product of tensors is wrong"


def _pinned(device: Any, size: int, rates: dict[str, float]) -> str:
    """Copies both ways through pinned memory, timed."""
    import torch

    from mimo_local.device import Mark, host_buffer

    sent = host_buffer((size,), torch.uint8, device)
    back = host_buffer((size,), torch.uint8, device)
    sent.copy_(torch.arange(size, dtype=torch.int64).to(torch.uint8))
    there = torch.empty((size,), dtype=torch.uint8, device=device)
    for name, target, source in (("to the card", there, sent), ("from the card", back, there)):
        for _ in range(2):  # the first wakes the bus up: an idle card runs it at its lowest speed
            done = Mark(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            done.set()
            done.wait()
            rates[name] = size / (time.perf_counter() - start)
    return "" if torch.equal(sent, back) else "bytes were changed on the way"


def _product(device: Any, name: str) -> str:
    """A small product there against the same in float32 here."""
    import torch

    from quant import on_device
    from quant.formats import get_format

    fmt = get_format(name)
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 512, generator=g), torch.randn(2, 512, generator=g)
    parts = fmt.pack(w)
    wanted = x @ fmt.unpack(parts).T
    there = x.to(device=device, dtype=on_device.activations(device))
    y = on_device.product(there, name, on_device.upload(fmt, parts, device), 256, 512)
    error = float((y.float().cpu() - wanted).norm() / wanted.norm())
    return "" if error < 2e-2 else f"results are off by {error:.1%}"


def _triton(device: Any) -> str:
    from mimo_local.kernels import triton_experts

    return triton_experts.why_unavailable(device)  # and why the other one is not, if so


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    print(json.dumps(examine(int(sys.argv[1]))))
