"""Which store a model gets: all experts in RAM where they fit, else tiers."""

from __future__ import annotations

from mimo_local.errors import NotEnoughMemoryError
from mimo_local.experts.memory import available_memory, reserve
from mimo_local.experts.store import ExpertStore
from mimo_local.experts.tiered import TieredStore
from mimo_local.settings import Prefetch
from mimo_local.sizes import gb
from mimo_local.weights import OnProgress, PackWeights, Weights


def open_store(
    weights: Weights,
    *,
    ram: int | None = None,
    spare: int = 0,
    elsewhere: int = 0,
    prefetch: Prefetch = "auto",
    on_progress: OnProgress | None = None,
) -> ExpertStore | TieredStore:
    """The experts of `weights`, loaded whole if that fits.

    `ram`: most bytes of memory for the whole model, None: what is free but for a reserve; `spare`:
    bytes of that for caches and activations; `elsewhere`: bytes of the model that lie on a device
    instead, experts not counted. Raises NotEnoughMemoryError: a checkpoint's experts
    have to fit whole, a pack needs memory for the rest and a few experts.
    """
    rest = weights.nbytes - weights.expert_nbytes - elsewhere
    room = available_memory() - reserve() - rest - spare
    if ram is not None:
        room = min(room, ram - rest - spare)
    if not weights.config.is_moe or weights.expert_nbytes <= room:
        return ExpertStore(weights, on_progress=on_progress)
    if isinstance(weights, PackWeights):
        if room < 0:
            raise NotEnoughMemoryError(
                f"{gb(-room)} of memory are missing before the first expert",
                hint="close other programs, use a smaller --context, or a pack with "
                "`--attention nf4 --dense nf4 --head nf4`; see `mimo plan`",
            )
        return TieredStore(weights, room, prefetch=prefetch)
    if ram is not None and weights.expert_nbytes > ram - rest - spare:
        raise NotEnoughMemoryError(
            f"the experts of a checkpoint have to fit into memory: {gb(weights.expert_nbytes)}, "
            f"and {gb(max(0, ram - rest - spare))} are allowed",
            hint="make a pack with `mimo quantize`: its experts may stay on disk",
        )
    return ExpertStore(weights, on_progress=on_progress)
