"""Slices of the real model's shapes, and how near they run to this machine's limits.

`real_shape_model` makes a Model of random packed weights: the true shapes, formats and code paths,
no download. Knows no terminal. Called by `mimo bench --shape` and by bench/vs_llamacpp.py.
"""

from __future__ import annotations

from mimo_local.errors import NotEnoughMemoryError
from mimo_local.experts import ExpertStore, available_memory
from mimo_local.model import Model
from mimo_local.random_weights import RandomWeights, shape_config
from mimo_local.sizes import gb
from mimo_local.weights import OnProgress


def real_shape_model(
    layers: int,
    vocab: int,
    experts: str = "nf4",
    rest: str = "int8",
    *,
    shape: str = "real",
    on_progress: OnProgress | None = None,
) -> Model:
    """The first `layers` layers of the real model with random weights, in seconds.

    `experts`: nf4, mxfp4 or int8; `rest` (attention, dense, head): int8, nf4 or bf16. `shape`:
    "real", or "tiny" for tests. Raises UsageError and NotEnoughMemoryError.
    """
    weights = RandomWeights(shape_config(layers, vocab, shape=shape), experts=experts, rest=rest)
    return build(weights, on_progress=on_progress)[0]


def build(
    weights: RandomWeights, *, spare: int = 0, on_progress: OnProgress | None = None
) -> tuple[Model, ExpertStore]:
    """(model, its experts), after a look at the memory: `spare` bytes must be left besides."""
    need, free = weights.nbytes + spare, available_memory()
    if need > free:
        raise NotEnoughMemoryError(
            f"{weights.config.n_layers} layers and the measurement take {gb(need)} of memory and "
            f"{gb(free)} are free",
            hint="measure fewer layers with `--layers`, or close other programs",
        )
    store = ExpertStore(weights, on_progress=on_progress)
    return Model(weights, store, on_progress=on_progress), store
