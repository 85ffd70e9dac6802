"""Replay against a loop that counts by hand; and what the synthetic traces promise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.errors import UsageError
from mimo_local.events import Progress
from mimo_local.experts.policy import Key, Lru
from mimo_local.replay import POLICIES, SHARES, Replay
from mimo_local.routing_trace import Facts, RoutingTrace, Text
from mimo_local.synthetic_routing import Routing, synthetic


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return synthetic(240, layers=3, n_experts=32, k=4, guesses=True, seed=1)


def by_hand(trace: RoutingTrace, capacity: int, rows: int, prefetch: int) -> dict[str, int]:
    """LRU, one entry at a time."""
    policy, count = (
        Lru(capacity),
        dict.fromkeys(
            ("wanted", "hits", "prefetched", "prefetch_hits", "prefetch_wasted", "reads"), 0
        ),
    )
    layers = trace.facts.layers
    for s in range(trace.tokens // rows):
        staged: set[Key] = set()
        for i, layer in enumerate(layers):
            ids = trace.ids[s * rows : (s + 1) * rows, i].ravel()
            wanted = list(dict.fromkeys((layer, int(e)) for e in ids))
            missing = [key for key in wanted if not policy.touch(key)]
            count["wanted"] += len(wanted)
            count["hits"] += len(wanted) - len(missing)
            count["prefetch_hits"] += sum(key in staged for key in missing)
            count["prefetch_wasted"] += sum(key not in missing for key in staged)
            for key in missing:
                if s >= trace.tokens // rows // 2:
                    count["reads"] += key not in staged
                if any(held not in wanted for held in policy) or len(policy) < capacity:
                    policy.insert(key, wanted)
            staged = set()
            if prefetch and i + 1 < len(layers):
                assert trace.guesses is not None
                guessed = trace.guesses[s * rows : (s + 1) * rows, i, :prefetch].ravel()
                keys = {(layers[i + 1], int(e)) for e in guessed}
                staged = {key for key in keys if key not in policy}
                count["prefetched"] += len(staged)
                count["reads"] += len(staged) * (s >= trace.tokens // rows // 2)
    return count


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_counts_are_those_of_a_loop_by_hand(
    trace: RoutingTrace, share: float, rows: int, prefetch: int
) -> None:
    found = Replay(trace, rows=rows, prefetch=prefetch).play("lru", share)
    wanted = by_hand(trace, round(share * 96), rows, prefetch)
    assert found.steady_reads == wanted.pop("reads")
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.tokens == 240 // rows * rows
    assert found.hit_rate == wanted["hits"] / wanted["wanted"]
    if share == 1:
        assert found.wanted - found.hits == len(set(Replay(trace, rows=rows).future()))


@pytest.mark.parametrize("rows", [1, 4])
def test_no_policy_beats_the_oracle_and_more_room_never_hurts_it(
    trace: RoutingTrace, rows: int
) -> None:
    replay = Replay(trace, rows=rows)
    for share in SHARES:
        best = replay.play("belady", share).hits
        for name in POLICIES:
            assert replay.play(name, share).hits <= best, (name, share)
    rates = [replay.play("belady", share).hits for share in SHARES]
    assert all(a <= b for a, b in pairwise(rates))


def test_recency_over_all_layers_thrashes_below_one_rounds_experts() -> None:
    trace = synthetic(200, layers=8, n_experts=64, k=8, routing=Routing(reuse=0.4), seed=2)
    replay = Replay(trace)
    share = 40 / 512  # a token wants 64 experts
    recent = replay.play("lru", share).steady_rate
    for name in ("layer-lru", "layer-lfru-8"):
        assert replay.play(name, share).steady_rate > 2 * recent


def test_slow_admission_takes_in_one_per_layer_and_step(trace: RoutingTrace) -> None:
    found = Replay(trace).play("lfru-slow", 0.3)
    assert 0 < found.uploads <= 240 * 3
    assert found.uploads < Replay(trace).play("lru", 0.3).uploads / 4


def test_pins_come_from_the_first_half(trace: RoutingTrace) -> None:
    replay = Replay(trace)
    counts: dict[Key, int] = {}
    for t in range(120):
        for i, layer in enumerate(trace.facts.layers):
            for e in trace.ids[t, i].tolist():
                counts[layer, e] = counts.get((layer, e), 0) + 1
    assert replay.hottest() == sorted(counts, key=lambda key: (-counts[key], key))


def test_the_table_names_every_pair_and_reports(trace: RoutingTrace) -> None:
    seen: list[Progress] = []
    results = Replay(trace).table(["lru", "belady"], [0.1, 0.5], seen.append)
    assert [(r.policy, r.share) for r in results] == [
        ("lru", 0.1), ("lru", 0.5), ("belady", 0.1), ("belady", 0.5),
    ]  # fmt: skip
    assert [(e.done, e.total) for e in seen] == [(n, 4) for n in (1, 2, 3, 4)]
    as_dict = results[0].to_dict(1000)
    assert as_dict["steady_bytes_per_token"] == results[0].steady_reads * 1000 / 120
    assert as_dict["steady_rate"] == as_dict["steady_covered"] == results[0].steady_rate


def test_what_cannot_be_replayed_is_refused(trace: RoutingTrace) -> None:
    silent = RoutingTrace(trace.facts, trace.texts, trace.ids, None)
    with pytest.raises(UsageError, match="no guesses"):
        Replay(silent, prefetch=1)
    with pytest.raises(UsageError, match="no step of 241"):
        Replay(trace, rows=241)
    with pytest.raises(UsageError, match="fifo"):
        Replay(trace).play("fifo", 0.5)
    with pytest.raises(UsageError, match="share"):
        Replay(trace).play("lru", 1.5)


def test_recall_and_distinct_experts_by_hand() -> None:
    facts = Facts("m", (3, 7), n_experts=8, k=2, expert_nbytes=1, n_guesses=2)
    ids = np.array([[[0, 1], [2, 3]], [[1, 2], [2, 3]]], np.uint8)
    guesses = np.array([[[3, 5]], [[3, 2]]], np.uint8)
    trace = RoutingTrace(facts, (Text("x", 2),), ids, guesses)
    assert Replay(trace, prefetch=2).recall() == 3 / 4
    assert Replay(trace, prefetch=1).recall() == 2 / 4
    assert Replay(trace, rows=2, prefetch=2).recall() == 1
    assert Replay(trace).distinct() == 2
    assert Replay(trace, rows=2).distinct() == 5 / 2


# -- synthetic traces ------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 4), st.sampled_from([4, 300]), st.integers(1, 4),
    st.integers(0, 99),
)  # fmt: skip
def test_a_synthetic_row_chooses_k_different_experts(
    tokens: int, layers: int, n_experts: int, k: int, seed: int
) -> None:
    made = synthetic(tokens, layers=layers, n_experts=n_experts, k=k, seed=seed, guesses=layers > 1)
    assert made.ids.shape == (tokens, layers, k) and made.ids.dtype == made.facts.dtype
    assert made.ids.min() >= 0 and made.ids.max() < n_experts
    assert (np.diff(made.ids.astype(int), axis=-1) > 0).all()
    again = synthetic(
        tokens, layers=layers, n_experts=n_experts, k=k, seed=seed, guesses=layers > 1
    )
    np.testing.assert_array_equal(made.ids, again.ids)
    if made.guesses is not None:
        assert again.guesses is not None and made.guesses.shape == (tokens, layers - 1, k)
        np.testing.assert_array_equal(made.guesses, again.guesses)


def shared(trace: RoutingTrace) -> float:
    """Part of a token's experts the token before had too."""
    a = trace.ids
    return float((a[1:, :, :, None] == a[:-1, :, None, :]).any(-1).mean())


def test_synthetic_routing_is_as_sticky_and_skewed_as_was_reported() -> None:
    trace = synthetic(700, layers=4, guesses=True, seed=5)
    assert 0.26 < shared(trace) < 0.41
    assert shared(synthetic(300, layers=4, routing=Routing(zipf=0, reuse=0))) < 0.05
    replay = Replay(trace, prefetch=8)
    assert replay.recall() == pytest.approx(0.72, abs=0.02)
    assert Replay(trace, prefetch=4).recall() > 0.72 / 2, "the right ones come first"
    rates = {share: replay.play("lru", share).steady_rate for share in (0.08, 0.18, 0.30)}
    assert rates[0.08] == pytest.approx(0.44, abs=0.06)
    assert rates[0.18] == pytest.approx(0.60, abs=0.06)
    assert rates[0.30] == pytest.approx(0.71, abs=0.06)
