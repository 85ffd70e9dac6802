"""Whether the FP8 scales of attention lie where this version thinks: what the codes tell of it.

Who quantised a block scaled it so that its largest weight has the largest code. Under the right
layout of scales (`fp8`) nearly every block of q, k and v therefore reaches it; under a wrong one,
blocks that lie across two tensors miss it. Knows no layers. Called by `convert`, before it writes
the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mimo_local.errors import CheckpointError
from quant.checkpoint import Checkpoint
from quant.fp8 import Fp8Rows

LARGEST = 0x7E
"""The code of 448 in E4M3, without its sign: codes grow with what they stand for."""
SURE = 0.98
"""Share of blocks that reach it where scales lie right; the rest are blocks of tiny weights."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one or more layers' q, k and v, those without weights not counted.

    `plain`: of q alone, right under every layout; `full` of them reach the largest code.
    `shared`: those that hold rows of k and v; `shared_full` of them reach it.
    """

    layers: int = 0
    plain: int = 0
    full: int = 0
    shared: int = 0
    shared_full: int = 0

    def __add__(self, other: Blocks) -> Blocks:
        mine, others = asdict(self), asdict(other)
        return Blocks(**{key: mine[key] + others[key] for key in mine})

    @property
    def tells(self) -> bool:
        """Whether these weights can tell at all: scales rounded to powers of two hide it."""
        return self.plain > 0 and self.full >= SURE * self.plain

    @property
    def fits(self) -> bool:
        """Whether blocks with rows of k and v are as full as those of q."""
        return self.shared_full >= SURE * self.shared


def look(checkpoint: Checkpoint, names: Iterable[str]) -> Blocks | None:
    """The blocks of these tensors whose layout is not plain; None where there are none.

    CheckpointError where the numbers contradict the layout.
    """
    found = None
    for q, k, v in checkpoint.sharded(names):
        blocks = _blocks(*(checkpoint.load(name) for name in (q, k, v)))
        if blocks.tells and not blocks.fits:
            raise CheckpointError(
                f"the FP8 scales of {k} and {v} are laid out in a way this version does not know: "
                f"{blocks.shared_full} of {blocks.shared} blocks reach the largest code, "
                f"of q's own {blocks.full} of {blocks.plain}",
                hint="report this with the checkpoint's name: weights read so would be wrong",
            )
        found = blocks if found is None else found + blocks
    return found


def _blocks(*stored: torch.Tensor | Fp8Rows) -> Blocks:
    q, k, v = (part for part in stored if isinstance(part, Fp8Rows))
    most = torch.zeros(q.grid.shape, dtype=torch.int16)
    for part in (q, k, v):
        rows, cols = part.shape
        codes = part.codes.view(torch.uint8) & 0x7F
        codes = torch.nn.functional.pad(codes, (0, -cols % part.block))
        largest = codes.view(rows, -1, part.block).amax(2).short()
        index = part.row_of.long().unsqueeze(1).expand_as(largest)
        most.scatter_reduce_(0, index, largest, "amax")
    shared = torch.zeros(len(most), dtype=torch.bool)
    shared[torch.cat([k.row_of, v.row_of]).long()] = True
    alive, full = most > 0, most == LARGEST
    return Blocks(
        1, int(alive[~shared].sum()), int(full[~shared].sum()),
        int(alive[shared].sum()), int(full[shared].sum()),
    )  # fmt: skip


def summary(records: Iterable[Mapping[str, Any]]) -> dict[str, int] | None:
    """All layers' blocks out of a conversion's records, as plain data for the manifest."""
    found = [Blocks(**record["layout"]) for record in records if "layout" in record]
    return asdict(sum(found, Blocks())) if found else None


def told(data: Mapping[str, int]) -> str:
    """The manifest's blocks in one line for people."""
    blocks = Blocks(**data)
    if not blocks.tells:
        return (
            f"whether the FP8 scales of {blocks.layers} layers' k and v lie as expected could not "
            "be checked: blocks of q do not reach the largest code either"
        )
    return (
        f"the FP8 scales of {blocks.layers} layers' k and v lie as expected: "
        f"{blocks.shared_full} of {blocks.shared} blocks reach the largest code"
    )
