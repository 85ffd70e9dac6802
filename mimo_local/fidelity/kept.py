"""What a measurement has done when it is stopped: a file from which the same one goes on.

Hidden states behind the last finished layer and the figures so far; 80 MB for the real model. A
file that cannot be written or read costs the time it would have saved, nothing else. Called by
`run`.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quant.measure import Loss
from quant.quality import loss_of, losses_to_json

EVERY_S = 60.0
"""Between two savings on the way: for a machine that stops without asking."""
_VERSION = 1


@dataclass(frozen=True)
class State:
    """How far both models are."""

    layers: int
    """Finished ones."""
    hidden: list[torch.Tensor]
    """(T, D) f32 of the pack and, if there is one, of the source."""
    drift: list[float] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    rest: bool = False
    """Whether the matrices outside the layers are among the losses."""


class Kept:
    """The file of one measurement."""

    def __init__(self, folder: Path | None, identity: list[object]) -> None:
        """`identity`: plain data that must be the same to go on; no folder: nothing is kept."""
        text = json.dumps([_VERSION, *identity], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.path = None if folder is None else folder / f"{key}.safetensors"
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """What was kept, if it is there and whole."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads(file.metadata()["state"])
                hidden = [file.get_tensor(f"hidden.{i}") for i in range(about["sides"])]
            losses = [loss_of(loss) for loss in about["losses"]]
            return State(about["layers"], hidden, about["drift"], losses, about["rest"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def save_now_and_then(self, state: State) -> None:
        """`save` unless it was done a moment ago."""
        if time.monotonic() - self._saved >= EVERY_S:
            self.save(state)

    def save(self, state: State) -> bool:
        """Keep it; False where it cannot be."""
        if self.path is None:
            return False
        about = {
            "layers": state.layers,
            "sides": len(state.hidden),
            "drift": state.drift,
            "losses": losses_to_json(state.losses),
            "rest": state.rest,
        }
        part = self.path.with_suffix(".part")
        tensors = {f"hidden.{i}": x.contiguous() for i, x in enumerate(state.hidden)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"state": json.dumps(about)})
            part.replace(self.path)
        except (OSError, SafetensorError):
            with suppress(OSError):
                part.unlink()
            return False
        self._saved = time.monotonic()
        return True

    def remove(self) -> None:
        """It is done: nothing to go on with."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()
