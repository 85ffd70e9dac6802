"""A pack measured: its weights against the source's, then both models reading the same texts.

Layer by layer: the hidden states of both go through layer i before layer i + 1 is opened, so memory
holds a layer's attention, a few experts and the rows of the texts, whatever the model's size. What
is done is kept when it is stopped. Called by the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from mimo_local import kernels
from mimo_local.config import ModelConfig
from mimo_local.errors import (
    CancelledError,
    DiskSpaceError,
    ModelFilesError,
    PackError,
    UsageError,
)
from mimo_local.events import Progress
from mimo_local.fidelity.kept import Kept, State
from mimo_local.fidelity.losses import layer_bytes, losses_of
from mimo_local.fidelity.scores import Scores
from mimo_local.fidelity.side import Side
from mimo_local.tokenizer import Tokenizer
from mimo_local.weights import CheckpointWeights, OnProgress, PackWeights, open_weights
from quant import quality
from quant.measure import Sums
from quant.pack import Pack
from quant.quality import Reading, Report, method_of

ITS_OWN = "its checkpoint"
TEXTS = Path(__file__).parent / "texts"
Source: TypeAlias = PackWeights | CheckpointWeights


@dataclass(frozen=True, slots=True)
class Ids:
    """Texts by name as tokens, all rows one after the other."""

    names: list[str]
    texts: list[list[int]]

    @classmethod
    def read(cls, folder: Path, file: Path | None, most: int | None, longest: int) -> Ids:
        """The shipped texts or a file by the tokenizer in `folder`, each cut to `most` tokens."""
        tokenizer = Tokenizer.from_dir(folder)
        paths = sorted(TEXTS.glob("*.txt")) if file is None else [file]
        texts = []
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(
                    f"cannot read `{path}`: {error}", hint="give a plain text file in UTF-8"
                ) from error
            texts.append(tokenizer.encode(text)[: min(most or longest, longest)])
            if len(texts[-1]) < 2:
                raise UsageError(
                    f"`{path.name}` has fewer than two tokens to read",
                    hint="give a longer text, or more --tokens",
                )
        return cls([path.stem for path in paths], texts)

    @property
    def lengths(self) -> list[int]:
        """Rows of each text."""
        return [len(text) for text in self.texts]

    @property
    def rows(self) -> torch.Tensor:
        """(T,) int64."""
        return torch.tensor([i for text in self.texts for i in text])

    def predictions(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, slice]]:
        """Rows that predict a token, the tokens, and which of these belong to which text."""
        rows: list[int] = []
        targets: list[int] = []
        spans: dict[str, slice] = {}
        first = 0
        for name, text in zip(self.names, self.texts, strict=True):
            n = len(text)
            spans[name] = slice(len(rows), len(rows) + n - 1)
            rows += range(first, first + n - 1)
            targets += text[1:]
            first += n
        spans["all"] = slice(0, len(rows))
        return torch.tensor(rows), torch.tensor(targets), spans


@dataclass
class _Meter:
    """Bytes of both models that were gone through."""

    total: int
    on_progress: OnProgress | None
    done: int = 0
    stage: str = field(default="measuring", init=False)

    def part(self, stage: str, nbytes: int) -> Callable[[float], None]:
        """A callback for the part of these bytes that is done."""
        self.stage = stage
        return lambda share: self.tell(self.done + int(share * nbytes))

    def tell(self, done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(self.stage, done, self.total))

    def finished(self, nbytes: int) -> None:
        self.done += nbytes
        self.tell(self.done)


def measure(
    pack: Path,
    source: Path | None = None,
    *,
    text: Path | None = None,
    tokens: int | None = None,
    keep: Path | None = None,
    on_progress: OnProgress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """The pack's report, with a new reading of the texts.

    It is written into the pack's folder, but a reading of other texts or of fewer tokens is not,
    nor one beside nothing or something else over one beside the pack's own checkpoint; `note` is
    told if it cannot be.

    `source`: the checkpoint it was made of, or another pack; without one the pack reads alone.
    `text`: instead of the shipped ones; `tokens`: most of each text. `keep`: folder for what was
    done when it is stopped (KeyboardInterrupt), from where the same call goes on. Raises
    CancelledError, UsageError and what opening the models raises.
    """
    weights, exact = open_weights(pack), None if source is None else open_weights(source)
    if not isinstance(weights, PackWeights):
        raise UsageError(f"`{pack}` is no pack", hint="`mimo quantize` makes one of a checkpoint")
    if exact is not None:
        _check_alike(weights.config, exact.config)
    ids = Ids.read(pack, text, tokens, weights.config.max_context)
    report = quality.read(weights.pack) or Report([], method=method_of(weights.pack.manifest))
    kept = Kept(keep, _identity(weights, exact, ids))
    job = _Job(weights, exact, ids, kept.load(), known=bool(report.losses), told=on_progress)
    try:
        reading = job.run(kept)
    except KeyboardInterrupt:
        raise _stopped(kept, job.state) from None
    kept.remove()
    found = Report(report.losses or job.state.losses, reading, report.method)
    full = text is None and tokens is None
    try:
        _write(weights, report, found, full=full)
    except (PackError, DiskSpaceError) as error:  # minutes of work are not lost with it
        note(f"the report was not written into the pack: {error}")
    return found


def _write(weights: PackWeights, old: Report, found: Report, *, full: bool) -> None:
    """Put into the pack's folder what is worth more than what is there."""
    new, before = found.reading, old.reading
    its_own = new is not None and new.source == ITS_OWN
    losses = found.losses if its_own else old.losses
    keep = before if not full or _worth(new) < _worth(before) else new
    report = Report(losses, keep, old.method)
    if report != old:
        quality.write(weights.pack, report)


def _worth(reading: Reading | None) -> int:
    """Beside the pack's own checkpoint a reading says most."""
    if reading is None or reading.source is None:
        return int(reading is not None)
    return 3 if reading.source == ITS_OWN else 2


def _stopped(kept: Kept, state: State) -> CancelledError:
    where = f"{state.layers} layers were read"
    if kept.save(state):
        return CancelledError(
            f"the measurement was stopped; {where}", hint="run the same command again to go on"
        )
    return CancelledError(
        f"the measurement was stopped; {where}", hint="run it again from the start"
    )


class _Job:
    """Both models on their way through the layers."""

    def __init__(
        self, weights: PackWeights, exact: Source | None, ids: Ids, state: State | None, *,
        known: bool, told: OnProgress | None,
    ) -> None:  # fmt: skip
        """`known`: the errors of the weights are known already."""
        self.ids, self.known = ids, known
        self.weights, self.exact = weights, exact
        self.sides = [Side(weights, ids.lengths, exact=False)]
        if exact is not None:
            self.sides.append(Side(exact, ids.lengths, exact=True))
        self.bytes = [layer_bytes(side.weights) for side in self.sides]
        self.meter = _Meter(sum(sum(sizes.values()) for sizes in self.bytes), told)
        self.state = state or State(0, [side.embed(ids.rows) for side in self.sides])

    def run(self, kept: Kept) -> Reading:
        """Through the layers that are left, then the heads."""
        for spec in self.weights.config.layers:
            size = sum(sizes.get(spec.index, 0) for sizes in self.bytes)
            if spec.index >= self.state.layers:
                self._layer(spec.index)
                kept.save_now_and_then(self.state)
            else:
                self.meter.done += size
        if self.exact is not None and not self.known and not self.state.rest:
            self.state = dataclasses.replace(
                self.state, rest=True,
                losses=self.state.losses + losses_of(self.weights, self.exact, None),
            )  # fmt: skip
        return self._reading()

    def _layer(self, index: int) -> None:
        """One layer of each model; the state changes at its end."""
        spec, stage = self.weights.config.layers[index], f"measuring layer {index}"
        hidden, losses = [], self.state.losses
        if self.exact is not None and not self.known:
            losses = losses + losses_of(self.weights, self.exact, index)
        for side, sizes, x in zip(self.sides, self.bytes, self.state.hidden, strict=True):
            size = sizes.get(index, 0)
            hidden.append(side.through(spec, x, self.meter.part(stage, size)))
            self.meter.finished(size)
        drift = self.state.drift
        if len(hidden) == 2:
            drift = [*drift, float(f"{Sums.of(hidden[1], hidden[0]).rms:.6g}")]
        self.state = State(index + 1, hidden, drift, losses)

    def _reading(self) -> Reading:
        rows, targets, spans = self.ids.predictions()
        left = self.meter.total - self.meter.done
        tell = self.meter.part("measuring the head", left)
        scores = Scores(targets, two=self.exact is not None)
        normed = [s.normed(x[rows]) for s, x in zip(self.sides, self.state.hidden, strict=True)]
        blocks = [side.logits(x) for side, x in zip(self.sides, normed, strict=True)]
        seen, vocabulary = 0, self.weights.config.vocab_size
        for logits in zip(*blocks, strict=True):
            scores.add(logits[0], logits[1] if len(logits) == 2 else None)
            seen += logits[0].shape[1]
            tell(seen / vocabulary)
        broken = scores.broken()
        if broken is not None:
            raise ModelFilesError(
                f"the {broken} gives NaN or infinity for the texts",
                hint="`mimo verify` checks a pack, the hub's checksums a checkpoint",
            )
        return Reading(
            kernels.describe(), _kind(self.weights, self.exact),
            {name: scores.figures(span) for name, span in spans.items()}, self.state.drift,
        )  # fmt: skip


def _kind(weights: PackWeights, exact: Source | None) -> str | None:
    """What the pack was held against."""
    if exact is None:
        return None
    if isinstance(exact, PackWeights):
        return "another pack"
    made_of = weights.pack.manifest["source"]["fingerprint"]
    return ITS_OWN if exact.checkpoint.fingerprint() == made_of else "another checkpoint"


def _check_alike(one: ModelConfig, other: ModelConfig) -> None:
    """Refuse two models whose hidden states cannot be compared."""

    def shape(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(
            config, n_mtp_layers=0, mtp_layer=None, max_context=0, eos_ids=(), model_type=""
        )

    if shape(one) != shape(other):
        raise UsageError(
            "the pack and the source are not of one model: their configs differ",
            hint="give the checkpoint the pack was made of",
        )


def _identity(weights: PackWeights, exact: Source | None, ids: Ids) -> list[object]:
    """What must be the same for a stopped measurement to go on."""
    found = [weights.pack.manifest["manifest_sha256"], kernels.describe(), ids.texts]
    if isinstance(exact, PackWeights):
        found.append(exact.pack.manifest["manifest_sha256"])
    elif exact is not None:
        found.append(exact.checkpoint.fingerprint())
    return found


def stored_report(path: Path) -> Report | None:
    """What is known about a pack without measuring anything."""
    with Pack.open(path) as pack:
        return quality.read(pack)
