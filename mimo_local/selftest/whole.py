"""A model of random weights on a device against the same one on the CPU: steps, prompts, drafts.

Twice: a caricature against the accelerator's own way on the CPU in float32, where only rounding may
differ; and layers in the real shapes against the CPU's kernels, which round activations to 8 bits.
Called by `run`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final, Literal

import torch

from mimo_local.config import ModelConfig
from mimo_local.device import HOST, Devices
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.store import ExpertStore, Store
from mimo_local.experts.vram import VramTier
from mimo_local.model import Model, Segment
from mimo_local.random_weights import RandomWeights
from mimo_local.selftest.types import Result, Sizes, checked, off, timed
from mimo_local.weights import Embedding, Expert, QuantLinear

ROUNDING: Final = 3e-2
"""Median over positions, bfloat16 against float32."""
KERNELS: Final = 8e-2
"""Against activations of 8 bits."""
STEPS: Final = 12
SLOTS: Final = 6
"""Experts in VRAM: fewer than there are, so that both sides have some."""
FAR: Final = 0.1
"""Standard deviations of the logits: two ids that are nearer are a tie that rounding may break."""


class Kept:
    """`weights.Weights` that gives the same numbers again when it is asked again."""

    kind: Literal["pack", "checkpoint"] = "pack"

    def __init__(self, inner: RandomWeights) -> None:
        self.config, self._inner = inner.config, inner
        self._tensors: dict[str, torch.Tensor] = {}
        self._linears: dict[str, QuantLinear] = {}
        self._experts: dict[tuple[int, int], Expert] = {}

    @property
    def nbytes(self) -> int:
        """As the inner ones."""
        return self._inner.nbytes

    @property
    def expert_nbytes(self) -> int:
        """As the inner ones."""
        return self._inner.expert_nbytes

    def has(self, name: str) -> bool:
        """As the inner ones."""
        return self._inner.has(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A small tensor."""
        if name not in self._tensors:
            self._tensors[name] = self._inner.tensor(name)
        return self._tensors[name]

    def linear(self, name: str) -> QuantLinear:
        """A matrix."""
        if name not in self._linears:
            self._linears[name] = self._inner.linear(name)
        return self._linears[name]

    def embedding(self, name: str) -> Embedding:
        """A matrix to be read by rows."""
        return Embedding(self.linear(name))

    def expert(self, layer: int, e: int) -> Expert:
        """One expert."""
        if (layer, e) not in self._experts:
            self._experts[layer, e] = self._inner.expert(layer, e)
        return self._experts[layer, e]


def models(
    device: torch.device, sizes: Sizes, small: ModelConfig, config: ModelConfig
) -> Iterator[Result]:
    """Both comparisons; `small`: of the caricature."""
    exact = Devices.all_on(HOST, small.n_layers, pretend=True)
    there = Devices.all_on(device, small.n_layers, pretend=True)
    stored = sizes.formats[0]
    weights = Kept(RandomWeights(small, experts=stored))
    store = ExpertStore(weights)
    reference = _on(weights, store, exact, HOST)
    model = _on(weights, store, there, device)
    yield from _same(model, reference, "caricature", ROUNDING, prompt=150)
    yield drafts(model)
    weights = Kept(RandomWeights(config, experts=stored))
    store = ExpertStore(weights)
    there = Devices.all_on(device, config.n_layers, pretend=True)
    model = _on(weights, store, there, device)
    name = f"{config.n_layers} layers in the real shapes" if sizes.shape == "real" else "layers"
    yield from _same(model, Model(weights, store), name, KERNELS, prompt=sizes.prompt)
    yield _speed(model, device, sizes, name)


def _on(weights: Kept, store: Store, devices: Devices, device: torch.device) -> Model:
    config = weights.config
    layers = [spec.index for spec in config.layers if spec.mlp == "moe"]
    layout = weights._inner.expert_layout
    assert layout is not None
    layouts = dict.fromkeys(layers, layout)
    one = VramTier(layouts, 0, device).slot_bytes
    vram = VramTier(layouts, SLOTS * one, device)
    return Model(weights, DeviceStore(store, vram, device, layers), devices=devices)


def _same(
    model: Model, reference: Model, name: str, bound: float, *, prompt: int
) -> Iterator[Result]:
    """A prompt read layer by layer, then steps of one to eight rows."""
    g = torch.Generator().manual_seed(1)
    here, there = reference.new_cache(), model.new_cache()
    ids = torch.randint(0, model.config.vocab_size, (prompt,), generator=g)
    wanted = reference.logits(reference.prefill(Segment(ids, here), tail=4))
    found = model.logits(model.prefill(Segment(ids, there), tail=4))
    yield checked("model", f"{name}, a prompt of {prompt}", _median([found], [wanted]), bound)
    pairs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for i in range(STEPS):
        n = (1, 1, 4, 1, 2, 8)[i % 6]
        ids = torch.randint(0, model.config.vocab_size, (n,), generator=g)
        pairs[0].append(_step(model, ids, there))
        pairs[1].append(_step(reference, ids, here))
    top = torch.cat([a.argmax(-1).cpu() == b.argmax(-1) for a, b in zip(*pairs, strict=True)])
    more = f"the likeliest id is the same for {int(top.sum())} of {len(top)}"
    meters = model.experts.meters
    more += f", {meters.uploads} experts went to VRAM and were used {meters.vram_hits} times"
    yield checked("model", f"{name}, steps", _median(*pairs), bound, more)


def _step(model: Model, ids: torch.Tensor, cache: object) -> torch.Tensor:
    return model.logits(model.forward([Segment(ids, cache)]))  # type: ignore[arg-type]


def _median(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of the errors of single rows: a routing near a tie may go the other way in one of them."""
    errors = [
        off(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
    ]
    return statistics.median(errors)


def drafts(model: Model) -> Result:
    """Ids drawn one by one, and again with drafts judged four rows at a time, some wrong."""
    g = torch.Generator().manual_seed(2)
    vocab = model.config.vocab_size
    prompt = torch.randint(0, vocab, (20,), generator=g)
    cache = model.new_cache()
    plain: list[int] = []
    margins = []
    logits = _step(model, prompt, cache)[-1:]
    for _ in range(24):
        best = logits[0].float().cpu().topk(2)
        margins.append(float((best.values[0] - best.values[1]) / logits.float().std().cpu()))
        plain.append(int(best.indices[0]))
        logits = _step(model, torch.tensor(plain[-1:]), cache)
    cache = model.new_cache()
    drafted = [int(_step(model, prompt, cache)[-1].argmax())]
    while len(drafted) < len(plain):
        at = len(drafted)
        guesses = plain[at : at + 3]
        if at % 2 and guesses:
            guesses[-1] = (guesses[-1] + 1) % vocab
        rows = _step(model, torch.tensor([drafted[-1], *guesses]), cache).argmax(-1).tolist()
        right = 0
        while right < len(guesses) and guesses[right] == rows[right]:
            right += 1
        drafted += rows[: right + 1]
        cache.truncate(len(prompt) + len(drafted) - 1)
    drafted = drafted[: len(plain)]
    if drafted == plain:
        return Result("model", "drafts on and off", True, "the same ids", "the same ids")
    at = next(i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b)
    said = f"differ from id {at + 1} on, {margins[at]:.3f} deviations apart there"
    return Result("model", "drafts on and off", margins[at] < FAR, said, f"a tie below {FAR}")


def _speed(model: Model, device: torch.device, sizes: Sizes, name: str) -> Result:
    cache, ids = model.new_cache(), torch.tensor([1])
    _step(model, ids, cache)

    def call() -> None:
        _step(model, ids, cache)
        cache.truncate(1)

    took = timed([call], device, sizes.seconds)
    return Result("model", f"{name}, one row", None, f"{took * 1e3:.2f} ms")
