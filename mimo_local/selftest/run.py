"""The self-test of an accelerator: all stages one after the other, whatever goes wrong in one.

Called by `mimo bench --gpu-selftest`; knows no terminal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

import torch

from mimo_local.config import ModelConfig
from mimo_local.device import is_accelerator
from mimo_local.errors import UsageError
from mimo_local.events import Progress
from mimo_local.gpu_probe import first_line
from mimo_local.random_weights import shape_config
from mimo_local.selftest import operators, rates, whole
from mimo_local.selftest.types import REAL, SMALL, Result, Sizes
from mimo_local.weights import OnProgress


class SelfTest:
    """Everything a device is asked to do for a model, compared and timed."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        *,
        only: Collection[str] = (),
        on_progress: OnProgress | None = None,
    ) -> None:
        """`only`: these stages, all if empty."""
        self.device, self.sizes, self._on_progress = device, sizes, on_progress
        self._only = only
        self.results: list[Result] = []
        self.interrupted = False

    @property
    def ok(self) -> bool:
        """Every check passed, and all were made."""
        return not self.interrupted and all(result.ok is not False for result in self.results)

    @torch.inference_mode()
    def run(self) -> None:
        """All stages; Ctrl-C ends it and keeps what there is."""
        stages = self._stages()
        try:
            for done, (name, stage) in enumerate(stages.items()):
                if self._on_progress is not None:
                    self._on_progress(Progress(f"testing {name}", done, len(stages), "stages"))
                self._stage(name, stage)
        except KeyboardInterrupt:
            self.interrupted = True

    def _stage(self, name: str, stage: Callable[[], Iterator[Result]]) -> None:
        """One that breaks off is a failed check; the others may still work."""
        try:
            for result in stage():
                self.results.append(result)
        except Exception as error:  # the device's own errors, in whatever class
            said = f"{type(error).__name__}: {first_line(error)}"
            self.results.append(Result(name, "broke off", False, said))

    def _stages(self) -> dict[str, Callable[[], Iterator[Result]]]:
        device, sizes = self.device, self.sizes
        config = _config(sizes.shape, sizes)
        stages: dict[str, Callable[[], Iterator[Result]]] = {
            "copies": lambda: rates.copies(device, sizes),
            "products": lambda: operators.products(device, sizes, config),
            "attention": lambda: operators.attention(device, sizes, config),
            "experts": lambda: operators.experts(device, sizes, config),
            "model": lambda: whole.models(device, sizes, _config("tiny", SMALL), config),
        }
        return {name: stage for name, stage in stages.items() if name in (self._only or stages)}


def _config(shape: str, sizes: Sizes) -> ModelConfig:
    """The first layers of a shape with fewer experts: a dense one first, sliding ones after it."""
    config = shape_config(sizes.layers, sizes.vocab, shape=shape)
    return dataclasses.replace(config, n_experts=min(sizes.experts, config.n_experts))


def device_of(name: str) -> torch.device:
    """The device to test; UsageError if torch cannot use it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch cannot use the device `{name}`: {first_line(error)}",
            hint="`mimo doctor` says what is missing",
        ) from None
    return device


def sizes_for(device: torch.device) -> Sizes:
    """The real shapes on an accelerator; small ones on the CPU, which would take an hour."""
    return REAL if is_accelerator(device) else SMALL
