"""config.json in both spellings, and every way it can be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.config import KNOWN_MODEL_TYPES, ModelConfig
from mimo_local.errors import ConfigError

OWN_KEYS = ("rms_norm_eps", "layer_types", "mlp_layer_types", "rope_parameters")


def hub(**arguments: Any) -> dict[str, Any]:
    """A config with the hub's keys only."""
    return {k: v for k, v in tiny.config(**arguments).items() if k not in OWN_KEYS}


def transformers(**arguments: Any) -> dict[str, Any]:
    """The same model as transformers writes it."""
    from transformers import MiMoV2FlashConfig

    d = tiny.config(**arguments)
    keep = {k: v for k, v in d.items() if not k.startswith(("swa_", "sliding_", "add_"))}
    keep["sliding_window"] = d["sliding_window_size"] + 1
    drop = ("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "rope_theta")
    own = MiMoV2FlashConfig(**{k: v for k, v in keep.items() if k not in drop}).to_dict()
    return {k: v for k, v in own.items() if k != "partial_rotary_factor"}


def test_the_real_model() -> None:
    """Facts of MiMo-V2-Flash that other engines got wrong at one time or another."""
    pattern = [int(not (i == 0 or (i + 1) % 6 == 0)) for i in range(48)]
    config = ModelConfig.from_dict(
        {
            "model_type": "mimo_v2_flash", "num_hidden_layers": 48, "hidden_size": 4096,
            "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192,
            "v_head_dim": 128, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8,
            "swa_head_dim": 192, "swa_v_head_dim": 128, "vocab_size": 152576,
            "intermediate_size": 16384, "moe_intermediate_size": 2048, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "routed_scaling_factor": None, "rope_theta": 5000000, "swa_rope_theta": 10000,
            "partial_rotary_factor": 0.334, "sliding_window": 128, "sliding_window_size": 128,
            "attention_value_scale": 0.707, "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False, "layernorm_epsilon": 1e-5,
            "max_position_embeddings": 262144, "tie_word_embeddings": False,
            "hybrid_layer_pattern": pattern, "moe_layer_freq": [0] + [1] * 47,
            "n_shared_experts": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "hidden_act": "silu", "attention_bias": False,
        }
    )  # fmt: skip
    full = [spec.index for spec in config.layers if spec.attention == "full"]
    assert full == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    ga, swa = config.layers[0], config.layers[1]
    assert (ga.kv_heads, ga.window, ga.has_sink, ga.rope_theta) == (4, None, False, 5e6)
    assert (swa.kv_heads, swa.window, swa.has_sink, swa.rope_theta) == (8, 129, True, 1e4)
    assert ga.rotary_dim == swa.rotary_dim == 64 and ga.head_dim == 192 and ga.v_head_dim == 128
    assert (ga.mlp, ga.intermediate, swa.mlp, swa.intermediate) == ("dense", 16384, "moe", 2048)
    assert config.value_scale == 0.707 and config.routed_scaling_factor == 1.0
    assert config.eos_ids == (151645, 151643)
    assert config.n_mtp_layers == 3 and config.mtp_layer is not None
    assert config.mtp_layer.window == 129 and config.mtp_layer.intermediate == 16384
    assert config.n_layers == 48 and config.is_moe


@pytest.mark.parametrize(
    "arguments",
    [{}, {"window": 1}, {"attention": "ff", "mlp": "dd"}, {"attention": "ss", "mlp": "mm"},
     {"scaling": 2.5, "value_scale": None, "n_group": 2, "tied": True, "rotary": 1.0}],
)  # fmt: skip
def test_both_spellings_describe_the_same_model(arguments: dict[str, Any]) -> None:
    both = ModelConfig.from_dict(tiny.config(**arguments))
    assert ModelConfig.from_dict(hub(**arguments)) == both
    assert ModelConfig.from_dict(transformers(**arguments)) == both


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"sliding_window_size": 128, "sliding_window": 128}, 129),
        ({"sliding_window_size": 128, "sliding_window": 129}, 129),
        ({"sliding_window_size": 128}, 129),
        ({"sliding_window": 128}, 129),
        ({"sliding_window_size": 0}, 1),
    ],
)
def test_the_hubs_window_counts_previous_keys(keys: dict[str, int], window: int) -> None:
    d = {k: v for k, v in hub().items() if not k.startswith("sliding_window")} | keys
    assert ModelConfig.from_dict(d).layers[1].window == window
    assert ModelConfig.from_dict(d).layers[0].window is None
    assert ModelConfig.from_dict(d, window=5).layers[1].window == 5


def test_transformers_window_counts_the_query_too() -> None:
    d = transformers()
    d["sliding_window"] = 128
    assert ModelConfig.from_dict(d).layers[1].window == 128


REQUIRED = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "v_head_dim", "rope_theta", "swa_rope_theta",
    "partial_rotary_factor", "hybrid_layer_pattern", "moe_layer_freq", "intermediate_size",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "layernorm_epsilon",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_missing_key_is_named(key: str, how: str) -> None:
    d = hub()
    del d[key]
    if how == "null":
        d[key] = None
    with pytest.raises(ConfigError, match=rf"no `{key}`") as e:
        ModelConfig.from_dict(d)
    assert e.value.hint


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="`llama` is not known") as e:
        ModelConfig.from_dict(hub() | {"model_type": "llama"})
    assert all(name in e.value.hint for name in KNOWN_MODEL_TYPES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "num_attention_heads"),
        ({"swa_num_key_value_heads": 3}, "num_attention_heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8}, "n_group"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group"),
        ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern"),
        ({"hybrid_layer_pattern": [0, 1, 0, 2]}, r"hybrid_layer_pattern\[3\]"),
        ({"hybrid_layer_pattern": 1}, "hybrid_layer_pattern"),
        ({"moe_layer_freq": [0, 1, 1, True]}, r"moe_layer_freq\[3\]"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"layernorm_epsilon": "tiny"}, "layernorm_epsilon"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"eos_token_id": [1, 64]}, "eos_token_id"),
        ({"attention_value_scale": -0.7}, "attention_value_scale"),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as e:
        ModelConfig.from_dict(hub() | change)
    assert e.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-6},
        {"layer_types": ["full_attention"] * 4},
        {"mlp_layer_types": ["dense"] * 4},
        {"rope_theta": 1e6},
        {"swa_rope_theta": 1e6},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_two_spellings_that_disagree_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="says"):
        ModelConfig.from_dict(tiny.config() | change)


def test_a_window_that_shows_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 keys"):
        ModelConfig.from_dict(hub(), window=0)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-2, 2), max_size=5), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(tiny.config())), JUNK)
def test_junk_gives_a_config_or_a_config_error(key: str, value: object) -> None:
    try:
        config = ModelConfig.from_dict(tiny.config() | {key: value})
    except ConfigError as e:
        assert e.hint and len(str(e)) > 10
    else:
        assert config.n_layers == 4


def test_end_ids_come_from_generation_config_first(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m", tiny.config(eos_token_id=3))
    assert ModelConfig.from_dir(folder).eos_ids == (3,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 4, 5]}))
    assert ModelConfig.from_dir(folder).eos_ids == (5, 4)
    assert ModelConfig.from_dict(hub()).eos_ids == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"model_type": "\ud800"'])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        ModelConfig.from_dir(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path / "nowhere")


def later(**changes: Any) -> dict[str, Any]:
    """V2.6's spelling: one flat table of rotary parameters, a router's dtype."""
    table = {"rope_theta": 1e7, "partial_rotary_factor": 0.334, "rope_type": "default"}
    more = {"model_type": "mimo_v2", "moe_router_dtype": "bfloat16", "rope_parameters": table}
    return hub(theta=1e7, eps=1e-6, context=1048576) | more | changes


def test_what_is_new_in_later_members() -> None:
    config = ModelConfig.from_dict(later())
    assert config.router_dtype == "bfloat16" and config.rms_eps == 1e-6
    assert {s.attention: s.rope_theta for s in config.layers} == {"full": 1e7, "sliding": 1e4}
    assert config.max_context == 1048576
    assert ModelConfig.from_dict(hub()).router_dtype == "float32"
    alone = {k: v for k, v in later().items() if k not in ("rope_theta", "partial_rotary_factor")}
    assert ModelConfig.from_dict(alone) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"moe_router_dtype": "float16"}, "moe_router_dtype"),
        ({"attention_projection_layout": "rows"}, "attention_projection_layout"),
        ({"rope_theta": 5e6}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}}, "rope_type"),
    ],
)
def test_what_later_members_could_have_and_is_not_known(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as e:
        ModelConfig.from_dict(later(**change))
    assert e.value.hint


def test_both_ends_of_an_answer_count_in_the_familys_vocabulary() -> None:
    for end, ids in ((None, (151645, 151643)), (151643, (151643, 151645)), ([5], None)):
        d = hub(vocab=152576) | {"eos_token_id": end}
        assert ModelConfig.from_dict(d).eos_ids == (ids or (5, 151645, 151643))
    assert ModelConfig.from_dict(hub() | {"eos_token_id": 5}).eos_ids == (5,)
