"""The model against transformers (float32, eager), and against itself in other cuts of the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local.cache import KVCache
from mimo_local.errors import CancelledError, ContextOverflowError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.store import ExpertStore
from mimo_local.layers import Layer, MoE
from mimo_local.model import Model, Segment
from mimo_local.weights import QuantLinear, open_weights
from quant.convert import Recipe, convert

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "as the real model, small": ({"attention": "fssssf", "mlp": "dmmmmm", "window": 9}, 40),
    "all full, no sinks anywhere": ({"attention": "fff", "mlp": "dmm", "swa_sink": False}, 21),
    "all sliding, window 1": ({"attention": "sss", "mlp": "dmm", "window": 1}, 20),
    "window 2, groups of 3": ({"heads": 6, "kv_heads": 1, "swa_kv_heads": 2, "window": 2}, 25),
    "window 17, odd head sizes": (
        {"head_dim": 11, "v_head_dim": 7, "rotary": 0.6, "window": 17, "hidden": 33},
        50,
    ),
    "window longer than the text": ({"window": 100}, 30),
    "no sinks": ({"swa_sink": False, "window": 5}, 30),
    "sinks in both kinds": ({"full_sink": True, "window": 4}, 30),
    "sinks in full layers only": ({"full_sink": True, "swa_sink": False, "window": 6}, 30),
    "routing in groups": (
        {"experts": 16, "n_group": 4, "topk_group": 2, "top_k": 3, "scaling": 2.5},
        25,
    ),
    "unnormalised routing, scaled": ({"norm_topk": False, "scaling": 1.7, "top_k": 4}, 25),
    "no value scale, tied embeddings": ({"value_scale": None, "tied": True}, 25),
    "own geometry of sliding layers": (
        {
            "swa_heads": 6, "swa_kv_heads": 3, "swa_head_dim": 16, "swa_v_head_dim": 20,
            "rotary": 0.5, "heads": 8, "kv_heads": 2, "window": 7,
        },
        30,
    ),
    "dense only": ({"attention": "fsf", "mlp": "ddd", "window": 3}, 30),
    "experts only, all chosen": ({"attention": "sf", "mlp": "mm", "experts": 3, "top_k": 3}, 30),
    "rope on whole heads, small bases": (
        {"rotary": 1.0, "theta": 100.0, "swa_theta": 30.0, "attention": "fsss", "window": 11},
        60,
    ),
    "past many windows": ({"attention": "sfs", "mlp": "dmd", "window": 5}, 300),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("way")


def load(folder: Path, **kwargs: Any) -> Model:
    weights = open_weights(folder, **kwargs)
    return Model(weights, ExpertStore(weights))


def logits(model: Model, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
    return model.logits(model.forward([Segment(ids, cache or model.new_cache())]))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Every feature at once; the window is shorter than the texts of the tests."""
    d = tiny.config(
        "fssfs", "dmmmm", window=6, full_sink=True, experts=8, n_group=2, top_k=3, scaling=1.5
    )
    return load(tiny.write(tmp_path_factory.mktemp("small"), d, seed=3))


def ids_for(model: Model, n: int, seed: int = 0) -> torch.Tensor:
    return tiny.prompt({"vocab_size": model.config.vocab_size}, n, seed=seed)


# ---- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    arguments, n = CASES[name]
    d = tiny.config(**arguments)
    seed = list(CASES).index(name)
    state = tiny.state_dict(d, seed=seed)
    model = load(tiny.write(tmp_path / "m", d, state=state))
    ids = tiny.prompt(d, n, seed=seed)
    with torch.no_grad():
        wanted = tiny.oracle(d, state)(ids[None]).logits[0]
    assert relative(logits(model, ids), wanted) < 1e-4
    # The same through a cache, in uneven pieces.
    cache = model.new_cache()
    pieces = [logits(model, part, cache) for part in torch.split(ids, [1, 3, n - 5, 1])]
    assert relative(torch.cat(pieces), wanted) < 1e-4


def test_a_folder_transformers_loads_itself_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import MiMoV2FlashForCausalLM

    d = tiny.config(window=5)
    folder = tiny.write(tmp_path / "m", d, seed=5, shards=3, mtp_layers=1)
    oracle = MiMoV2FlashForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    ids = tiny.prompt(d, 30)
    with torch.no_grad():
        wanted = oracle.eval()(ids[None]).logits[0]
    assert relative(logits(load(folder), ids), wanted) < 1e-4


def _no_sinks(model: Model) -> None:
    for layer in model.layers:
        layer.attention.sink = None


def _value_scale_one(model: Model) -> None:
    for layer in model.layers:
        layer.attention.value_scale = 1.0


def _window_minus_one(model: Model) -> None:
    for layer in model.layers:
        spec = layer.attention.spec
        if spec.window is not None:
            layer.attention.spec = dataclasses.replace(spec, window=spec.window - 1)


def _no_router_bias(model: Model) -> None:
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.bias = torch.zeros_like(layer.mlp.bias)


def _change_routing(**change: Any) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        for layer in model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.config = dataclasses.replace(layer.mlp.config, **change)

    return apply


def _swap_ropes(model: Model) -> None:
    model.ropes = {"full": model.ropes["sliding"], "sliding": model.ropes["full"]}


def _full_sinks_only_in_one_head(model: Model) -> None:
    for layer in model.layers:
        if layer.attention.sink is not None:
            layer.attention.sink = layer.attention.sink.flip(0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: None,
        _no_sinks,
        _full_sinks_only_in_one_head,
        _value_scale_one,
        _window_minus_one,
        _no_router_bias,
        _change_routing(routed_scaling_factor=1.0),
        _change_routing(norm_topk_prob=False),
        _change_routing(n_group=1, topk_group=1),
        _swap_ropes,
    ],
)
def test_parity_notices_when_a_feature_breaks(
    damage: Callable[[Model], None], tmp_path: Path
) -> None:
    d = tiny.config(
        window=7, full_sink=True, scaling=1.5, n_group=4, topk_group=1, theta=1000.0, rotary=0.5
    )
    state = tiny.state_dict(d, seed=1)
    model = load(tiny.write(tmp_path / "m", d, state=state))
    ids = tiny.prompt(d, 40)
    with torch.no_grad():
        wanted = tiny.oracle(d, state)(ids[None]).logits[0]
    damage(model)
    difference = relative(logits(model, ids), wanted)
    if getattr(damage, "__name__", "") == "<lambda>":
        assert difference < 1e-4
    else:
        assert difference > 1e-3


# ---- against itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 64, 512])
def test_reading_in_chunks_equals_reading_whole(
    small: Model, chunk: int, dtype: torch.dtype
) -> None:
    ids = ids_for(small, 90)
    whole = small.forward([Segment(ids, small.new_cache(dtype=dtype))])
    seen: list[Progress] = []
    cache = small.new_cache(dtype=dtype)
    last = small.prefill(Segment(ids, cache), chunk=chunk, on_progress=seen.append)
    assert last.shape == (1, small.config.hidden_size) and cache.length == 90
    # A last-bit difference may round the other way: 2^-9 of one key or value, or 1/127.
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.int8: 3e-3}[dtype]
    assert relative(last, whole[-1:]) < bound
    assert [p.done for p in seen] == [*range(chunk, 90, chunk), 90] and seen[-1].total == 90


def test_decoding_equals_the_rows_of_a_prefill(small: Model) -> None:
    ids = ids_for(small, 80)
    wanted = logits(small, ids)
    cache = small.new_cache()
    rows = [logits(small, ids[i : i + 1], cache) for i in range(80)]
    assert relative(torch.cat(rows), wanted) < 1e-5


def test_a_ragged_batch_equals_one_by_one(small: Model) -> None:
    lengths = [(0, 1), (5, 1), (30, 4), (0, 40), (60, 25)]
    texts = [ids_for(small, old + new, seed=i) for i, (old, new) in enumerate(lengths)]
    wanted, segments = [], []
    for ids, (old, _) in zip(texts, lengths, strict=True):
        wanted.append(logits(small, ids)[old:])
        cache = small.new_cache()
        if old:
            small.prefill(Segment(ids[:old], cache))
        segments.append(Segment(ids[old:], cache))
    found = small.logits(small.forward(segments))
    assert relative(found, torch.cat(wanted)) < 1e-5
    assert [s.cache.length for s in segments] == [old + new for old, new in lengths]


def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose rows cannot depend on each other, as the kernels promise for few rows."""
    plain = QuantLinear.__call__
    monkeypatch.setattr(
        QuantLinear, "__call__", lambda self, x: torch.cat([plain(self, row) for row in x.split(1)])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_row_does_not_depend_on_its_company(
    small: Model, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit with the kernels; torch's batched products choose by shape how they add up."""

    def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.equal(found, wanted) if way == "native" else relative(found, wanted) < 1e-6

    row_by_row(monkeypatch)
    ids = ids_for(small, 76)
    alone, caches = [], [small.new_cache(dtype=dtype) for _ in range(3)]
    for cache in caches:
        small.prefill(Segment(ids[:60], cache))
    alone = torch.cat([small.forward([Segment(ids[i : i + 1], caches[0])]) for i in range(60, 76)])
    draft = torch.cat(
        [small.forward([Segment(p, caches[1])]) for p in ids[60:].split([4, 1, 8, 3])]
    )
    assert same(draft, alone)
    other = Segment(ids_for(small, 4, seed=9), small.new_cache(dtype=dtype))
    both = small.forward([other, Segment(ids[60:64], caches[2])])
    assert same(both[4:], alone[:4])


@pytest.mark.parametrize("way", ["native"], indirect=True)
@pytest.mark.parametrize("fmt", ["int8", "bf16"])
def test_with_the_kernels_a_draft_has_the_bits_of_one_token_at_a_time(
    fmt: str, tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "m", tiny.config("fssf", "dmmm", window=6))
    convert(folder, tmp_path / "pack", Recipe.for_format(fmt))
    model = load(tmp_path / "pack")
    ids = ids_for(model, 48)
    one, four = model.new_cache(), model.new_cache()
    alone = torch.cat([logits(model, row, one) for row in torch.split(ids, 1)])
    drafts = torch.cat([logits(model, rows, four) for rows in torch.split(ids, 4)])
    assert torch.equal(alone, drafts)


@pytest.mark.parametrize("at", [10, 33, 41, 75])
def test_truncate_and_redo_equals_straight_on(small: Model, at: int) -> None:
    ids = ids_for(small, 90)
    wanted = logits(small, ids)
    cache = small.new_cache(slack=4)
    small.prefill(Segment(ids[:at], cache), chunk=16)
    for drop in (1, 4, 2, 3):
        start = cache.length
        wrong = ids_for(small, 4, seed=50 + drop)
        small.forward([Segment(wrong, cache)])
        cache.truncate(start + 4 - drop if drop < 4 else start)
        cache.truncate(start)
        found = logits(small, ids[start : start + 1], cache)
        assert relative(found, wanted[start : start + 1]) < 1e-5


def test_a_snapshot_is_a_restart_point(small: Model) -> None:
    ids, other = ids_for(small, 40), ids_for(small, 90, seed=1)
    cache = small.new_cache()
    small.prefill(Segment(ids[:30], cache))
    snapshot = cache.snapshot()
    wanted = logits(small, ids)[30:]
    for _ in range(2):
        small.prefill(Segment(other, cache))
        cache.restore(snapshot)
        assert relative(logits(small, ids[30:], cache), wanted) < 1e-5
        cache.restore(snapshot)


@pytest.mark.parametrize("n_new", [1, 4, 30, 70])
@pytest.mark.parametrize("fail_at", [0, 2, 3])
def test_a_step_that_fails_leaves_the_cache_as_it_was(
    small: Model, n_new: int, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_for(small, 110)
    wanted = logits(small, ids)
    cache = small.new_cache()
    small.prefill(Segment(ids[:37], cache))
    layer, calls = Layer.__call__, [0]
    monkeypatch.setattr(Model, "_at_once", lambda *_: False)  # test_blocks: in one native call

    def failing(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > fail_at:
            raise RuntimeError("power failure")
        return layer(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
        patch.setattr(Layer, "__call__", failing)
        small.forward([Segment(ids_for(small, n_new, seed=8), cache)])
    assert cache.length == 37
    cache.truncate(37 - cache.slack)
    assert relative(logits(small, ids[33:], cache), wanted[33:]) < 1e-5


@pytest.mark.parametrize("layers", [0, 1, 7, 13])
def test_cancelling_keeps_the_chunks_that_were_read(small: Model, layers: int) -> None:
    ids = ids_for(small, 90)
    left = [layers]

    def cancel() -> bool:
        left[0] -= 1
        return left[0] < 0

    cache = small.new_cache()
    with pytest.raises(CancelledError):
        small.prefill(Segment(ids, cache), chunk=40, cancel=cancel)
    assert cache.length == layers // small.config.n_layers * 40
    small.prefill(Segment(ids[cache.length : 89], cache), chunk=40)
    assert relative(logits(small, ids[89:], cache), logits(small, ids)[89:]) < 1e-5


def test_trace_sees_every_layer_and_changes_nothing(small: Model) -> None:
    ids = ids_for(small, 20)
    seen: dict[str, torch.Tensor] = {}
    hidden = small.forward([Segment(ids, small.new_cache())], trace=seen.__setitem__)
    assert torch.equal(hidden, small.forward([Segment(ids, small.new_cache())]))
    layers = [f"layers.{i}" for i in range(small.config.n_layers)]
    parts = [f"{name}{part}" for name in layers for part in (".attention", ".mlp", "")]
    assert list(seen) == ["embedding", *parts, "norm"]
    before = seen["embedding"]
    for name in layers:
        after = before + seen[f"{name}.attention"] + seen[f"{name}.mlp"]
        torch.testing.assert_close(seen[name], after)
        before = seen[name]


def test_a_window_override_reaches_the_attention(tmp_path: Path) -> None:
    d = tiny.config(window=5)
    folder = tiny.write(tmp_path / "m", d)
    ids = tiny.prompt(d, 30)
    plain, wide = logits(load(folder), ids), logits(load(folder, window=12), ids)
    assert relative(wide[:5], plain[:5]) < 1e-5 < relative(wide[5:], plain[5:])


def test_logits_may_be_changed_in_place_by_who_gets_them(small: Model) -> None:
    found = logits(small, ids_for(small, 3))
    found.div_(2.0)
    assert not found.is_inference()


def test_a_forward_refuses_what_it_cannot_process(small: Model) -> None:
    cache, ids = small.new_cache(), ids_for(small, 3)
    with pytest.raises(UsageError, match="no tokens"):
        small.forward([])
    with pytest.raises(UsageError, match="no tokens"):
        small.prefill(Segment(ids[:0], cache))
    with pytest.raises(UsageError, match="share one cache"):
        small.forward([Segment(ids, cache), Segment(ids, cache)])
    for bad in (-1, small.config.vocab_size):
        with pytest.raises(UsageError, match=rf"token id {bad} .* vocabulary of 64"):
            small.forward([Segment(torch.tensor([1, bad]), cache)])
    with pytest.raises(ContextOverflowError, match=r"5000 tokens .* context of 4096"):
        small.prefill(Segment(ids_for(small, 5000), cache))
    assert cache.length == 0
