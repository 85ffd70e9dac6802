"""Recording: a trace holds what the router chose, whatever the chunks, and what it would have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from mimo_local import ops, tracing
from mimo_local.errors import UsageError
from mimo_local.experts.store import ExpertStore
from mimo_local.experts.tiered import TieredStore
from mimo_local.layers import MoE
from mimo_local.model import Model, Segment
from mimo_local.routing_trace import RoutingTrace, Text, TraceWriter
from mimo_local.sampler import SamplingParams
from mimo_local.tracing import Tracer, facts_of, store_of
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

D: dict[str, Any] = tiny.config("sfsf", "dmmm", experts=8, top_k=3, n_group=2, topk_group=1)
IDS = [int(i) for i in torch.randint(0, 64, (300,), generator=torch.Generator().manual_seed(4))]


def build(folder: Path, config: dict[str, Any] = D) -> Model:
    weights = open_weights(tiny.write(folder / "m", config))
    return Model(weights, ExpertStore(weights))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build(tmp_path_factory.mktemp("tracing"))


def choices(model: Model, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(T, 3, K) sorted and (T, 2, K) best first, from the residual streams of one forward."""
    seen: dict[str, torch.Tensor] = {}
    segment = Segment(torch.tensor(ids), model.new_cache())
    model.forward([segment], trace=lambda name, x: seen.__setitem__(name, x.clone()))
    chosen, guessed = [], []
    for i in (1, 2, 3):
        before = seen[f"layers.{i - 1}"] + seen[f"layers.{i}.attention"]
        for layer, out in ((model.layers[i], chosen), (model.layers[(i + 1) % 4], guessed)):
            if not isinstance(layer.mlp, MoE):
                continue
            x = ops.rms_norm(before, layer.post_norm, model.config.rms_eps)
            ids_, _ = ops.route(x, layer.mlp.router, layer.mlp.bias, model.config)
            if out is guessed:
                votes = ops.election(ops.scores(x, layer.mlp.router), layer.mlp.bias, model.config)
                order = votes.gather(1, ids_).argsort(-1, descending=True)
                ids_ = ids_.gather(1, order)
            out.append(ids_.numpy())
    return np.sort(np.stack(chosen, 1), -1), np.stack(guessed, 1)


def test_a_text_is_traced_as_one_forward_would_choose(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CHUNK", 37)
    told: list[int] = []
    facts = facts_of(model, "tiny", 1234, guesses=True)
    with TraceWriter(tmp_path / "t", facts) as out, Tracer(model, model.new_cache, out, 250) as t:
        t.read(IDS, "some text", on_token=told.append)
    found = RoutingTrace.read(tmp_path / "t")
    assert sum(told) == found.tokens == 300 and max(told) == 37
    assert found.texts == (Text("some text", 250), Text("some text", 50)), "as the context allows"
    assert found.facts.layers == (1, 2, 3) and found.facts.expert_nbytes == 1234
    assert found.guesses is not None
    for part in (slice(0, 250), slice(250, 300)):
        chosen, guessed = choices(model, IDS[part])
        # Chunks round differently: a near tie may fall the other way.
        assert (np.sort(found.ids[part], -1) == chosen).mean() > 0.995
        assert (found.guesses[part] == guessed).mean() > 0.99


def test_an_answer_is_traced_up_to_the_id_that_was_never_forwarded(
    model: Model, tmp_path: Path
) -> None:
    params = SamplingParams(temperature=0, max_tokens=6)
    with (
        TraceWriter(tmp_path / "t", facts_of(model, "tiny", 1)) as out,
        Tracer(model, model.new_cache, out, 100) as tracer,
    ):
        answer = tracer.answer(IDS[:20], "prompt", params)
        stopped = tracer.answer(IDS[:20], "again", params, stop_ids={answer[0]})
        tracer.context = 22
        full = tracer.answer(IDS[:20], "full", params)
    found = RoutingTrace.read(tmp_path / "t")
    assert len(answer) == 6 and stopped == [] and full == answer[:3]
    assert found.texts == (Text("prompt", 20, 5), Text("again", 20), Text("full", 20, 2))
    assert found.is_answer.sum() == 7 and found.guesses is None
    chosen, _ = choices(model, IDS[:20] + answer[:5])
    assert (np.sort(found.ids[:25], -1) == chosen).mean() > 0.98


def test_a_stop_keeps_the_chunks_that_were_finished(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CHUNK", 50)
    seen: list[int] = []
    with (
        TraceWriter(tmp_path / "t", facts_of(model, "tiny", 1)) as out,
        Tracer(model, model.new_cache, out, 1000) as tracer,
    ):
        tracer.read(IDS, "text", on_token=seen.append, cancel=lambda: len(seen) == 2)
        params = SamplingParams(temperature=0, max_tokens=50)
        tracer.answer(IDS[:20], "a", params, on_token=seen.append, cancel=lambda: len(seen) == 6)
        assert tracer.answer(IDS[:20], "b", params, cancel=lambda: True) == []
    assert RoutingTrace.read(tmp_path / "t").texts == (Text("text", 100), Text("a", 20, 2))


def test_the_store_serves_as_before_afterwards(model: Model, tmp_path: Path) -> None:
    store = store_of(model)
    with (
        TraceWriter(tmp_path / "t", facts_of(model, "tiny", 1)) as out,
        Tracer(model, model.new_cache, out, 100) as tracer,
    ):
        assert not store.resident(1)
        with pytest.raises(UsageError, match="does not fit"):
            tracer.answer(IDS, "long", SamplingParams())
    assert store.resident(1)
    assert not (tmp_path / "t").exists()


def test_tiers_choose_as_ram_does(tmp_path: Path) -> None:
    config = tiny.config("fsfs", "dmmm", experts=8, top_k=3, hidden=64, moe_intermediate=64)
    convert(tiny.write(tmp_path / "m", config), tmp_path / "pack", Recipe.for_format("nf4"))
    traces = []
    for tiered in (False, True):
        weights = open_weights(tmp_path / "pack")
        assert isinstance(weights, PackWeights)
        room = 10 * weights.pack.expert_layout(1).stride
        store = TieredStore(weights, room, reserve=0) if tiered else ExpertStore(weights)
        model = Model(weights, store)
        path = tmp_path / f"{tiered}"
        with (
            TraceWriter(path, facts_of(model, "m", 1, guesses=True)) as out,
            Tracer(model, model.new_cache, out, 100) as tracer,
        ):
            tracer.answer(IDS[:20], "a", SamplingParams(temperature=0, max_tokens=9))
        if isinstance(store, TieredStore):
            store.close()
        traces.append(RoutingTrace.read(path))
    ram, disk = (np.sort(trace.ids, -1) for trace in traces)
    np.testing.assert_array_equal(ram, disk)
    assert traces[0].guesses is not None and traces[1].guesses is not None
    np.testing.assert_array_equal(traces[0].guesses, traces[1].guesses)


def test_a_model_without_experts_has_nothing_to_trace(tmp_path: Path) -> None:
    dense = build(tmp_path, tiny.config("fs", "dd"))
    with pytest.raises(UsageError, match="no experts"):
        facts_of(dense, "dense", 1)


def test_one_mixture_layer_has_nobody_to_guess_about(tmp_path: Path) -> None:
    assert facts_of(build(tmp_path, tiny.config("fs", "dm")), "m", 1, guesses=True).n_guesses == 0
