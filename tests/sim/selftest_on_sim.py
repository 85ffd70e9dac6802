"""The self-test on the stand-in device, in a process of its own: python ... CASE.

CASE "right" runs the code as it is; the others break one thing, which it must find. The last line
is one JSON object. Called by tests/test_selftest.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim_device

from mimo_local import device, device_attention
from mimo_local.experts import vram
from mimo_local.selftest import document
from mimo_local.selftest.run import SelfTest
from mimo_local.selftest.types import SMALL
from quant import on_device

STAGES: dict[str, tuple[str, ...]] = {
    "right": (),
    "experts used before they are there": ("experts",),
    "scales left out": ("products",),
    "no sink": ("attention",),
    "a device that fails": ("copies", "experts", "attention"),
}


def break_one(case: str) -> None:
    if case == "experts used before they are there":
        device.Mark.hold = lambda self, stream: None  # type: ignore[method-assign]
    if case == "scales left out":
        product = on_device.product

        def careless(x: torch.Tensor, name: str, *rest: object) -> torch.Tensor:
            y = product(x, name, *rest)  # type: ignore[arg-type]
            return y * 1.5 if name == "int8" else y

        on_device.product = careless  # type: ignore[assignment]
    if case == "no sink":
        plain = device_attention.attention

        def blind(*args: torch.Tensor, **place: object) -> torch.Tensor:
            return plain(*args, **{**place, "sink": None})  # type: ignore[arg-type]

        device_attention.attention = blind  # type: ignore[assignment]
    if case == "a device that fails":

        def lost(*args: object, **more: object) -> None:
            raise RuntimeError("sim: the device is lost\nat some address")

        vram.VramTier.run = lost  # type: ignore[assignment, method-assign]


def main(case: str) -> None:
    sim_device.load()
    break_one(case)
    # NF4 by bitsandbytes' reference is a hundred small operations a product: a minute here.
    sizes = dataclasses.replace(SMALL, context=20, formats=("int8", "bf16"))
    test = SelfTest(torch.device("sim"), sizes, only=STAGES[case])
    test.run()
    print(json.dumps({"ok": test.ok, "verdict": document.verdict(test), "results": test.results}))


if __name__ == "__main__":
    main(sys.argv[1])
