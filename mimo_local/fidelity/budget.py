"""A budget of bits: which layers' experts get 8 instead of 4, by what 4 bits cost their outputs.

The exact model reads a little of the calibration texts; at every layer the experts are rounded
beside it and what that adds to the hidden states is measured. Layers that lose most for their bytes
are widened first. The same source and budget give the same choice. Called by the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mimo_local.config import ModelConfig
from mimo_local.errors import CheckpointError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.passing import PassingStore
from mimo_local.experts.store import apply
from mimo_local.fidelity.calibration import texts_for
from mimo_local.fidelity.losses import layer_bytes
from mimo_local.fidelity.side import Side
from mimo_local.weights import CheckpointWeights, Expert, OnProgress, PackWeights, QuantLinear
from quant.checkpoint import Checkpoint
from quant.convert import checked_jobs
from quant.formats import Format, get_format
from quant.pack import JOURNAL
from quant.recipe import WIDE, Recipe
from quant.writer import MANIFEST

TOKENS = 64
"""Of each calibration text: a layer's loss is a sum over all its experts' outputs."""


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """One layer's experts at the narrow format."""

    layer: int
    loss: float
    """What rounding them adds to the hidden states behind the layer, relative RMS."""
    more: int
    """Bytes that widening them would add."""


class _Prober(PassingStore):
    """Runs every expert twice: as it is, and rounded; keeps the difference."""

    def __init__(self, weights: CheckpointWeights | PackWeights, fmt: Format) -> None:
        super().__init__(weights, exact=True)
        self.format, self.lost = fmt, torch.empty(0)

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """The exact sum; `lost` is what rounding would add to it."""
        self.lost = torch.zeros_like(x)
        return super().sweep(layer, x, ids, w, cancel=cancel)

    def _add(
        self,
        out: torch.Tensor,
        expert: Expert,
        e: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
    ) -> None:
        rows, places = (ids == e).nonzero(as_tuple=True)
        share, mine = w[rows, places, None], x[rows]
        exact = apply(expert, mine)
        rounded = Expert(*(self._rounded(m) for m in (expert.gate, expert.up, expert.down)))
        out.index_add_(0, rows, exact * share)
        self.lost.index_add_(0, rows, apply(rounded, mine).sub_(exact).mul_(share))

    def _rounded(self, linear: QuantLinear) -> QuantLinear:
        parts = self.format.pack(linear.format.unpack(linear.parts))
        values = {"weight": self.format.unpack(parts)}  # exact products, whatever the rows
        return QuantLinear(get_format("f32"), values, linear.rows, linear.cols)


def probe(source: Checkpoint, recipe: Recipe, told: OnProgress | None = None) -> list[LayerLoss]:
    """Every mixture layer's loss, in the order of the layers. CheckpointError for NaN."""
    weights, wide = CheckpointWeights(source, ModelConfig.from_dir(source.path)), get_format(WIDE)
    found = weigh(weights, source.path, get_format(recipe.experts), told)
    losses = []
    for job in checked_jobs(source, recipe):
        if job.shapes is not None:
            narrow, shapes = get_format(job.fmt), job.shapes.values()
            more = sum(wide.nbytes(*shape) - narrow.nbytes(*shape) for shape in shapes)
            losses.append(LayerLoss(job.layer, found[job.layer], more * job.count))
    return losses


def weigh(
    weights: CheckpointWeights | PackWeights, tokenizer: Path, fmt: Format,
    told: OnProgress | None = None,
) -> dict[int, float]:  # fmt: skip
    """`LayerLoss.loss` of every mixture layer with experts rounded to `fmt`."""
    texts = texts_for(tokenizer, TOKENS, TOKENS)
    side = Side(weights, [len(text) for text in texts], exact=True)
    prober = side.store = _Prober(weights, fmt)
    sizes, done, found = layer_bytes(weights), 0, {}
    total = sum(n for layer, n in sizes.items() if layer is not None)
    x = side.embed(torch.tensor([i for text in texts for i in text]))
    for spec in weights.config.layers:
        size, before = sizes[spec.index], done
        stage = f"weighing layer {spec.index}"

        def tell(share: float, size: int = size, before: int = before, at: str = stage) -> None:
            if told is not None:
                told(Progress(at, before + int(share * size), total))

        x = side.through(spec, x, tell)
        done += size
        if spec.mlp != "moe":
            continue
        loss = float(prober.lost.double().norm() / x.double().norm())
        if not loss < float("inf"):
            raise CheckpointError(
                f"layer {spec.index} gives NaN or infinity for the calibration texts",
                hint="the hub's checksums tell whether the checkpoint is damaged",
            )
        found[spec.index] = float(f"{loss:.4g}")
    return found


def mean_bits(source: Checkpoint, recipe: Recipe) -> float:
    """Bits a weight on average, over all tensors of the pack."""
    stored = [job.stored() for job in checked_jobs(source, recipe)]
    return 8 * sum(nbytes for nbytes, _ in stored) / sum(weights for _, weights in stored)


def check(source: Checkpoint, recipe: Recipe, bits: float) -> None:
    """UsageError for a budget below what the recipe takes anyway."""
    least = mean_bits(source, recipe)
    if not least <= bits <= 16:
        raise UsageError(
            f"--bits {bits:g} cannot be kept: this recipe takes {least:.4f} bits a weight",
            hint=f"give {least + 0.05:.1f} to 16, or narrower formats with --attention, --head ...",
        )


def spend(source: Checkpoint, recipe: Recipe, bits: float, losses: list[LayerLoss]) -> Recipe:
    """The recipe with as many layers widened as the budget allows, most loss per byte first."""
    stored = [job.stored() for job in checked_jobs(source, recipe)]
    room = bits * sum(weights for _, weights in stored) / 8 - sum(nbytes for nbytes, _ in stored)
    wide = []
    for loss in sorted(losses, key=lambda each: (-(each.loss**2) / max(each.more, 1), each.layer)):
        if 0 < loss.more <= room:
            wide.append(loss.layer)
            room -= loss.more
    return replace(recipe, bits=bits, wide=tuple(sorted(wide)))


def chosen_before(target: Path, recipe: Recipe, bits: float) -> Recipe | None:
    """What an earlier run into the same folder chose for the same wish; None if it did not."""
    for name in (MANIFEST, JOURNAL):
        try:
            text = (target / name).read_text(encoding="utf-8")
            found = json.loads(text if name == MANIFEST else text.splitlines()[0])["recipe"]
            wide = tuple(int(layer) for layer in found["wide"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        same = replace(recipe, bits=bits, wide=wide)
        if found == same.to_json():
            return same
    return None
