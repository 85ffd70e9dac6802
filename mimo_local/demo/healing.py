"""What the demo model had to learn to live with a window, as shipped: sinks and small corrections.

One sink per windowed layer and original head, and for every layer a low-rank correction of the
attention's projections (W + up @ down). Trained by bench/train_demo_window.py; knows neither the
rewrite nor packs. Called by mimo_local.demo.rewrite for the shipped variant only.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from mimo_local.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mimo_local.demo.source import LlamaShape, Source

FILE = "window.safetensors"
_HINT = "The demo's corrections belong to SmolLM2-135M-Instruct; reinstall mimo-local."


@cache
def _table() -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
    """(windowed layers, tensors): `sinks` (layers, heads) f32, `layers.N.qkv.down` (R, hidden),
    `layers.N.qkv.up` (q + k + v rows, R), `layers.N.o.down`, `layers.N.o.up`, all f16."""
    from safetensors import safe_open

    with (
        resources.as_file(resources.files("mimo_local") / "demo_data" / FILE) as path,
        safe_open(path, framework="pt") as file,
    ):
        layers = json.loads(file.metadata()["windowed_layers"])
        return tuple(layers), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def trained_sinks(shape: LlamaShape, windowed: list[int]) -> dict[int, list[float]]:
    """Layer -> one trained sink per original head; ConfigError if they are another model's."""
    layers, tensors = _table()
    sinks = tensors["sinks"]
    if list(layers) != windowed or sinks.shape != (len(layers), shape.heads):
        raise ConfigError(
            f"the shipped sinks are for layers {list(layers)}, the model slides in {windowed}",
            hint=_HINT,
        )
    return dict(zip(layers, sinks.tolist(), strict=True))


class Healed:
    """A source whose attention projections carry the shipped corrections."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shape: LlamaShape = source.shape
        shape, tensors = self.shape, _table()[1]
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        last = f"layers.{shape.layers - 1}.qkv"
        if (
            f"{last}.up" not in tensors
            or f"layers.{shape.layers}.qkv.up" in tensors
            or tensors[f"{last}.up"].shape[0] != rows
            or tensors[f"{last}.down"].shape[1] != shape.hidden
        ):
            raise ConfigError("the shipped corrections are another model's", hint=_HINT)

    def tensor(self, name: str) -> torch.Tensor:
        """The source's weight, float32; plus its correction for q, k, v and o."""
        weight = self._source.tensor(name)
        part = name.removesuffix("_proj.weight").rpartition("self_attn.")[2]
        if part not in ("q", "k", "v", "o"):
            return weight
        layer = name.split(".")[2]
        joint = "o" if part == "o" else "qkv"
        table = _table()[1]
        down = table[f"layers.{layer}.{joint}.down"].float()
        up = table[f"layers.{layer}.{joint}.up"].float()
        shape = self.shape
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        start = {"q": 0, "k": q, "v": q + kv, "o": 0}[part]
        return weight + up[start : start + weight.shape[0]] @ down

    def tokenizer_files(self) -> dict[str, str]:
        """The source's own."""
        return self._source.tokenizer_files()
