"""Layer-major prefill: all rows of a long prompt go through a layer before the next one is touched.

So each layer's experts are read once per prompt, and an expert multiplies all of its rows together.
Attention goes piece by piece, hidden states are bounded, and lie where the layer does: they move
once where that changes. Nothing is committed to the cache here: a prompt that is cancelled or fails
leaves it as it was. Called by `model`, which chooses the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import torch

from mimo_local import ops
from mimo_local.cache import KVCache
from mimo_local.config import Attention as Kind
from mimo_local.device import HOST, free_memory, moved
from mimo_local.errors import CancelledError
from mimo_local.events import Progress
from mimo_local.experts.memory import available_memory
from mimo_local.hidden import Hidden, InMemory, Spilled
from mimo_local.layers import MLP, Layer, MoE, Step
from mimo_local.weights import Embedding, OnProgress

Cancel: TypeAlias = Callable[[], bool]

LEAST_ROWS: Final = 256
"""Prompts of fewer new rows are read as one step."""
_REPORTS: Final = 256  # of progress, at most


@dataclass(frozen=True, slots=True)
class Room:
    """How much of a prompt goes through the layers at once, and where its hidden states lie."""

    passes: int
    """More than one: the experts are read as often."""
    spilled: bool

    @classmethod
    def plan(cls, rows: int, hidden_size: int, top_k: int, budget: int) -> Room:
        """Three buffers of a prompt's rows within `budget` bytes: hidden, normed, mixed.

        Beyond it the first lies in a file. The other two may take twice the budget: reading the
        experts again costs more than the memory is worth. Beyond that the prompt is cut.
        """
        one, ids = 4 * hidden_size, 8 * top_k
        if rows * (3 * one + ids) <= budget:
            return cls(1, False)
        most = max(LEAST_ROWS, 2 * budget // (2 * one + ids))
        return cls(-(-rows // most), True)

    def on_device(self, rows: int, hidden_size: int, top_k: int, budget: int) -> Room:
        """With layers on a device that gives `budget` bytes: as many passes as both sides need.

        There a row is hidden and mixed in float32, normed in bfloat16, and what sorts its choices
        (48 bytes each). It cannot be spilled.
        """
        row = 10 * hidden_size + 48 * top_k
        most = max(LEAST_ROWS, budget // row)
        return Room(max(self.passes, -(-rows // most)), self.spilled)


@dataclass(frozen=True, slots=True)
class How:
    """What a caller may choose."""

    chunk: int = 512
    """Rows that go through attention and dense layers at once on the host."""
    budget: int | None = None
    """Bytes of hidden states, see `Room.plan`; None: a quarter of the memory that is free."""
    folder: Path | None = None
    """Where they are spilled to; None: `hidden.spill_folder()`."""
    whole: bool = False
    """Whether the last layer runs for all rows, of which nobody needs more than the last: for
    measuring a few layers that stand for many."""
    device_chunk: int = 2048
    """`chunk` on a device: it fills with more, and a chunk is a hundred launches."""
    device_budget: int | None = None
    """`budget` of a device's memory, see `Room.on_device`; None: half of what is free there."""


class Reader:
    """Reads one prompt into one cache."""

    def __init__(
        self,
        layers: list[Layer],
        embedding: Embedding,
        ropes: dict[Kind, ops.RopeTable],
        cache: KVCache,
        how: How,
        *,
        on_progress: OnProgress | None,
        cancel: Cancel | None,
    ) -> None:
        self.layers, self.embedding, self.ropes = layers, embedding, ropes
        self.cache, self.how, self.cancel = cache, how, cancel
        self.config, self.on_progress = layers[0].config, on_progress

    @torch.inference_mode()
    def read(self, ids: torch.Tensor, tail: int = 1) -> torch.Tensor:
        """Ids (T,) -> hidden (n, D) of the last `tail` rows, before the final norm.

        As many as the last pass has, if that is fewer.

        The cache has the rows of every finished pass afterwards. Raises CancelledError,
        DiskSpaceError, UsageError.
        """
        n = ids.shape[0]
        room = self._room(n)
        meter = _Meter(n, room.passes, self._costs(), self.on_progress)
        self.cache.reserve(n)
        hidden = None
        # torch adds rows here and there: its threads would spin where the kernels' are needed.
        with ops.threads_for(1):
            for a, b in pieces(n, -(-n // room.passes)):
                wanted = min(tail, b - a) if b == n else 0
                hidden = _Pass(self, ids[a:b], room.spilled, wanted, meter).run()
                self.cache.advance(b - a)
                meter.committed(b)
        assert hidden is not None
        return hidden

    def _room(self, n: int) -> Room:
        """For n rows; of a side that no layer is on, nothing is asked."""
        config, how, found = self.config, self.how, Room(1, False)
        shape = config.hidden_size, config.experts_per_token
        if any(layer.device is None for layer in self.layers):
            budget = available_memory() // 4 if how.budget is None else how.budget
            found = Room.plan(n, *shape, budget)
        for device in {layer.device for layer in self.layers} - {None}:
            assert device is not None
            given = how.device_budget
            found = found.on_device(n, *shape, free_memory(device) // 2 if given is None else given)
        return found

    def _costs(self) -> list[tuple[float, float]]:
        """Multiply-adds of a row by layer: attention's products, and those of MLP or experts."""
        costs = []
        for layer in self.layers:
            a, size = layer.attention, self.config.hidden_size
            width = self.config.moe_intermediate_size * self.config.experts_per_token
            if isinstance(layer.mlp, MLP):
                width = layer.mlp.gate.rows
            attention = a.qkv.rows * size + a.out.rows * a.out.cols
            costs.append((float(attention), 3.0 * width * size))
        if not self.how.whole:
            costs[-1] = (float(self.layers[-1].attention.kv.rows * self.config.hidden_size), 0.0)
        return costs


class _Pass:
    """Some rows of a prompt, all of them if there is memory, through all layers."""

    def __init__(
        self, reader: Reader, ids: torch.Tensor, spilled: bool, tail: int, meter: _Meter
    ) -> None:
        """`tail`: how many of its last rows somebody wants: 0 unless the prompt ends here."""
        self.reader, self.ids, self.tail, self.meter = reader, ids, tail, meter
        self.spilled = spilled
        self.mixed: torch.Tensor | None = None
        """What the experts of the layer before made of `normed`: still to be added."""
        self.fresh = True
        """Whether the rows are still to be looked up."""
        self.open = ExitStack()
        self._settle(reader.layers[0])

    def _settle(self, layer: Layer) -> None:
        """Take the memory of a pass where `layer` is."""
        config, how, n = self.reader.config, self.reader.how, self.ids.shape[0]
        d, k, device = config.hidden_size, config.experts_per_token, layer.device
        self.device, self.chunk = device, how.chunk if device is None else how.device_chunk
        where = HOST if device is None else device
        self.normed = torch.empty((n, d), dtype=layer.dtype, device=where)
        self.chosen = torch.empty((n, k), dtype=torch.int32, device=where)
        self.weights = torch.empty((n, k), device=where)
        self.hidden: Hidden = (
            Spilled(n, d, min(n, self.chunk), how.folder)
            if self.spilled and device is None
            else InMemory(n, d, where)
        )
        self.open.enter_context(self.hidden)

    def _enter(self, layer: Layer) -> None:
        """Rows go where `layer` is, if they are elsewhere."""
        if layer.device == self.device:
            return
        old, mixed, chunk, n = self.hidden, self.mixed, self.chunk, self.ids.shape[0]
        with self.open:
            self.open = ExitStack()
            self._settle(layer)
            for a, b in pieces(0 if self.fresh else n, min(chunk, self.chunk)):
                x = old.read(a, b) if mixed is None else old.read(a, b).add_(mixed[a:b])
                here = self.hidden.blank(a, b)
                self.hidden.write(a, here.copy_(moved(x, self.device)))
        self.mixed = None

    def run(self) -> torch.Tensor | None:
        """Hidden (tail, D) of the last rows, if any are wanted."""
        try:
            return self._through()
        finally:
            self.open.close()

    def _through(self) -> torch.Tensor | None:
        layers, n = self.reader.layers, self.ids.shape[0]
        for layer in layers if self.reader.how.whole else layers[:-1]:
            self._layer(layer)
        if self.reader.how.whole:
            return self._rows(n - self.tail, n).clone() if self.tail else None
        self._enter(layers[-1])
        before = self._before_last() if self.tail > 1 else None
        # Of the last layer nobody needs more than keys and values, and its last row.
        for a, b, x, step in self._chunks(n - 1 if self.tail else n):
            layers[-1].remember(x, step)
            self.meter.add(b - a, layers[-1], attention=True)
        if not self.tail:
            return None
        last = layers[-1](self._rows(n - 1, n), self._step(n - 1, n), None)
        return last.clone() if before is None else torch.cat([before, last])

    def _before_last(self) -> torch.Tensor:
        """Hidden (tail - 1, D) before the last row, whose own bits are not to depend on them.

        So they are made first, and what they leave in the cache is written again afterwards.
        """
        n, layer = self.ids.shape[0], self.reader.layers[-1]
        first = n - self.tail
        for a, _, x, _ in self._chunks(n):
            self.hidden.write(a, x)
        self.mixed = None
        for _, _, x, step in self._chunks(first):
            layer.remember(x, step)
        parts = pieces(self.tail - 1, self.chunk)
        x = torch.cat([self._rows(first + a, first + b) for a, b in parts])
        return layer(x, self._step(first, n - 1), None)

    def _layer(self, layer: Layer) -> None:
        self._enter(layer)
        for a, b, x, step in self._chunks(self.ids.shape[0]):
            layer.attend(x, step)
            if isinstance(layer.mlp, MoE):
                layer.route(x, step, self.normed[a:b], self.chosen[a:b], self.weights[a:b])
            else:
                layer.mix(x, step)
                self.meter.add(b - a, layer, attention=False)
            self.hidden.write(a, x)
            self.meter.add(b - a, layer, attention=True)
        self.fresh, self.mixed = False, None
        if isinstance(layer.mlp, MoE):
            self.mixed = self._sweep(layer)

    def _sweep(self, layer: Layer) -> torch.Tensor:
        """All experts that were chosen, each of them once."""
        self._ask()
        part, n, asked = layer.moe, self.ids.shape[0], self.reader.cancel
        touched = min(self.reader.config.n_experts, self.chosen.numel())
        if layer.device is None:  # a device would have to be waited for
            touched = int(torch.bincount(self.chosen.flatten()).count_nonzero())
        done = 0

        def between() -> bool:
            """The store asks between experts, which also says how far it is."""
            nonlocal done
            if done < touched:
                done += 1
                self.meter.add(n / touched, layer, attention=False)
            return asked is not None and asked()

        mixed = part.experts.sweep(
            part.layer, self.normed, self.chosen, self.weights, cancel=between
        )
        self.meter.add(n - n * done / touched, layer, attention=False)
        return mixed

    def _chunks(self, n: int) -> Iterator[tuple[int, int, torch.Tensor, Step]]:
        """The first n rows in pieces, each as (first, end, rows, step)."""
        for a, b in pieces(n, self.chunk):
            self._ask()
            yield a, b, self._rows(a, b), self._step(a, b)

    def _rows(self, a: int, b: int) -> torch.Tensor:
        if self.fresh:
            rows = moved(self.reader.embedding.rows(self.ids[a:b]), self.device)
            return self.hidden.blank(a, b).copy_(rows)
        x = self.hidden.read(a, b)
        return x if self.mixed is None else x.add_(self.mixed[a:b])

    def _step(self, a: int, b: int) -> Step:
        reader = self.reader
        return Step([reader.cache], [b - a], reader.ropes, a)

    def _ask(self) -> None:
        cancel = self.reader.cancel
        if cancel is not None and cancel():
            raise CancelledError(
                "stopped while reading the prompt",
                hint="it is read layer by layer: the next time starts anew",
            )


class _Meter:
    """Turns work done into tokens: a prompt is read when all layers have seen all of it."""

    def __init__(
        self,
        n: int,
        passes: int,
        costs: list[tuple[float, float]],
        on_progress: OnProgress | None,
    ) -> None:
        self._n, self._costs, self._on_progress = n, costs, on_progress
        self._stage = "reading the prompt" + (f" in {passes} parts" if passes > 1 else "")
        self._row = sum(map(sum, costs))
        self._work = 0.0
        self._told = 0

    def add(self, rows: float, layer: Layer, *, attention: bool) -> None:
        """`rows` are through the first or the second half of a layer."""
        self._work += rows * self._costs[layer.attention.spec.index][0 if attention else 1]
        # Those of the last layer are done when they are in the cache.
        tokens = min(self._n - 1, int(self._work / self._row))
        if tokens - self._told >= max(1, self._n // _REPORTS):
            self._tell(tokens)

    def committed(self, rows: int) -> None:
        """The first `rows` are in the cache."""
        self._work = max(self._work, rows * self._row)
        if rows > self._told:
            self._tell(rows)

    def _tell(self, tokens: int) -> None:
        self._told = tokens
        if self._on_progress is not None:
            self._on_progress(Progress(self._stage, tokens, self._n, "tokens"))


def pieces(n: int, most: int) -> Iterator[tuple[int, int]]:
    """0 .. n in pieces of nearly equal length, up to `most`.

    Equal, because rows of a piece below `ops.EXACT_ROWS` would be rounded another way.
    """
    count = -(-n // most)
    for i in range(count):
        yield n * i // count, n * (i + 1) // count
