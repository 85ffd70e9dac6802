"""The demo model's MTP layers as shipped: INT8 codes of three small layers trained to draft for it.

Trained by bench/train_demo_drafter.py on the windowed variant's own hidden states and of no use to
another. Queries and keys are stored without the dimensions that the rewrite pads with zeros. Knows
neither the rewrite nor packs. Called by mimo_local.demo.rewrite for the shipped variant only.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from mimo_local.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from mimo_local.demo.source import LlamaShape

FILE = "drafter.safetensors"
NORMS = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
_MATRICES = {
    "eh": "eh_proj",
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_HINT = "The demo's MTP layers belong to SmolLM2-135M-Instruct; reinstall mimo-local."


@cache
def _table() -> dict[str, torch.Tensor]:
    """`layers.K.PART.codes` (N, K) int8 and `.scales` (N,) f32 for eh, q, k, v, o, gate, up, down;
    `layers.K.NORM` (H,) f32. Empty where the file is not installed."""
    from safetensors import safe_open

    with resources.as_file(resources.files("mimo_local") / "demo_data" / FILE) as path:
        if not path.is_file():
            return {}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def n_layers() -> int:
    """How many MTP layers there are to put into a pack: 0 without the file."""
    return sum(name.endswith(".eh.codes") for name in _table())


def mtp_tensors(
    shape: LlamaShape, *, wide: int, value_scale: float, sink: float
) -> dict[str, torch.Tensor]:
    """All MTP tensors by hub name, float32, in the sliding layers' geometry; ConfigError.

    `wide`: dimensions of a query or key head with its padding; queries grow with its square root as
    in the main layers, values are divided by `value_scale`, every sink is `sink`. Each row is an
    INT8 row times one number, so packing it as INT8 finds the same codes.
    """
    import torch

    d, out = shape.head_dim, dict[str, torch.Tensor]()
    for layer in range(n_layers()):
        at = f"layers.{layer}."
        w = {part: _matrix(f"{at}{part}") for part in _MATRICES}
        if w["eh"].shape != (shape.hidden, 2 * shape.hidden) or w["q"].shape[0] % d:
            raise ConfigError("the shipped MTP layers are another model's", hint=_HINT)
        w["q"] = _padded(w["q"] * math.sqrt(wide / d), d, wide)
        w["k"] = _padded(w["k"], d, wide)
        w["v"] = w["v"] / value_scale
        prefix = f"model.mtp.{at}"
        out |= {f"{prefix}{_MATRICES[part]}.weight": weight for part, weight in w.items()}
        out |= {f"{prefix}{norm}.weight": _table()[f"{at}{norm}"] for norm in NORMS}
        out[f"{prefix}self_attn.attention_sink_bias"] = torch.full((w["q"].shape[0] // wide,), sink)
    return out


def _matrix(name: str) -> torch.Tensor:
    table = _table()
    return table[f"{name}.codes"].float() * table[f"{name}.scales"][:, None]


def _padded(rows: torch.Tensor, d: int, wide: int) -> torch.Tensor:
    """rows (heads x d, H) -> (heads x wide, H): zeros after each head's own."""
    heads, hidden = rows.shape[0] // d, rows.shape[1]
    out = rows.new_zeros(heads, wide, hidden)
    out[:, :d] = rows.view(heads, d, hidden)
    return out.view(-1, hidden)
