"""The cache against a plain list of rows, and the promises a step, a draft and a file rely on."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.cache import KVCache
from mimo_local.cache_layers import SPARE_ROWS, View, coded
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.errors import UsageError


def config(window: int = 5, attention: str = "fsfs") -> ModelConfig:
    return ModelConfig.from_dict(tiny.config(attention, "d" * len(attention), window=window))


class Lists:
    """The slow twin: every row of every layer ever committed, as plain tensors."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in config.layers]

    def step(self, cache: KVCache, n: int, *, commit: bool = True) -> None:
        """Append n random rows to every layer of both and compare what each layer shows."""
        length = cache.length
        for spec in self.config.layers:
            k = torch.randn(n, spec.kv_heads, spec.head_dim)
            v = torch.randn(n, spec.kv_heads, spec.v_head_dim)
            mine = self.rows[spec.index]
            both = mine[:length] + self.kept(spec, k, v)
            view = cache.append(spec.index, k, v)
            self.compare(view, both, spec.window, length)
            if commit:
                self.rows[spec.index] = both
        if commit:
            cache.advance(n)

    def pieces(self, cache: KVCache, sizes: list[int], *, commit: bool = True) -> None:
        """As one step, but every layer is given all its rows, piece by piece, before the next."""
        length = cache.length
        for spec in self.config.layers:
            mine, at = self.rows[spec.index][:length], 0
            for n in sizes:
                k = torch.randn(n, spec.kv_heads, spec.head_dim)
                v = torch.randn(n, spec.kv_heads, spec.v_head_dim)
                mine = mine + self.kept(spec, k, v)
                view = cache.append(spec.index, k, v, at=at)
                self.compare(view, mine, spec.window, length + at)
                at += n
            if commit:
                self.rows[spec.index] = mine
        if commit:
            cache.advance(sum(sizes))

    def kept(
        self, spec: LayerSpec, k: torch.Tensor, v: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows as this layer rounds them, as floats."""
        if self.dtype == torch.int8 and spec.window is None:
            k, v = (rounded_to_127ths(x) for x in (k, v))
        else:
            dtype = torch.bfloat16 if self.dtype == torch.int8 else self.dtype
            k, v = k.to(dtype), v.to(dtype)
        return list(zip(k, v, strict=True))

    @staticmethod
    def compare(
        view: View, rows: list[tuple[torch.Tensor, torch.Tensor]], window: int | None, length: int
    ) -> None:
        needed = 0 if window is None else max(0, length - window + 1)
        assert view.first_position <= needed
        assert view.k.shape[0] == len(rows) - view.first_position
        found_k, found_v = view.numbers()
        assert torch.equal(found_k, torch.stack([k for k, _ in rows[view.first_position :]]))
        assert torch.equal(found_v, torch.stack([v for _, v in rows[view.first_position :]]))


def rounded_to_127ths(x: torch.Tensor) -> torch.Tensor:
    """x (T, G, d): each row and head to multiples of 1/127 of its largest magnitude."""
    most = x.abs().amax(-1, keepdim=True)
    return (x * (127 / most)).round() * (most / 127)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**9), st.integers(1, 40), st.integers(0, 6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)  # fmt: skip
def test_any_history_shows_the_rows_a_list_would(
    seed: int, window: int, slack: int, dtype: torch.dtype
) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)
    facts = config(window)
    cache, lists = KVCache(facts, dtype=dtype, slack=slack), Lists(facts, dtype)
    snapshots = []
    top = 0
    for _ in range(25):
        moves = ["one", "one", "few", "chunk", "pieces", "lost", "lost pieces"]
        match dice.choice([*moves, "back", "snap", "restore"]):
            case "one":
                lists.step(cache, 1)
            case "few":
                lists.step(cache, dice.randint(1, 8))
            case "chunk":
                lists.step(cache, dice.randint(1, 90))
            case "pieces" | "lost pieces" as case:
                sizes = [dice.choice([1, 3, 8, 20, 50]) for _ in range(dice.randint(1, 5))]
                lists.pieces(cache, sizes, commit=case == "pieces")
            case "lost":
                lists.step(cache, dice.choice([1, 5, 40, 80]), commit=False)
            case "back":
                n = max(0, top - slack, cache.length - dice.randint(0, slack))
                cache.truncate(min(n, cache.length))
            case "snap":
                snapshots.append((cache.snapshot(), top))
            case "restore" if snapshots:
                snapshot, highest = dice.choice(snapshots)
                if snapshot.stale:
                    with pytest.raises(UsageError, match="snapshot at"):
                        cache.restore(snapshot)
                else:
                    cache.restore(snapshot)
                    top = highest  # its rings hold what was left after going back from there
        top = max(top, cache.length)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**9), st.integers(1, 40), st.integers(0, 6),
    st.sampled_from([torch.float32, torch.int8]),
)  # fmt: skip
def test_places_are_the_rooms_views_as_numbers(
    seed: int, window: int, slack: int, dtype: torch.dtype
) -> None:
    dice, facts = random.Random(seed), config(window)
    one, other = (KVCache(facts, slack=slack, dtype=dtype) for _ in range(2))
    for _ in range(30):
        n = dice.choice([1, 1, 1, 4, 8, SPARE_ROWS])
        for layer in range(len(one.layers)):  # a step that is given up, perhaps a long one
            lost = n + dice.choice([0, 60])
            one.room(layer, lost)
            other.room(layer, lost)
        for layer, (k, v, k_scales, v_scales, first) in enumerate(one.places(n)):
            view, store = other.room(layer, n), one.layers[layer]
            assert (k, v) == (store.k.data_ptr(), store.v.data_ptr())
            assert (k_scales, v_scales) == tuple(
                store.stored[name].data_ptr() if name in store.stored else 0
                for name in ("k_scales", "v_scales")
            )
            assert (k_scales != 0) == (dtype == torch.int8 and store.kind == "full")
            assert first == view.first_position and one.length - first + n <= store.k.shape[0]
            other.settle(layer)
        for cache in (one, other):
            cache.advance(n)


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("n_new", [1, 3, SPARE_ROWS, SPARE_ROWS + 1, 200])
def test_rolling_back_up_to_the_slack_always_works(slack: int, n_new: int) -> None:
    facts = config(9)
    for length in (0, 3, 30, 47, 100):
        cache, lists = KVCache(facts, slack=slack), Lists(facts, torch.float32)
        if length:
            lists.step(cache, length)
        lists.step(cache, n_new)
        for back in range(min(slack, cache.length) + 1):
            assert cache.can_truncate(cache.length - back)
        cache.truncate(max(0, cache.length - slack))
        lists.step(cache, 2)


@pytest.mark.parametrize("sizes", [[7, 7], [64, 64, 64], [1, 100], [100, 1], [2, 2, 2, 2]])
def test_a_step_in_pieces_leaves_what_one_step_leaves(sizes: list[int]) -> None:
    facts = config(9)
    for length in (0, 3, 47):
        cache, lists = KVCache(facts, slack=4), Lists(facts, torch.float32)
        if length:
            lists.step(cache, length)
        rings = cache.nbytes["swa"]
        lists.pieces(cache, sizes, commit=False)
        assert cache.length == length and cache.can_truncate(max(0, length - 4))
        cache.reserve(sum(sizes))
        full = cache.nbytes["full"]
        lists.pieces(cache, sizes)
        assert cache.nbytes == {"swa": rings, "full": full}
        cache.truncate(cache.length - 2)
        lists.step(cache, 3)


def test_rolling_back_further_is_refused_and_changes_nothing() -> None:
    facts = config(5)
    cache, lists = KVCache(facts, slack=2), Lists(facts, torch.float32)
    lists.step(cache, 200)
    before = cache.length
    assert not cache.can_truncate(100)
    for n, message in ((100, "from 200 to 100"), (201, "200 rows to 201"), (-1, "200 rows to -1")):
        with pytest.raises(UsageError, match=message) as e:
            cache.truncate(n)
        assert e.value.hint and cache.length == before
    lists.step(cache, 3)


def test_a_model_of_full_layers_goes_back_anywhere() -> None:
    facts = config(5, "ff")
    cache, lists = KVCache(facts, slack=0), Lists(facts, torch.float32)
    lists.step(cache, 150)
    cache.truncate(7)
    lists.step(cache, 20)


def test_going_back_below_a_snapshot_makes_it_stale() -> None:
    facts = config(5)
    cache, lists = KVCache(facts), Lists(facts, torch.float32)
    lists.step(cache, 20)
    early = cache.snapshot()
    lists.step(cache, 20)
    late = cache.snapshot()
    cache.restore(early)
    with pytest.raises(UsageError, match="snapshot at 40"):
        cache.restore(late)
    cache.restore(early)
    other = KVCache(facts)
    with pytest.raises(UsageError, match="snapshot at 20"):
        other.restore(early)
    cache.clear()
    assert cache.length == 0 and early.stale
    lists.step(cache, 50)


def test_sliding_layers_take_the_same_bytes_from_1k_to_32k_tokens() -> None:
    facts = config(129)
    cache = KVCache(facts)
    sizes: dict[int, dict[str, int]] = {}
    for target in (1024, 4096, 32768):
        while cache.length < target:
            n = min(512, target - cache.length)
            for spec in facts.layers:
                cache.append(
                    spec.index,
                    torch.zeros(n, spec.kv_heads, spec.head_dim),
                    torch.zeros(n, spec.kv_heads, spec.v_head_dim),
                )
            cache.advance(n)
        sizes[target] = cache.nbytes
    spec = facts.layers[1]
    row = spec.kv_heads * (spec.head_dim + spec.v_head_dim) * 4
    wanted = 2 * (129 - 1 + cache.slack + SPARE_ROWS) * row
    assert [s["swa"] for s in sizes.values()] == [wanted] * 3
    held = sum(layer.k.untyped_storage().nbytes() for layer in cache.layers[1::2])
    held += sum(layer.v.untyped_storage().nbytes() for layer in cache.layers[1::2])
    assert held == wanted
    assert sizes[32768]["full"] > 20 * sizes[1024]["full"]


def test_full_layers_grow_by_half_not_by_rows() -> None:
    facts = config(5)
    cache, lists = KVCache(facts), Lists(facts, torch.float32)
    sizes = set()
    for _ in range(300):
        lists.step(cache, 1)
        sizes.add(cache.nbytes["full"])
    assert len(sizes) <= 6
    hinted = KVCache(facts, capacity_hint=400)
    before = hinted.nbytes
    Lists(facts, torch.float32).step(hinted, 400)
    assert hinted.nbytes == before


def test_bf16_storage_takes_half_the_bytes() -> None:
    facts = config(9)
    wide, narrow = (
        KVCache(facts, dtype=d, capacity_hint=64) for d in (torch.float32, torch.bfloat16)
    )
    assert {k: n // 2 for k, n in wide.nbytes.items()} == narrow.nbytes


def test_int8_is_for_full_layers_and_takes_half_of_bf16_and_the_scales() -> None:
    facts = config(9)
    narrow, coded = (
        KVCache(facts, dtype=d, capacity_hint=64) for d in (torch.bfloat16, torch.int8)
    )
    heads = sum(spec.kv_heads for spec in facts.layers if spec.window is None)
    assert coded.nbytes["swa"] == narrow.nbytes["swa"]
    assert coded.nbytes["full"] == narrow.nbytes["full"] // 2 + 64 * heads * 2 * 4
    assert coded.snapshot().nbytes == narrow.snapshot().nbytes


def test_codes_are_the_kernels_own_and_tell_bad_rows() -> None:
    x = torch.randn(6, 3, 24) * torch.tensor([1e-3, 1.0, 1e4])[:, None]
    x[1, 0], x[2, 1, 5], x[3, 2, 0], x[4, 0] = 0.0, torch.nan, -torch.inf, 1e-33
    codes, scales = coded(x)
    bad = torch.zeros(6, 3, dtype=torch.bool)
    bad[2, 1] = bad[3, 2] = True
    assert torch.equal(scales.isnan(), bad)
    assert scales[1, 0] == scales[4, 0] == 0
    plain = ~bad & (scales > 0)
    assert (codes.abs().amax(-1) == 127)[plain].all()
    error = (codes * scales[..., None] - x).abs().amax(-1)
    assert (error <= 0.5001 * scales)[plain].all()


def test_a_cache_filled_in_inference_mode_can_be_restored_outside() -> None:
    facts = config(5)
    with torch.inference_mode():
        cache, lists = KVCache(facts), Lists(facts, torch.float32)
        lists.step(cache, 100)
    snapshot = cache.snapshot()
    lists.step(cache, 1)
    cache.restore(snapshot)
    lists.step(cache, 50)
