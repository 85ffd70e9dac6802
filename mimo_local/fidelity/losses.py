"""What the weights of a pack lost, layer by layer, against a source that lies beside it.

For packs that do not know: made by an older version, or held against another source. Called by
`run`; a conversion measures by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from mimo_local.weights import EXPERT_PARTS, CheckpointWeights, Expert, PackWeights, QuantLinear
from quant.inventory import expert_name, layer_of
from quant.measure import Loss, Sums, Tally, sampled

Rows: TypeAlias = Callable[[slice], torch.Tensor]


def losses_of(
    pack: PackWeights, source: PackWeights | CheckpointWeights, layer: int | None
) -> list[Loss]:
    """Of one layer's matrices; None: of those outside the layers. What the source lacks is left."""
    tally = Tally()
    for name, entry in pack.pack.tensors.items():
        if layer_of(name) != layer or len(entry.shape) != 2 or not source.has(name):
            continue
        _add(tally, name, pack.linear(name), _exact(source, name))
    if layer is not None and layer in pack.pack.expert_layers:
        for e in range(pack.config.n_experts):
            for part, stored, exact in _expert(pack.expert(layer, e), source, layer, e):
                _add(tally, expert_name(layer, e, part), stored, exact)
    return tally.take()


def _add(tally: Tally, name: str, stored: QuantLinear, exact: Rows) -> None:
    for rows, times in sampled(stored.rows):
        kept = stored.format.unpack({key: part[rows] for key, part in stored.parts.items()})
        tally.put(name, stored.format.name, Sums.of(exact(rows), kept), times)


def _exact(source: PackWeights | CheckpointWeights, name: str) -> Rows:
    """The source's rows of a matrix, float32."""
    if isinstance(source, CheckpointWeights):
        return lambda rows: source.checkpoint.read(name, rows)
    return _rows_of(source.linear(name))


def _rows_of(linear: QuantLinear) -> Rows:
    return lambda rows: linear.format.unpack({k: part[rows] for k, part in linear.parts.items()})


def _expert(
    stored: Expert, source: PackWeights | CheckpointWeights, layer: int, e: int
) -> Iterator[tuple[str, QuantLinear, Rows]]:
    """(part, the pack's matrix, the source's rows) of one expert."""
    other = source.expert(layer, e) if isinstance(source, PackWeights) else None
    for part in EXPERT_PARTS:
        mine = part.removesuffix("_proj")
        if other is not None:
            exact = _rows_of(getattr(other, mine))
        else:
            exact = _exact(source, expert_name(layer, e, part))
        yield part, getattr(stored, mine), exact


def layer_bytes(weights: PackWeights | CheckpointWeights) -> dict[int | None, int]:
    """Stored bytes of each layer; None: of embedding and head. MTP layers are not read."""
    sizes: dict[int | None, int] = {}
    if isinstance(weights, CheckpointWeights):
        named = [(n, weights.checkpoint.stored_bytes(n)) for n in weights.checkpoint.names()]
    else:
        named = [(name, entry.nbytes) for name, entry in weights.pack.tensors.items()]
        for layer in weights.pack.expert_layers:
            layout = weights.pack.expert_layout(layer)
            sizes[layer] = layout.stride * layout.count
    for name, nbytes in named:
        if ".mtp." not in name:
            sizes[layer_of(name)] = sizes.get(layer_of(name), 0) + nbytes
    return sizes
