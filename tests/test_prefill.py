"""Layer-major prefill against reading in chunks: same rows, each expert once, nothing half done."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import hidden
from mimo_local.cache import KVCache
from mimo_local.errors import CancelledError, ContextOverflowError, DiskSpaceError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.store import ExpertStore
from mimo_local.experts.tiered import TieredStore
from mimo_local.generate import generate
from mimo_local.model import Model, Segment
from mimo_local.prefill import LEAST_ROWS, How, Room, pieces
from mimo_local.sampler import SamplingParams
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

N = 90
"""Tokens of most prompts here: ten windows."""


class FileOrder(ExpertStore):
    """Runs a sweep as a store over a disk does: one expert after the other, asking in between."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads: Counter[tuple[int, int]] = Counter()
        self.fail_at: tuple[int, int] | None = None

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        y = torch.zeros_like(x)
        for e in sorted(set(ids.flatten().tolist())):
            if cancel is not None and cancel():
                raise CancelledError("stopped between experts", hint="ask again")
            if (layer, e) == self.fail_at:
                raise KeyboardInterrupt
            self.reads[layer, e] += 1
            y += self.run(layer, x, torch.where(ids == e, ids, -1), w)
        return y


pytestmark = pytest.mark.usefixtures("way")


def load(folder: Path) -> Model:
    weights = open_weights(folder)
    return Model(weights, FileOrder(weights))


def made(folder: Path, *args: Any, **kwargs: Any) -> Model:
    return load(tiny.write(folder, tiny.config(*args, **kwargs), seed=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    d = tiny.config(
        "fssfs", "dmmmm", window=9, full_sink=True, n_group=2, top_k=3, scaling=1.5,
        hidden=64, intermediate=128, moe_intermediate=64,
    )  # fmt: skip
    return tiny.write(tmp_path_factory.mktemp("prefill"), d, seed=3)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Model:
    return load(folder)


@pytest.fixture
def model(loaded: Model) -> Model:
    store(loaded).reads.clear()
    store(loaded).fail_at = None
    return loaded


def store(model: Model) -> FileOrder:
    found = model.layers[-1].moe.experts
    assert isinstance(found, FileOrder)
    return found


def ids_for(model: Model, n: int = N, seed: int = 0) -> torch.Tensor:
    return tiny.prompt({"vocab_size": model.config.vocab_size}, n, seed=seed)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def by_layers(model: Model, ids: torch.Tensor, cache: KVCache, **kwargs: Any) -> torch.Tensor:
    how = How(**{k: kwargs.pop(k) for k in How.__slots__ if k in kwargs})
    return model.prefill(Segment(ids, cache), layer_major_from=1, how=how, **kwargs)


def by_chunks(model: Model, ids: torch.Tensor, cache: KVCache, chunk: int = 40) -> torch.Tensor:
    return model.prefill(Segment(ids, cache), layer_major_from=1 << 30, chunk=chunk)


def next_rows(model: Model, cache: KVCache, seed: int = 7) -> torch.Tensor:
    """What a few more tokens see of the cache: one, and then four."""
    more = ids_for(model, 5, seed=seed)
    return torch.cat([model.forward([Segment(part, cache)]) for part in more.split([1, 4])])


def assert_same(model: Model, one: KVCache, other: KVCache, bound: float = 1e-5) -> None:
    assert one.length == other.length
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        first, rows = mine.rows(one.length)
        first_too, rows_too = theirs.rows(other.length)
        skip = max(first, first_too)
        for part, part_too in zip(rows.values(), rows_too.values(), strict=True):
            part, part_too = part[skip - first :], part_too[skip - first_too :]
            assert relative(part.float(), part_too.float()) < bound
    assert relative(next_rows(model, one), next_rows(model, other)) < bound


# ---- the same as reading in chunks ---------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("old", "n", "chunk"), [
    (0, 1, 512), (0, 8, 3), (0, 90, 512), (0, 90, 20), (5, 90, 20), (50, 90, 33), (50, 90, 1),
])  # fmt: skip
def test_equals_reading_in_chunks(
    model: Model, old: int, n: int, chunk: int, dtype: torch.dtype, whole: bool
) -> None:
    found_in, wanted_in = (model.new_cache(dtype=dtype) for _ in range(2))
    if old:
        for cache in (found_in, wanted_in):
            by_chunks(model, ids_for(model, old, seed=1), cache)
    ids = ids_for(model, n)
    found = by_layers(model, ids, found_in, chunk=chunk, whole=whole)
    wanted = by_chunks(model, ids, wanted_in)
    # In bf16 a last-bit difference of a key may round the other way: 2^-9 of it.
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.shape == (1, model.config.hidden_size) and relative(found, wanted) < bound
    assert found_in.nbytes["swa"] == wanted_in.nbytes["swa"]
    assert_same(model, found_in, wanted_in, bound)


@pytest.mark.parametrize(("attention", "mlp"), [
    ("f", "m"), ("s", "m"), ("fs", "md"), ("sfs", "mdm"), ("ssf", "ddm"), ("sff", "mmm"),
])  # fmt: skip
@pytest.mark.parametrize("window", [1, 2, 9, 200])
def test_any_order_of_layers(tmp_path: Path, attention: str, mlp: str, window: int) -> None:
    model = made(tmp_path / "m", attention, mlp, window=window)
    ids, caches = ids_for(model), [model.new_cache() for _ in range(2)]
    found = by_layers(model, ids, caches[0], chunk=25)
    assert relative(found, by_chunks(model, ids, caches[1])) < 1e-5
    assert_same(model, *caches)


@pytest.mark.parametrize("way", ["native"], indirect=True)
def test_with_the_kernels_no_bit_depends_on_the_chunks(model: Model) -> None:
    """As long as they are longer than what attention treats as a short step."""
    ids, caches = ids_for(model, 400), [model.new_cache() for _ in range(3)]
    one, *others = (
        by_layers(model, ids, cache, chunk=chunk)
        for cache, chunk in zip(caches, (400, 150, 99), strict=True)
    )
    assert all(torch.equal(one, other) for other in others)
    one, *others = (next_rows(model, cache) for cache in caches)
    assert all(torch.equal(one, other) for other in others)


def test_going_on_equals_straight_on(model: Model) -> None:
    ids = ids_for(model, 200)
    wanted = model.forward([Segment(ids, model.new_cache())])
    cache = model.new_cache(slack=4)
    by_layers(model, ids[:100], cache, chunk=30)
    for back in (0, 4):
        cache.truncate(100 - back)
        found = model.forward([Segment(ids[100 - back : 103], cache)])
        assert relative(found, wanted[100 - back : 103]) < 1e-5
        cache.truncate(100)
    snapshot = cache.snapshot()
    for _ in range(2):
        assert relative(by_layers(model, ids[100:], cache, chunk=64), wanted[-1:]) < 1e-5
        cache.restore(snapshot)


def test_short_prompts_and_dense_models_are_read_as_before(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a sweep")

    monkeypatch.setattr(FileOrder, "sweep", never)
    model.prefill(Segment(ids_for(model, LEAST_ROWS - 1), model.new_cache()))
    with pytest.raises(AssertionError, match="a sweep"):
        model.prefill(Segment(ids_for(model, LEAST_ROWS), model.new_cache()))
    dense = made(tmp_path / "m", "fs", "dd")
    ids, seen = ids_for(dense, LEAST_ROWS + 50), []
    dense.prefill(Segment(ids, dense.new_cache()), chunk=100, on_progress=seen.append)
    assert [p.done for p in seen] == [100, 200, 300, 306]


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, N, 600])
def test_every_chosen_expert_is_read_once_whatever_the_length(model: Model, n: int) -> None:
    chosen: dict[int, set[int]] = {}
    store(model).watch(
        lambda layer, ids: chosen.setdefault(layer, set()).update(ids.flatten().tolist())
    )
    try:
        by_chunks(model, ids_for(model, n), model.new_cache())
    finally:
        store(model).watch(None)
    by_layers(model, ids_for(model, n), model.new_cache(), chunk=40)
    assert set(store(model).reads.values()) == {1}
    # The last layer's experts are asked for the last row alone, as in a step.
    wanted = {(layer, e) for layer in (1, 2, 3) for e in chosen[layer]}
    assert set(store(model).reads) == wanted
    by_layers(model, ids_for(model, n), model.new_cache(), whole=True)
    assert {layer for layer, _ in store(model).reads} == {1, 2, 3, 4}


def test_a_prompt_beyond_the_memory_is_read_in_parts_and_says_so(model: Model) -> None:
    """1024 rows of two buffers fit into twice this budget, 512 rows of three do not fit it."""
    budget = 512 * (2 * 4 * 64 + 8 * 3)
    ids, caches = ids_for(model, 1500), [model.new_cache() for _ in range(2)]
    seen: list[Progress] = []
    found = by_layers(model, ids, caches[0], budget=budget, on_progress=seen.append)
    assert relative(found, by_chunks(model, ids, caches[1])) < 1e-5
    assert_same(model, *caches)
    assert set(store(model).reads.values()) == {2}
    assert {p.stage for p in seen} == {"reading the prompt in 2 parts"}


@pytest.mark.parametrize("n", [60, 700])
def test_of_a_pack_on_disk_every_chosen_expert_is_read_once_to_the_byte(
    folder: Path, tmp_path: Path, n: int, way: str
) -> None:
    """Into a few slots: 1.00 times the chosen experts, whatever the length, and no other bits."""
    convert(folder, tmp_path / "pack", Recipe.for_format("nf4"))
    opened = open_weights(tmp_path / "pack")
    assert isinstance(opened, PackWeights)
    size = opened.pack.expert_layout(1).stride
    tiered = TieredStore(opened, 6 * size, prefetch="off", reserve=0)
    whole_store = ExpertStore(open_weights(tmp_path / "pack"))
    model, whole = Model(opened, tiered), Model(opened, whole_store)
    touched: set[tuple[int, int]] = set()
    whole_store.watch(lambda layer, ids: touched.update((layer, e) for e in ids.unique().tolist()))
    try:
        ids, caches = ids_for(model, n), [model.new_cache() for _ in range(2)]
        found = by_layers(model, ids, caches[0], chunk=100)
        read = tiered.meters.copy()
        wanted, n_touched = by_layers(whole, ids, caches[1], chunk=100), len(touched)
        pairs = [(found, wanted), (next_rows(model, caches[0]), next_rows(whole, caches[1]))]
        for one, other in pairs:
            assert torch.equal(one, other) if way == "native" else relative(one, other) < 1e-5
    finally:
        tiered.close()
    assert read.disk_bytes == n_touched * size
    # Not swept: the last row's experts in the last layer.
    assert (read.disk_bytes - read.sweep_bytes, read.steps) == (3 * size, 1)


def test_the_room_that_is_planned() -> None:
    """The real model: 48 KiB and 64 bytes a row in memory, 32 KiB of them beside a file."""
    gb = 1 << 30
    assert Room.plan(4096, 4096, 8, gb) == Room(1, False)
    assert Room.plan(32_768, 4096, 8, gb) == Room(1, True)
    assert Room.plan(262_144, 4096, 8, gb) == Room(5, True)
    assert Room.plan(262_144, 4096, 8, 13 * gb) == Room(1, False)
    assert Room.plan(300, 4096, 8, 0) == Room(2, True)
    for n, most in itertools.product((1, 8, 9, 255, 256, 1025), (1, 7, 256, 512)):
        cut = list(pieces(n, most))
        assert [a for a, _ in cut] == [0, *(b for _, b in cut[:-1])] and cut[-1][1] == n
        lengths = [b - a for a, b in cut]
        assert max(lengths) <= most and max(lengths) - min(lengths) <= 1


# ---- spilled hidden states -----------------------------------------------------------------------


def spilling(n: int, model: Model) -> int:
    """A budget that two buffers of a prompt fit, and not three."""
    return n * (2 * 4 * model.config.hidden_size + 8 * 3)


def open_files() -> set[Path]:
    return {link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()}


def test_spilling_changes_no_bit_and_leaves_nothing(model: Model, tmp_path: Path) -> None:
    ids, caches = ids_for(model), [model.new_cache() for _ in range(2)]
    before, during = open_files(), []
    found = by_layers(
        model, ids, caches[0], chunk=25, budget=spilling(N, model), folder=tmp_path,
        on_progress=lambda _: during.extend(tmp_path.iterdir()),
    )  # fmt: skip
    assert torch.equal(found, by_layers(model, ids, caches[1], chunk=25))
    assert torch.equal(next_rows(model, caches[0]), next_rows(model, caches[1]))
    assert during == [] and open_files() == before


def test_spilling_where_files_cannot_be_reserved(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS: posix_fallocate is Linux's."""
    ids, wanted = ids_for(model), by_layers(model, ids_for(model), model.new_cache(), chunk=25)
    monkeypatch.delattr(os, "posix_fallocate")
    found = by_layers(
        model, ids, model.new_cache(), chunk=25, budget=spilling(N, model), folder=tmp_path
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("call", "nth"), [("posix_fallocate", 0), ("pwritev", 0), ("pwritev", 5)])
def test_a_full_disk_is_said_and_leaves_the_cache_as_it_was(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    plain, calls = getattr(os, call), itertools.count()

    def full(*args: Any) -> Any:
        if next(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)

    cache, twin = model.new_cache(), model.new_cache()
    for each in (cache, twin):
        by_layers(model, ids_for(model, 50, seed=1), each)
    before = open_files()
    with monkeypatch.context() as patch, pytest.raises(DiskSpaceError) as e:
        patch.setattr(os, call, full)
        by_layers(
            model, ids_for(model), cache, chunk=25, budget=spilling(N, model), folder=tmp_path
        )
    assert "TMPDIR" in e.value.hint and str(tmp_path) in e.value.message
    assert not any(tmp_path.iterdir()) and open_files() == before
    assert_same(model, cache, twin)


def test_partial_reads_and_writes_are_gone_on_with(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_for(model)
    wanted = by_layers(model, ids, model.new_cache(), chunk=25)
    for name in ("preadv", "pwritev"):
        plain = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda fd, parts, at, plain=plain: plain(fd, [parts[0][:1000]], at)
        )
    found = by_layers(
        model, ids, model.new_cache(), chunk=25, budget=spilling(N, model), folder=tmp_path
    )
    assert torch.equal(found, wanted)


def test_a_folder_that_cannot_be_used_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone"):
        by_layers(
            model, ids_for(model), model.new_cache(), budget=spilling(N, model),
            folder=tmp_path / "gone",
        )  # fmt: skip


def test_the_spill_folder_is_on_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    assert hidden.spill_folder() == Path("/var/tmp")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert hidden.spill_folder() == tmp_path


# ---- stopped on the way --------------------------------------------------------------------------


def asks(model: Model, **kwargs: Any) -> int:
    """How often a whole prompt asks whether to stop."""
    count = itertools.count()
    by_layers(
        model, ids_for(model), model.new_cache(), chunk=30, cancel=lambda: next(count) < 0, **kwargs
    )
    return next(count)


@pytest.mark.parametrize("old", [0, 3, 50])
def test_a_cancel_anywhere_leaves_the_cache_as_it_was(model: Model, old: int) -> None:
    """Before a chunk of attention in every layer, before a sweep, and between any two experts."""
    ids = ids_for(model)
    cache, twin = model.new_cache(), model.new_cache()
    if old:
        for each in (cache, twin):
            by_layers(model, ids_for(model, old, seed=1), each, chunk=30)
    total = asks(model)
    assert total > 5 * 3 + 3 * 8
    kept = [{k: t.clone() for k, t in layer.rows(old)[1].items()} for layer in cache.layers]
    for at in range(total):
        left = itertools.count()
        with pytest.raises(CancelledError):
            by_layers(model, ids, cache, chunk=30, cancel=lambda left=left, at=at: next(left) == at)
        assert cache.length == old
        for layer, rows in zip(cache.layers, kept, strict=True):
            now = layer.rows(old)[1]
            assert all(torch.equal(now[name], part) for name, part in rows.items())
    assert torch.equal(
        by_layers(model, ids, cache, chunk=30), by_layers(model, ids, twin, chunk=30)
    )
    assert torch.equal(next_rows(model, cache), next_rows(model, twin))


def test_an_interrupt_inside_an_expert_leaves_the_cache_as_it_was(model: Model) -> None:
    ids, cache, twin = ids_for(model), model.new_cache(), model.new_cache()
    for each in (cache, twin):
        by_chunks(model, ids[:40], each)
    store(model).fail_at = (3, 2)
    with pytest.raises(KeyboardInterrupt):
        by_layers(model, ids[40:], cache, chunk=20)
    assert cache.length == 40 and torch.equal(next_rows(model, cache), next_rows(model, twin))


def test_parts_that_are_finished_are_kept(model: Model) -> None:
    budget = 512 * (2 * 4 * 64 + 8 * 3)
    ids, cache = ids_for(model, 1500), model.new_cache()
    seen: list[int] = []
    with pytest.raises(CancelledError):
        by_layers(
            model, ids, cache, budget=budget, cancel=lambda: bool(seen) and seen[-1] > 800,
            on_progress=lambda p: seen.append(p.done),
        )  # fmt: skip
    assert cache.length == 750
    wanted = by_chunks(model, ids, model.new_cache())
    assert relative(by_layers(model, ids[750:], cache), wanted) < 1e-5


def test_what_no_step_can_process_is_refused_before_anything_is_done(model: Model) -> None:
    cache = model.new_cache()
    with pytest.raises(UsageError, match="vocabulary"):
        by_layers(model, torch.tensor([1, 64]), cache)
    with pytest.raises(UsageError, match="no tokens"):
        model.prefill(Segment(ids_for(model, 0), cache), layer_major_from=0)
    with pytest.raises(ContextOverflowError, match="5000 tokens"):
        by_layers(model, ids_for(model, 5000), cache)
    assert cache.length == 0 and not store(model).reads


# ---- what is said --------------------------------------------------------------------------------


def test_progress_counts_tokens_and_moves_inside_sweeps(model: Model) -> None:
    seen: list[Progress] = []
    by_layers(model, ids_for(model), model.new_cache(), on_progress=seen.append)
    done = [p.done for p in seen]
    assert done == sorted(set(done)) and done[-1] == N and done[-2] < N
    assert {(p.stage, p.total, p.unit) for p in seen} == {("reading the prompt", N, "tokens")}
    assert len(seen) > 5 * 2  # more than the halves of the layers: there is one chunk only


def test_a_long_prompt_is_reported_a_few_hundred_times_at_most(model: Model) -> None:
    seen: list[Progress] = []
    by_layers(model, ids_for(model, 3000), model.new_cache(), chunk=10, on_progress=seen.append)
    assert 100 < len(seen) < 260


def test_an_answer_over_a_long_prompt_and_its_cancel(model: Model) -> None:
    reports: list[tuple[int, int]] = []
    n = LEAST_ROWS + 44

    def answer(cancel: Callable[[], bool]) -> tuple[list[int], list[int], KVCache]:
        cache, ids = model.new_cache(), ids_for(model, n).tolist()
        reports.clear()
        steps = generate(
            model, cache, ids, SamplingParams(max_tokens=4, temperature=0.0), cancel=cancel,
            on_prefill=lambda done, total: reports.append((done, total)),
        )  # fmt: skip
        return list(steps), ids, cache

    tokens, ids, cache = answer(lambda: False)
    assert len(tokens) == 4 and cache.length == len(ids) == n + 3
    assert reports[0] == (0, n) and reports[-1] == (n, n) and len(reports) > 20
    tokens, ids, cache = answer(lambda: len(reports) > 10)
    assert (tokens, ids, cache.length) == ([], [], 0)
