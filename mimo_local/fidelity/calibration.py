"""Calibration: what a model's experts are multiplied with, learnt from texts, a layer at a time.

The exact model reads the shipped calibration texts (others than those that measure) while it is
converted: before a layer's experts are stored, the rows of the texts go through that layer. What
must outlive a killed conversion lies in one file beside its journal. Called by the command line,
and through `quant.convert` by a conversion.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mimo_local.config import ModelConfig
from mimo_local.errors import CheckpointError, UsageError
from mimo_local.experts.passing import PassingStore
from mimo_local.fidelity.losses import layer_bytes
from mimo_local.fidelity.side import Side
from mimo_local.tokenizer import Tokenizer
from mimo_local.weights import CheckpointWeights, Expert, PackWeights
from quant.calibrated import Importance, importance_of, pack_nf4, upper_factor
from quant.checkpoint import Checkpoint
from quant.formats import BLOCK
from quant.inventory import expert_of
from quant.jobs import Job
from quant.writer import PART, writing

TEXTS = Path(__file__).parent / "calibration"
PIECE = 2048
"""Tokens read as one text: attention over all 12 000 at once would take longer than the rest."""
FILE = "calibration.safetensors"
Method = Literal["columns", "feedback"]
Tell = Callable[[int, str], None]


@dataclass
class _Heard:
    """What the experts of one layer were multiplied with."""

    layer: int
    moments: torch.Tensor
    """(D, D) f32 of the rows that go into all experts: X^T X."""
    inner: torch.Tensor
    """(E, I) f32: summed squares of what each expert's last matrix is multiplied with."""
    tokens: int
    """How many rows that were."""

    @cached_property
    def upper(self) -> torch.Tensor | None:
        return upper_factor(self.moments, self.tokens)

    def of(self, expert: int, part: str, method: Method) -> Importance | None:
        """For one matrix; None where nothing was heard that tells its columns apart."""
        if part == "down_proj":
            columns = importance_of(self.inner[expert])
            return None if columns is None else Importance(columns)
        columns = importance_of(self.moments.diagonal())
        if columns is None:
            return None
        return Importance(columns, self.upper if method == "feedback" else None)


class _Listener(PassingStore):
    """Notes what experts are multiplied with while it sweeps."""

    def __init__(self, weights: CheckpointWeights | PackWeights) -> None:
        super().__init__(weights, exact=True)
        self.heard: _Heard | None = None

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """As it is, and noted."""
        config = self.weights.config
        inner = torch.zeros(config.n_experts, config.moe_intermediate_size)
        self.heard = _Heard(layer, x.T @ x, inner, len(x))
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
        assert self.heard is not None
        rows, places = (ids == e).nonzero(as_tuple=True)
        mine, share = x[rows], w[rows, places, None]
        between = F.silu(expert.gate(mine)).mul_(expert.up(mine))
        self.heard.inner[e] = between.square().sum(0)
        out.index_add_(0, rows, expert.down(between).mul_(share))


class Calibration:
    """The pass over a checkpoint that is being converted into `folder`."""

    @classmethod
    def of_checkpoint(
        cls, source: Checkpoint, folder: Path, method: Method = "feedback", *,
        tokens: int | None = None,
    ) -> Calibration:  # fmt: skip
        """For a conversion into `folder`. UsageError where the checkpoint has no tokenizer."""
        weights = CheckpointWeights(source, ModelConfig.from_dir(source.path))
        return cls(weights, source.path, folder, method, tokens=tokens)

    def __init__(
        self, weights: CheckpointWeights | PackWeights, tokenizer: Path, folder: Path,
        method: Method = "feedback", *, tokens: int | None = None,
    ) -> None:  # fmt: skip
        """`tokenizer`: its folder; `folder`: of the pack; `tokens`: most of each shipped text."""
        self.method, self.path = method, folder / FILE
        self.weights = weights
        texts = texts_for(tokenizer, min(PIECE, self.weights.config.max_context), tokens)
        self.ids = torch.tensor([i for text in texts for i in text])
        self.side = Side(self.weights, [len(text) for text in texts], exact=True)
        self.listener = self.side.store = _Listener(self.weights)
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        self.identity: dict[str, Any] = {
            "method": method, "texts": digest, "tokens": len(self.ids),
        }  # fmt: skip
        self.sizes = {k: n for k, n in layer_bytes(self.weights).items() if k is not None}
        self.layers, self.hidden = 0, torch.empty(0)
        self.heard: _Heard | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the source it reads."""
        return sum(self.sizes.values())

    @property
    def room(self) -> int:
        """Bytes its file takes beside the pack while it is made, twice for a moment."""
        config = self.weights.config
        width = config.hidden_size
        inner = config.n_experts * config.moe_intermediate_size
        return 8 * (len(self.ids) * width + width * width + inner)

    def predicted_seconds(self) -> float:
        """About how long reading the texts and the slower rounding take, from small samples.

        A row of the texts meets attention and the weights of its experts; feedback multiplies each
        row of an expert's first two matrices with half of a D x D matrix, and rounds column after
        column. The disk is not counted: a conversion waits for it as well.
        """
        config = self.weights.config
        layers = sum(spec.mlp == "moe" for spec in config.layers)
        width, inner = config.hidden_size, config.moe_intermediate_size
        matrices, one = config.n_experts * layers, inner * width
        read = layers * (3 * one * config.experts_per_token + width**2)
        for spec in config.layers:
            values = (spec.heads + spec.kv_heads) * (spec.head_dim + spec.v_head_dim)
            read += width * (values + (0 if spec.mlp == "moe" else 3 * spec.intermediate))
        reading = 2.0 * len(self.ids) * read
        weighted = 3 * one * matrices / _rounding_rate(None)
        if self.method == "columns":
            return reading / _product_rate() + weighted
        fed = 2 * one * matrices / _rounding_rate(torch.eye(BLOCK))
        return (reading + 2.0 * inner * width**2 * matrices) / _product_rate() + weighted / 3 + fed

    def before(self, job: Job, tell: Tell) -> None:
        """Have heard what the job's experts are multiplied with; `tell` hears bytes and where."""
        if job.shapes is None or job.fmt != "nf4":
            return
        if self.layers == 0:
            self._load(tell)
        if self.layers == 0:
            self.hidden = self.side.embed(self.ids)
        while self.layers <= job.layer:
            self._through(self.layers, tell)
        if self.heard is None or self.heard.layer != job.layer:
            raise CheckpointError(
                f"layer {job.layer} is converted behind layer {self.layers - 1}",
                hint="this is a bug: calibration needs layers in their order; leave it out",
            )

    def of(self, name: str) -> Importance | None:
        """For one of the job's matrices; None: all columns alike."""
        place = expert_of(name)
        if place is None or self.heard is None or self.heard.layer != place[0]:
            return None
        return self.heard.of(place[1], place[2], self.method)

    def finish(self) -> None:
        """The pack is there: nothing to go on with."""
        self.path.unlink(missing_ok=True)

    def _through(self, index: int, tell: Tell) -> None:
        spec, size, told = self.weights.config.layers[index], self.sizes[index], 0

        def hear(share: float) -> None:
            nonlocal told
            now = int(share * size)
            tell(now - told, f"calibrating layer {index}")
            told = now

        hear(0.0)
        self.hidden, self.heard = self.side.through(spec, self.hidden, hear), None
        if not bool(self.hidden.isfinite().all()):
            raise CheckpointError(
                f"layer {index} gives NaN or infinity for the calibration texts",
                hint="the hub's checksums tell whether the checkpoint is damaged",
            )
        if spec.mlp == "moe":
            self.heard, self.listener.heard = self.listener.heard, None
        self.layers = index + 1
        self._save()
        tell(size - told, f"calibrating layer {index}")

    def _save(self) -> None:
        """Whole or not at all, before anything is made of it: a resumed run gives the same pack."""
        tensors = {"hidden": self.hidden.contiguous()}
        if self.heard is not None:
            tensors |= {"moments": self.heard.moments, "inner": self.heard.inner}
        about = {"layers": self.layers, "identity": self.identity}
        part = self.path.with_name(self.path.name + PART)
        with writing(self.path, 0, 0):
            with part.open("wb") as file:
                file.write(save(tensors, {"calibration": json.dumps(about, sort_keys=True)}))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)

    def _load(self, tell: Tell) -> None:
        """Go on behind the layer an earlier run came to, if its file is there and whole."""
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads(file.metadata()["calibration"])
                if about["identity"] != self.identity:
                    return
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers, hidden = int(about["layers"]), found["hidden"]
            wanted = (len(self.ids), self.weights.config.hidden_size)
            if not 0 < layers <= len(self.weights.config.layers) or hidden.shape != wanted:
                return
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return
        self.layers, self.hidden = layers, hidden
        with suppress(KeyError):
            self.heard = _Heard(layers - 1, found["moments"], found["inner"], len(hidden))
        for index in range(layers):
            tell(self.sizes[index], f"calibrating layer {index}")


def _product_rate() -> float:
    """Operations a second of torch's products here."""
    a, b = torch.ones(512, 1024), torch.ones(1024, 1024)
    return 2.0 * a.numel() * b.shape[1] / _quickest(lambda: a @ b)


def _rounding_rate(upper: torch.Tensor | None) -> float:
    """Weights a second of the weighted search, or of feedback within a block."""
    w = torch.randn(2048, BLOCK, generator=torch.Generator().manual_seed(0))
    known = Importance(torch.linspace(0.5, 1.5, BLOCK), upper)
    return w.numel() / _quickest(lambda: pack_nf4(w, known))


def _quickest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def texts_for(folder: Path, longest: int, most: int | None) -> list[list[int]]:
    """The shipped texts by the tokenizer in `folder`, in pieces of at most `longest` tokens."""
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json: the calibration texts cannot be read",
            hint="fetch it too, or leave out `--calibrate`",
        )
    tokenizer, pieces = Tokenizer.from_dir(folder), []
    for path in sorted(TEXTS.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))[:most]
        pieces += [ids[i : i + longest] for i in range(0, len(ids), longest)]
    return pieces
