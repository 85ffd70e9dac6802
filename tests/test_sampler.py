"""Filters against transformers' processors; how draws spread and repeat; bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mimo_local.errors import ModelFilesError, UsageError
from mimo_local.sampler import (
    MAX_SEED,
    Sampler,
    SamplingParams,
    candidates,
    counted_penalties,
    nucleus,
    repetition_penalty,
    uniform,
)

torch.set_num_threads(1)  # tiny products: a second thread only waits
VOCAB = 97


def make_logits(seed: int, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def expected(logits: torch.Tensor, ids: list[int], params: SamplingParams) -> torch.Tensor:
    """Probabilities (V,) by transformers' own processors, in transformers' own order."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.repetition_penalty != 1:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([ids]), logits[None].clone())[0].softmax(-1)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.85, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.1, 2.0, 0.7]),
    ids=st.lists(st.integers(0, VOCAB - 1), max_size=30),
)
def test_filters_equal_transformers(
    seed: int,
    scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    ids: list[int],
) -> None:
    logits = make_logits(seed, scale)
    params = SamplingParams(temperature, top_p, top_k, min_p, penalty)
    want = expected(
        logits, ids or [0], params if ids else SamplingParams(temperature, top_p, top_k, min_p)
    )
    got_ids, weights = candidates(repetition_penalty(logits, ids, penalty), params)
    got = torch.zeros(VOCAB).index_put((got_ids,), weights / weights.sum())
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


def test_filters_leave_their_input_alone() -> None:
    logits = make_logits(0)
    before = logits.clone()
    Sampler(SamplingParams(seed=1, top_k=9, repetition_penalty=1.5)).draw(logits, 3, [1, 2])
    assert torch.equal(logits, before)


def test_penalty_counts_an_id_once_and_takes_tensors() -> None:
    logits = torch.tensor([2.0, -2.0, 0.0, 4.0])
    want = torch.tensor([1.0, -4.0, 0.0, 4.0])
    assert torch.equal(repetition_penalty(logits, [0, 1, 0, 2, 1], 2.0), want)
    assert torch.equal(repetition_penalty(logits, torch.tensor([0, 1, 0, 2]), 2.0), want)


def test_nucleus_is_the_smallest_set_even_when_flat() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert nucleus(weights, 0.5).tolist() == [1, 3]
    assert nucleus(weights, 0.3).tolist() == [1]
    assert nucleus(weights, 0.99).tolist() == [1, 3, 2, 0]
    assert len(nucleus(torch.ones(1000), 0.5)) == 500


@given(
    seed=st.integers(0, MAX_SEED),
    position=st.integers(0, 1 << 20),
    logits_seed=st.integers(0, 50),
)
@settings(max_examples=50, deadline=None)
def test_a_draw_depends_on_seed_and_position_alone(
    seed: int, position: int, logits_seed: int
) -> None:
    params = SamplingParams(seed=seed, temperature=1.5)
    logits = make_logits(logits_seed)
    busy = Sampler(params)
    for other in range(5):
        busy.draw(make_logits(other), other)
    assert busy.draw(logits, position) == Sampler(params).draw(logits, position)


def test_random_numbers_are_uniform_and_unrelated_between_neighbours() -> None:
    n = 20_000
    for seed in (0, 1, MAX_SEED):
        u = torch.tensor([uniform(seed, p) for p in range(n)], dtype=torch.float64)
        assert float(u.min()) >= 0 and float(u.max()) < 1
        # Chi-square over 100 bins, 99 degrees of freedom: 161 is exceeded once in 10^4 seeds.
        bins = torch.histc(u, 100, 0, 1)
        assert float(((bins - n / 100) ** 2 / (n / 100)).sum()) < 161
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 4 / math.sqrt(n)
    by_seed = torch.tensor([[uniform(s, p) for p in range(50)] for s in range(400)])
    assert abs(float(torch.corrcoef(by_seed)[0, 1:].mean())) < 0.05


def test_draws_follow_the_filtered_distribution() -> None:
    logits = make_logits(4, vocab=12)
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=7)
    want = expected(logits, [0], params)
    n = 20_000
    sampler = Sampler(params)
    counts = Counter(sampler.draw(logits, position) for position in range(n))
    assert set(counts) == set(want.nonzero().flatten().tolist())
    for token, count in counts.items():
        p = float(want[token])
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)), token


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.5])
    assert Sampler(SamplingParams(temperature=0)).draw(logits, 0) == 1
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=2)).draw(logits, 0, [1]) == 2


def test_a_missing_seed_is_chosen_once_and_reported() -> None:
    first, second = Sampler(SamplingParams()), Sampler(SamplingParams())
    assert first.params.seed is not None
    assert first.params.seed != second.params.seed
    again = Sampler(first.params)
    logits = make_logits(1)
    assert [first.draw(logits, p) for p in range(20)] == [again.draw(logits, p) for p in range(20)]


def test_masked_ids_are_never_drawn() -> None:
    logits = torch.full((50,), -math.inf)
    logits[[3, 30]] = 0.0
    for params in (SamplingParams(top_p=1.0, seed=0), SamplingParams(top_p=0.99, seed=0)):
        drawn = {Sampler(params).draw(logits, p) for p in range(200)}
        assert drawn == {3, 30}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = make_logits(0)
    logits[5] = bad
    with pytest.raises(ModelFilesError):
        Sampler(SamplingParams(temperature=temperature, seed=0)).draw(logits, 0)
    with pytest.raises(ModelFilesError):
        Sampler(SamplingParams(seed=0)).draw(torch.full((9,), -math.inf), 0)


def test_presence_counts_once_and_frequency_every_time() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, -4.0])
    want = torch.tensor([1.0 - 0.5 - 3 * 0.25, 2.0, 3.0, -4.0 - 0.5 - 0.25])
    assert torch.equal(counted_penalties(logits, [0, 3, 0, 0], 0.5, 0.25), want)
    assert torch.equal(counted_penalties(logits, torch.tensor([0, 3, 0, 0]), 0.5, 0.25), want)
    assert counted_penalties(logits, [0], 0.0, 0.0) is logits
    assert counted_penalties(logits, [], 0.5, 0.5) is logits
    params = SamplingParams(temperature=0, frequency_penalty=2)
    assert Sampler(params).draw(torch.tensor([1.5, 3.0]), 0, [1]) == 0
    assert Sampler(params).draw(torch.tensor([0.5, 3.0]), 0, [1]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"max_tokens": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
    ],
)
def test_impossible_parameters_name_themselves(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_importing_the_parameters_is_light() -> None:
    code = "import sys, mimo_local.sampler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
