"""random_weights: the real model's shapes and bytes, counted by hand; numbers that stay finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mimo_local.errors import NotEnoughMemoryError, UsageError
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.random_weights import REST_FORMATS, RandomWeights, shape_config
from mimo_local.shape_bench import build, real_shape_model
from quant.formats import FORMATS

torch.set_num_threads(1)
EXPERTS = [name for name in ("nf4", "mxfp4", "int8") if name in FORMATS]


def model_of(weights: RandomWeights) -> Model:
    return Model(weights, ExpertStore(weights))


def hidden(model: Model, ids: list[int]) -> torch.Tensor:
    return model.forward([Segment(torch.tensor(ids), model.new_cache())])


def test_the_slice_is_the_real_models_first_layers() -> None:
    config = shape_config(7, 32768)
    assert [spec.attention for spec in config.layers] == [
        "full", "sliding", "sliding", "sliding", "sliding", "full", "sliding",
    ]  # fmt: skip
    assert [spec.mlp for spec in config.layers] == ["dense"] + 6 * ["moe"]
    full, sliding = config.layers[0], config.layers[1]
    shape = (full.heads, full.kv_heads, full.head_dim, full.v_head_dim, full.rotary_dim)
    assert shape == (64, 4, 192, 128, 64)
    assert (sliding.heads, sliding.kv_heads, sliding.window) == (64, 8, 129)
    assert (full.window, full.has_sink, sliding.has_sink) == (None, False, True)
    assert (full.intermediate, sliding.intermediate) == (16384, 2048)
    assert (config.hidden_size, config.n_experts, config.experts_per_token) == (4096, 256, 8)
    assert (config.vocab_size, config.n_mtp_layers) == (32768, 0)


def test_bytes_and_weights_of_a_token_by_hand() -> None:
    weights = RandomWeights(shape_config(2, 32768))
    # 3 x 2048 x 4096 weights at 4 bit, and a float16 per 64 of them
    assert weights.one_expert_nbytes == 25_165_824 // 2 + 25_165_824 // 64 * 2 == 13_369_344
    q, o, k, v = 12288 * 4096, 4096 * 8192, (768 + 1536) * 4096, (512 + 1024) * 4096
    rows = 2 * (12288 + 4096) + 768 + 1536 + 512 + 1024  # int8: a float32 each
    dense = 3 * 16384 * 4096
    assert weights.touched() == {
        "attention": 2 * (q + o) + k + v + 4 * rows,
        "dense": dense + 4 * (2 * 16384 + 4096),
        "head": 32768 * 4096 + 4 * 32768,
        "experts": 8 * 13_369_344,
        "exact": 4 * (256 * 4096 + 256 + 5 * 4096 + 64),  # router, its bias, five norms, one sink
    }
    assert weights.active() == {
        "attention": 2 * (q + o) + k + v,
        "dense": dense,
        "head": 32768 * 4096,
        "experts": 8 * 3 * 2048 * 4096,
        "exact": 256 * 4096,
    }
    assert weights.expert_nbytes == 256 * 13_369_344
    embedding = 32768 * 4096 + 4 * 32768
    touched = sum(weights.touched().values()) - 8 * 13_369_344
    assert weights.nbytes == weights.expert_nbytes + touched + embedding


def test_a_whole_token_of_the_real_model_is_what_the_design_says() -> None:
    weights = RandomWeights(shape_config(48, 152_576))
    assert weights.touched()["experts"] == pytest.approx(5.03e9, rel=1e-3)
    assert weights.active()["experts"] == 9_462_349_824
    rest = sum(weights.active().values()) - 9_462_349_824
    assert rest == pytest.approx(5.36e9, rel=1e-3)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("rest", REST_FORMATS)
def test_activations_stay_near_one_in_every_format(experts: str, rest: str) -> None:
    config = shape_config(3, 256, shape="tiny")
    weights = RandomWeights(config, experts=experts, rest=rest)
    model = model_of(weights)
    out = model.logits(hidden(model, [3, 200, 77, 5]))
    assert out.isfinite().all()
    assert 0.3 < float(out.std()) < 3
    expert = weights.expert(1, 0)
    std = float(expert.gate.format.unpack(expert.gate.parts).std()) * math.sqrt(expert.gate.cols)
    assert 0.6 < std < 1.7


def test_experts_are_memory_of_their_own() -> None:
    weights = RandomWeights(shape_config(2, 256, shape="tiny"))
    one, two = weights.expert(1, 0), weights.expert(1, 1)
    spans = sorted(
        (part.data_ptr(), part.data_ptr() + part.nbytes)
        for expert in (one, two)
        for linear in (expert.gate, expert.up, expert.down)
        for part in linear.parts.values()
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert not torch.equal(one.gate.parts["codes"], two.gate.parts["codes"])
    assert one.nbytes == weights.one_expert_nbytes


def test_int8_codes_never_are_minus_128() -> None:
    weights = RandomWeights(shape_config(2, 256, shape="tiny"), experts="int8")
    codes = [
        weights.linear("lm_head.weight").parts["codes"],
        weights.expert(1, 0).up.parts["codes"],
    ]
    assert all(
        int(code.min()) == -127 and len(set(code.view(-1).tolist())) == 255 for code in codes
    )


def test_steering_sends_every_row_to_the_chosen_experts() -> None:
    class Poisoned(RandomWeights):
        """Only experts 1, 4, 9 and 12 hold numbers."""

        def expert(self, layer: int, e: int):  # type: ignore[no-untyped-def]
            expert = super().expert(layer, e)
            if e not in (1, 4, 9, 12):
                expert.down.parts["scales"].fill_(torch.nan)
            return expert

    weights = Poisoned(shape_config(3, 256, shape="tiny"))
    model = model_of(weights)
    ids = list(range(12))
    assert hidden(model, ids).isnan().any()
    weights.steer(lambda: [1, 4, 9, 12])
    assert hidden(model, ids).isfinite().all()
    weights.steer(None)
    assert hidden(model, ids).isnan().any()


def test_what_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for layers, vocab in ((0, 256), (49, 256), (2, 255), (2, 152_577)):
        with pytest.raises(UsageError):
            shape_config(layers, vocab)
    config = shape_config(2, 256, shape="tiny")
    with pytest.raises(UsageError, match="no format for experts"):
        RandomWeights(config, experts="bf16")
    with pytest.raises(UsageError, match="no format for the rest"):
        RandomWeights(config, rest="q4")
    with pytest.raises(UsageError, match="no shape"):
        shape_config(2, 256, shape="huge")
    monkeypatch.setattr("mimo_local.shape_bench.available_memory", lambda: 1 << 20)
    with pytest.raises(NotEnoughMemoryError) as error:
        build(RandomWeights(config), spare=1 << 30)
    assert "--layers" in error.value.hint
    assert "1.1 GB" in error.value.message


def test_real_shape_model_is_a_model_that_answers() -> None:
    model = real_shape_model(2, 256, shape="tiny")
    assert model.config.n_layers == 2
    assert hidden(model, [1, 2, 3]).isfinite().all()
