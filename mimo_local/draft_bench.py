"""What drafting wins: answers without drafts, with 1, 2, 3 always, and as the controller decides.

Depths take turns over the same prompts, so that a slow minute falls on all of them. Either a real
model drafts and answers, or layers that stand for it are told what to answer: `Script` says which
ids come, and `Oracle` guesses them with a set chance, after as long as drafting would take. Token
ids of a script follow each other like states of a slow process, so that neighbours share experts.
Knows no terminal. Called by `mimo bench --draft` and bench/drafting.py.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from mimo_local.cache import KVCache
from mimo_local.config import ModelConfig
from mimo_local.draft_control import DraftController
from mimo_local.errors import UsageError
from mimo_local.events import DraftFigures, Progress
from mimo_local.generate import Drafting, generate
from mimo_local.model import Model, Segment
from mimo_local.ops import threads_for
from mimo_local.sampler import SamplingParams
from mimo_local.sizes import PackSizes
from mimo_local.weights import Embedding, QuantLinear
from quant.formats import get_format

AUTO: Final = "auto"
SEED: Final = 20251217


class Drafts(Protocol):
    """A `Drafter`, or something that stands for one."""

    @property
    def layers(self) -> Sequence[Any]:
        """One for each step."""

    def drafts(self, cache: KVCache, ids: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Guesses for the ids after `ids`, and their probabilities."""


@dataclass
class Depth:
    """All runs of one depth."""

    name: str
    """`off`, `1`, `2`, `3`, `auto`."""
    token_s: list[float] = field(default_factory=list)
    """Seconds per token of each run, the first token left out."""
    by_drafts: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    disk_bytes: int = 0
    tokens: int = 0
    note: str = ""

    def add(self, figures: DraftFigures) -> None:
        """One more run."""
        for name in ("by_drafts", "judged", "accepted"):
            mine, more = getattr(self, name), getattr(figures, name)
            mine += [0] * (len(more) - len(mine))
            for i, n in enumerate(more):
                mine[i] += n

    @property
    def tokens_per_pass(self) -> float:
        """Tokens a pass of the model gave."""
        passes = sum(self.by_drafts)
        return 1 + sum(self.accepted) / passes if passes else 1.0

    @property
    def rates(self) -> list[float]:
        """Of each step, how often its draft was right if those before it were."""
        return [a / n for a, n in zip(self.accepted, self.judged, strict=True) if n]

    def to_dict(self, base: Depth) -> dict[str, Any]:
        """Plain data; `speedup` is over `base`, run by run."""
        ratios = [b / a for a, b in zip(self.token_s, base.token_s, strict=True)]
        return asdict(self) | {
            "tokens_per_s": 1 / statistics.median(self.token_s),
            "speedup": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
            "tokens_per_pass": self.tokens_per_pass,
            "acceptance": self.rates,
        }


class DraftBench:
    """One model, one drafter, all depths."""

    def __init__(
        self,
        model: Model,
        drafter: Drafts,
        new_cache: Callable[[], KVCache],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        stop_ids: Sequence[int] = (),
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """`new_cache`: one with `draft`, as the engine makes it."""
        self.model, self.drafter, self.new_cache = model, drafter, new_cache
        self.prompts, self.params, self.stop_ids = prompts, params, stop_ids
        self.on_progress = on_progress
        most = len(drafter.layers)
        self.depths = [Depth(name) for name in ("off", *map(str, range(1, most + 1)), AUTO)]
        self.controller = DraftController(most)
        self.ids: list[list[int]] = []
        """What was answered, by prompt: the same at every depth, or `run` raises."""

    def run(self, rounds: int = 1) -> list[dict[str, Any]]:
        """Every prompt at every depth, `rounds` times; the first round starts with one for warmth.

        One controller decides for all answers, as in an engine; at the first it knows nothing.
        """
        if rounds < 1 or not self.prompts or self.params.max_tokens < 2:
            raise UsageError(
                "there is nothing to measure", hint="use `-r 1` or more, and `-n 2` or more"
            )
        total = rounds * len(self.prompts) * len(self.depths)
        self._answer(self.prompts[0], self.depths[0])
        done, self.ids = 0, [[] for _ in self.prompts]
        self.depths = [Depth(depth.name) for depth in self.depths]
        self.controller = DraftController(len(self.drafter.layers))
        for number in range(rounds):
            for i, prompt in enumerate(self.prompts):
                order = self.depths[:: -1 if (number + i) % 2 else 1]
                for depth in order:
                    ids = self._answer(prompt, depth)
                    if self.ids[i] and ids != self.ids[i]:
                        raise AssertionError(f"depth {depth.name} gave other ids: {ids}")
                    self.ids[i], done = ids, done + 1
                    if self.on_progress is not None:
                        self.on_progress(Progress("measuring drafts", done, total, "answers"))
        if not self.depths[0].token_s:
            raise UsageError("every answer ended at once", hint="the model says nothing to measure")
        return [depth.to_dict(self.depths[0]) for depth in self.depths]

    def _answer(self, prompt: Sequence[int], depth: Depth) -> list[int]:
        controller = self.controller
        if depth.name != AUTO:
            fixed = 0 if depth.name == "off" else int(depth.name)
            controller = DraftController(len(self.drafter.layers), fixed=fixed)
        drafting = Drafting(self.drafter, controller)  # type: ignore[arg-type]
        meters, times, out = self.model.experts.meters, list[float](), list[int]()
        read = meters.disk_bytes
        for token in generate(
            self.model, self.new_cache(), list(prompt), self.params,
            stop_ids=self.stop_ids, drafting=drafting,
        ):  # fmt: skip
            if not out:
                read = meters.disk_bytes
            times.append(time.perf_counter())
            out.append(token)
        if len(out) > 1:
            depth.token_s.append((times[-1] - times[0]) / (len(out) - 1))
            depth.disk_bytes += meters.disk_bytes - read
            depth.tokens += len(out) - 1
        report = controller.report()
        depth.add(report)
        depth.note = report.note
        return out


# ---- layers that stand for a model ---------------------------------------------------------------


class Script:
    """A model whose ids are known beforehand: after id i comes i + 1, round and round.

    What it computes and how long that takes is the model's; only the answer is set.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._last = model, torch.zeros(0, dtype=torch.int64)
        self.config, self.experts = model.config, model.experts

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        """As the model's."""
        self._last = segments[0].ids
        return self._model.forward(segments)

    def prefill(self, segment: Segment, **kwargs: Any) -> torch.Tensor:
        """As the model's."""
        self._last = segment.ids
        return self._model.prefill(segment, **kwargs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the model's, the id that is to come raised above all others."""
        logits = self._model.logits(hidden)
        following = (self._last[-hidden.shape[0] :] + 1) % self.config.vocab_size
        logits[torch.arange(hidden.shape[0]), following] = 1e4
        return logits


class Oracle:
    """Guesses a script's ids: right with a set chance, and never faster than drafting would be."""

    def __init__(
        self, steps: int, vocab: int, chances: Sequence[float], *, seconds: float = 0.0
    ) -> None:
        """`chances`: of each step, if those before it are right; `seconds`: a draft takes."""
        self.layers: list[Any] = [None] * steps
        self.vocab, self.chances, self.seconds = vocab, chances, seconds
        self._random = random.Random(SEED)

    def drafts(self, cache: KVCache, ids: Sequence[int]) -> Iterator[tuple[int, float]]:
        """One after the other; what it says of its own chances is true and no more than that."""
        for k, chance in enumerate(self.chances):
            end = time.perf_counter() + self.seconds
            right = self._random.random() < chance
            found = (ids[-1] + 1 + k) % self.vocab
            while time.perf_counter() < end:
                pass
            yield found if right else self._random.randrange(self.vocab), chance


def like_neighbours(model: Model, likeness: float) -> None:
    """Replace the model's embedding by one whose rows follow each other: an AR(1) process.

    `likeness`: correlation of neighbours, 0..1. What neighbours share in the stream they share in
    the experts they choose: see `overlap`.
    """
    rows, size = model.embedding.linear.rows, model.config.hidden_size
    table = torch.randn((rows, size), generator=torch.Generator().manual_seed(SEED))
    for i in range(1, rows):
        table[i].mul_((1 - likeness**2) ** 0.5).add_(table[i - 1], alpha=likeness)
    fmt = get_format("f32")
    model.embedding = Embedding(QuantLinear(fmt, fmt.pack(table), rows, size))


def overlap(model: Model, tokens: int = 48) -> float:
    """Of the experts a token chooses, the share its neighbour chose too, in all mixture layers."""
    chosen: dict[int, list[set[int]]] = {}

    def watch(layer: int, ids: torch.Tensor) -> None:
        chosen.setdefault(layer, []).extend(set(row) for row in ids.tolist())

    cache = model.new_cache()
    model.experts.watch(watch)
    try:
        for i in range(tokens):
            model.forward([Segment(torch.tensor([i % model.config.vocab_size]), cache)])
    finally:
        model.experts.watch(None)
    k = model.config.experts_per_token
    shared = [len(a & b) / k for rows in chosen.values() for a, b in itertools.pairwise(rows)]
    return statistics.fmean(shared)


def set_overlap(model: Model, wanted: float) -> float:
    """Make neighbours share about `wanted` of their experts -> what they share now."""
    low, high, found = 0.0, 1.0, 0.0
    for _ in range(8):
        middle = (low + high) / 2
        like_neighbours(model, middle)
        found = overlap(model)
        if abs(found - wanted) < 0.01:
            break
        low, high = (middle, high) if found < wanted else (low, middle)
    return found


def seconds_of_pass(model: Model, new_cache: Callable[[], KVCache], rounds: int = 9) -> float:
    """Median time of a decode step up to its logits."""
    cache, times = new_cache(), []
    for i in range(rounds):
        start = time.perf_counter()
        with threads_for(1):
            model.logits(model.forward([Segment(torch.tensor([i]), cache)]))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draft_seconds(pass_s: float) -> float:
    """What drafting one id takes where these layers stand for the real model's 48.

    The bytes of one MTP layer and of the 4-bit head, at the speed a pass reads its own: a draft
    takes the share of a pass that it would take of a pass of the whole model.
    """
    data = Path(__file__).with_name("real_config.json").read_text(encoding="utf-8")
    real = ModelConfig.from_dict(json.loads(data))
    draft = PackSizes.estimate(real).drafter / real.n_mtp_layers
    return pass_s * draft / pass_bytes(real)


def pass_bytes(config: ModelConfig) -> int:
    """Bytes of weights a token reads."""
    sizes = PackSizes.estimate(config)
    mixtures = sum(spec.mlp == "moe" for spec in config.layers)
    experts = mixtures * config.experts_per_token * sizes.expert
    return sizes.resident - sizes.embedding + experts


def scripted(
    model: Model,
    new_cache: Callable[[], KVCache],
    acceptance: float,
    *,
    tokens: int,
    rounds: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[dict[str, Any]]:
    """All depths of a model that is told its answer, drafts being right with a set chance."""
    most, vocab = 3, model.config.vocab_size
    seconds = draft_seconds(seconds_of_pass(model, new_cache))
    bench = DraftBench(
        Script(model),  # type: ignore[arg-type]
        Oracle(most, vocab, [acceptance] * most, seconds=seconds),
        new_cache,
        [[i * vocab // rounds] for i in range(rounds)],
        SamplingParams(temperature=0.0, max_tokens=tokens),
        on_progress=on_progress,
    )
    return bench.run()
