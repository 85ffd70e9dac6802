"""shape_runs: what one timed run does to the model, and which bytes it is said to read."""

from __future__ import annotations

import pytest
import torch

from mimo_local import kernels, ops
from mimo_local.random_weights import RandomWeights, shape_config
from mimo_local.shape_bench import build
from mimo_local.shape_runs import START, AttentionCase, Slice

torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Slice:
    weights = RandomWeights(shape_config(3, 256, shape="tiny"))
    return Slice(weights, *build(weights), most_rows=4)


def test_rows_leave_the_sequence_as_it_was(tiny: Slice) -> None:
    tiny.restart()
    for n in (1, 4, 2, 3, 1):
        assert 0 < tiny.rows(n) < 10
        assert 0 < tiny.rows(n, same=True) < 10
        assert tiny.runner.cache.length == START


def test_same_means_the_same_experts_for_all_rows(
    tiny: Slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.Tensor] = []
    run = tiny.store.run

    def spy(layer: int, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        chosen.append(ids)
        return run(layer, x, ids, w)

    monkeypatch.setattr(tiny.store, "run", spy)
    tiny.experts(4, same=True)
    assert [ids.shape for ids in chosen] == 2 * [(4, 4)]
    assert all(torch.equal(ids, ids[:1].expand_as(ids)) for ids in chosen)
    chosen.clear()
    tiny.experts(4)
    assert any(not torch.equal(ids, ids[:1].expand_as(ids)) for ids in chosen)
    assert all(len(set(row)) == 4 for ids in chosen for row in ids.tolist())


def test_a_prompt_is_a_new_sequence(tiny: Slice) -> None:
    tiny.restart()
    assert 0 < tiny.prompt(33) < 30
    assert tiny.runner.cache.length == 33


def test_bytes_of_keys_and_values_by_hand() -> None:
    spec = shape_config(1, 256).layers[0]
    case = AttentionCase(spec, 96, cold=1 << 20)
    assert case.nbytes == 96 * 4 * (192 + 128) * 2 == 96 * 2560
    assert len(case.views) == 5
    assert case.views[4].k.shape == (96, 4, 192) and case.views[4].v.shape == (96, 4, 128)
    coded = AttentionCase(spec, 96, dtype=torch.int8, cold=1 << 20)
    assert coded.nbytes == 96 * 4 * (192 + 128 + 2 * 4)


@pytest.mark.parametrize("shape", ["tiny", "real"])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 1), (torch.int8, 1), (torch.int8, 3)])
def test_the_attention_measured_is_the_models_own(
    shape: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = shape_config(1, 256, shape=shape).layers[0]
    case = AttentionCase(spec, 1070, dtype=dtype, rows=rows, cold=1)
    k, v = case.views[1].numbers()
    expected = ops.attention(case.q, k, v, start=1070 - rows, first=0, window=None, sink=None)
    torch.testing.assert_close(case.attend(1), expected, rtol=2e-3, atol=2e-3)
    assert 0 < case.seconds() < 10
    monkeypatch.setattr(kernels, "get", lambda: None)
    torch.testing.assert_close(case.attend(1), expected, rtol=1e-5, atol=1e-5)
