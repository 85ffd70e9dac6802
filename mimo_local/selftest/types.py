"""What a self-test finds, how large it is, and how its devices are timed and compared.

Knows no model. Used by the other files of this folder.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from mimo_local.device import Mark


class Result(NamedTuple):
    """One line: a check, or (ok None) a figure that nothing is said about."""

    area: str
    name: str
    ok: bool | None
    found: str
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is made and how long it is measured."""

    shape: str
    """Key of `random_weights.SHAPES`: of matrices, heads and experts."""
    vocab: int
    context: int
    """Keys a row attends to in a full layer."""
    prompt: int
    """Rows of a long prompt."""
    layers: int
    experts: int
    """Of a layer of the model that is made."""
    copied: int
    """Bytes copied to measure a bus."""
    flushed: int
    """Bytes of copies of a matrix that are multiplied in turn: more than any cache holds."""
    seconds: float
    """A product is repeated for so long."""
    formats: tuple[str, ...] = ("nf4", "mxfp4", "int8", "bf16")
    """Of matrices; the first is that of the model's experts."""


REAL: Final = Sizes(
    "real", 16_384, context=8192, prompt=512, layers=3, experts=16,
    copied=256 << 20, flushed=256 << 20, seconds=0.1,
)  # fmt: skip
SMALL: Final = Sizes(
    "tiny", 512, context=40, prompt=48, layers=3, experts=16,
    copied=1 << 16, flushed=0, seconds=0.0,
)  # fmt: skip
"""For tests, and for devices that only pretend."""


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    done = Mark(device)
    done.set()
    done.wait()


def timed(calls: Iterable[Callable[[], object]], device: torch.device, seconds: float) -> float:
    """Seconds of one call, these being made in turn for about `seconds`."""
    turn = itertools.cycle(calls)
    next(turn)()
    wait(device)
    n = 1
    while True:
        start = time.perf_counter()
        for _ in range(n):
            next(turn)()
        wait(device)
        took = time.perf_counter() - start
        if took >= seconds or n >= 4096:
            return took / n
        n *= 2


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far the one is from the other, relative to its size; inf if there is a nan."""
    here = found.detach().to("cpu", torch.float32)
    error = float((here - wanted).norm() / wanted.norm())
    return math.inf if math.isnan(error) else error


def percent(share: float) -> str:
    """0.0123 -> 1.2 %; no more digits than mean something."""
    if share >= 0.995:
        return f"{100 * share:.0f} %"
    return f"{100 * share:.2g} %" if share >= 1e-5 else "0 %"


def checked(area: str, name: str, error: float, bound: float, more: str = "") -> Result:
    """A check that an error is below a bound."""
    said = f"{percent(error)} off" + (f", {more}" if more else "")
    return Result(area, name, error < bound, said, f"below {percent(bound)}")
