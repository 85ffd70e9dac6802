"""Which tensors a model of this family has, what each is for, and which pack file holds it.

Names are the hub's. Reads the sizes in a raw config.json (it sits below `mimo_local.config`), but
no tensor data. Called by `convert` (completeness, file plan) and `plan_bytes` (sizes without a
download).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mimo_local.errors import CheckpointError, ConfigError

Role: TypeAlias = Literal["experts", "attention", "dense", "embedding", "head", "mtp", "exact"]
"""What a tensor is for; all but `exact` are fields of `convert.Recipe`."""

Shapes: TypeAlias = dict[str, tuple[int, ...]]

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MTP = re.compile(r"(^|\.)mtp\.")
_MATRIX: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.self_attn\.\w+_proj\.weight$"), "attention"),
    (re.compile(r"\.mlp\.(\w+\.)?(gate|up|down)_proj\.weight$"), "dense"),
    (re.compile(r"(^|\.)embed_tokens\.weight$"), "embedding"),
    (re.compile(r"^lm_head\.weight$"), "head"),
)

MTP_PREFIX = "model.mtp.layers."
DEFAULT_MTP_LAYERS = 3
"""MiMo-V2-Flash ships three MTP layers and its config.json does not say so."""


def expert_of(name: str) -> tuple[int, int, str] | None:
    """(layer, expert, "gate_proj" | "up_proj" | "down_proj"), or None for any other tensor."""
    match = _EXPERT.fullmatch(name)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def expert_name(layer: int, expert: int, part: str) -> str:
    """The hub name of one expert matrix."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def layer_of(name: str) -> int | None:
    """The layer a tensor of the main model belongs to; None outside the layers and for MTP."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """What the tensor is for; whatever is not a known matrix is kept exact."""
    if len(shape) != 2:
        return "exact"
    if expert_of(name):
        return "experts"
    if _MTP.search(name):
        return "mtp"
    return next((role for pattern, role in _MATRIX if pattern.search(name)), "exact")


def file_of(name: str) -> str:
    """The pack file that holds the tensor."""
    if _MTP.search(name):
        return "mtp.safetensors"
    layer = layer_of(name)
    if layer is None:
        return "model.safetensors"
    return f"{'experts' if expert_of(name) else 'layer'}-{layer:03d}.safetensors"


def expected(config: Mapping[str, Any]) -> Shapes:
    """Every tensor the main model must have, by name; raises ConfigError naming a missing key."""
    hidden, vocab = _int(config, "hidden_size"), _int(config, "vocab_size")
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    sliding, moe = _patterns(config)
    for layer, (is_sliding, is_moe) in enumerate(zip(sliding, moe, strict=True)):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes |= _attention(prefix, config, hidden, sliding=is_sliding)
        shapes |= _moe(layer, config, hidden) if is_moe else _dense(prefix, config, hidden)
    return shapes


def expected_mtp(config: Mapping[str, Any]) -> Shapes:
    """The tensors of the MTP layers: dense, sliding-window geometry; a checkpoint may lack them."""
    count = config.get("num_nextn_predict_layers", DEFAULT_MTP_LAYERS)
    shapes: Shapes = {}
    for layer in range(count or 0):
        shapes |= _mtp_shapes(config, layer)
    return shapes


def _mtp_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden = _int(config, "hidden_size")
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    prefix = f"{MTP_PREFIX}{layer}."
    shapes: Shapes = {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
    shapes[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
    shapes |= _attention(prefix, config, hidden, sliding=True)
    return shapes | _dense(prefix, config, hidden)


@dataclass(frozen=True, slots=True)
class Selection:
    """Tensors of a checkpoint that are `used`, and those of drafting layers that are not."""

    used: list[str]
    unused: list[str]
    mtp_layers: int


def require(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """CheckpointError if a tensor of the main model is not there, or in another shape."""
    for name, shape in expected(config).items():
        if name not in shapes:
            raise CheckpointError(
                f"{name} is not in the checkpoint",
                hint="a shard may be missing: compare the folder with the hub's file list",
            )
        if shapes[name] != shape:
            raise CheckpointError(
                f"{name} has shape {list(shapes[name])}, config.json says {list(shape)}",
                hint="config.json and the weights belong to different checkpoints",
            )


def select(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Selection:
    """Which of these tensors to use; CheckpointError if one is not known.

    Drafting layers are used as far as they are whole: what else there is of them costs drafts and
    no answers, so it is left out. Anything else that is not known would be missing in the answers.
    """
    main, layers = expected(config), 0
    drafting: Shapes = {}
    while whole := _mtp_layer(config, layers, shapes):
        drafting |= whole
        layers += 1
    rest = [name for name in shapes if name not in main and name not in drafting]
    unknown = sorted(name for name in rest if not _MTP.search(name))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"tensors no model of this kind has: {', '.join(unknown[:3])}{more}",
            hint="this version may be too old for the checkpoint, or config.json is another's",
        )
    return Selection(sorted(shapes.keys() - set(rest)), sorted(rest), layers)


def _mtp_layer(
    config: Mapping[str, Any], layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> Shapes:
    """The tensors of one drafting layer, or nothing if one of them is not there or is another."""
    wanted = _mtp_shapes(config, layer) if f"{MTP_PREFIX}{layer}.eh_proj.weight" in shapes else {}
    return wanted if all(shapes.get(name) == shape for name, shape in wanted.items()) else {}


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"config.json: {key} is {'missing' if value is None else repr(value)}",
            hint="fetch config.json of the checkpoint again; it must describe a MiMo-V2 model",
        )
    return value


def _patterns(config: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """(is sliding, is mixture of experts) per layer, from the hub's keys or transformers'."""
    n = _int(config, "num_hidden_layers")
    sliding = config.get("hybrid_layer_pattern")
    if sliding is None and "layer_types" in config:
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    moe = config.get("moe_layer_freq")
    if moe is None and "mlp_layer_types" in config:
        moe = [kind == "sparse" for kind in config["mlp_layer_types"]]
    for key, value in (("hybrid_layer_pattern", sliding), ("moe_layer_freq", moe)):
        if not isinstance(value, list) or len(value) != n:
            got = f"has {len(value)} entries" if isinstance(value, list) else "is missing"
            raise ConfigError(
                f"config.json: {key} {got}, num_hidden_layers is {n}",
                hint="fetch config.json of the checkpoint again; it must name every layer's kind",
            )
    return [bool(x) for x in sliding or ()], [bool(x) for x in moe or ()]


@dataclass(frozen=True, slots=True)
class Qkv:
    """Rows of one layer's q, k and v matrices."""

    rows: tuple[int, int, int]
    kv_heads: int


def qkv_of(config: Mapping[str, Any], prefix: str) -> Qkv:
    """Those of the attention whose tensors' names begin with `prefix`; ConfigError."""
    layer = layer_of(prefix)
    sliding, _ = ([True], ()) if layer is None else _patterns(config)
    if layer is not None and layer >= len(sliding):
        raise ConfigError(
            f"config.json: num_hidden_layers is {len(sliding)}, there are weights of layer {layer}",
            hint="config.json and the weights belong to different checkpoints",
        )
    at = "x.self_attn."
    shapes = _attention("x.", config, 1, sliding=sliding[layer or 0])
    q, k, v = (shapes[f"{at}{part}_proj.weight"][0] for part in "qkv")
    heads = _int(config, "num_key_value_heads")
    if sliding[layer or 0]:
        heads = _int(config, "swa_num_key_value_heads", 2 * heads)
    return Qkv((q, k, v), heads)


def _attention(prefix: str, config: Mapping[str, Any], hidden: int, *, sliding: bool) -> Shapes:
    heads = _int(config, "num_attention_heads")
    kv = _int(config, "num_key_value_heads")
    k_dim = _int(config, "head_dim")
    v_dim = _int(config, "v_head_dim", k_dim)
    sink = bool(config.get("add_full_attention_sink_bias", False))
    if sliding:
        heads = _int(config, "swa_num_attention_heads", heads)
        kv = _int(config, "swa_num_key_value_heads", 2 * kv)
        k_dim = _int(config, "swa_head_dim", k_dim)
        v_dim = _int(config, "swa_v_head_dim", v_dim)
        sink = bool(config.get("add_swa_attention_sink_bias", True))
    at = prefix + "self_attn."
    shapes: Shapes = {
        at + "q_proj.weight": (heads * k_dim, hidden),
        at + "k_proj.weight": (kv * k_dim, hidden),
        at + "v_proj.weight": (kv * v_dim, hidden),
        at + "o_proj.weight": (hidden, heads * v_dim),
    }
    if sink:
        shapes[at + "attention_sink_bias"] = (heads,)
    return shapes


def _dense(prefix: str, config: Mapping[str, Any], hidden: int) -> Shapes:
    inner = _int(config, "intermediate_size")
    return {
        prefix + "mlp.gate_proj.weight": (inner, hidden),
        prefix + "mlp.up_proj.weight": (inner, hidden),
        prefix + "mlp.down_proj.weight": (hidden, inner),
    }


def _moe(layer: int, config: Mapping[str, Any], hidden: int) -> Shapes:
    inner, experts = _int(config, "moe_intermediate_size"), _int(config, "n_routed_experts")
    shapes: Shapes = {
        f"model.layers.{layer}.mlp.gate.weight": (experts, hidden),
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        for part in EXPERT_PARTS:
            shape = (hidden, inner) if part == "down_proj" else (inner, hidden)
            shapes[expert_name(layer, expert, part)] = shape
    return shapes
