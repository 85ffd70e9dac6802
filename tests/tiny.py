"""Seeded tiny checkpoints in the hub's layout, and the same weights in transformers' model.

`write(folder, config(...))` makes what a user would download: config.json with the hub's keys (and
transformers' own beside them) and safetensors. `oracle(...)` is the reference: transformers'
MiMoV2Flash in float32, eager attention. Everything follows from the arguments and a seed.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def config(
    attention: str = "fsfs",
    mlp: str = "dmmm",
    *,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 1,
    swa_heads: int | None = None,
    swa_kv_heads: int | None = None,
    head_dim: int = 24,
    v_head_dim: int = 16,
    swa_head_dim: int | None = None,
    swa_v_head_dim: int | None = None,
    rotary: float = 0.334,
    theta: float = 5e6,
    swa_theta: float = 1e4,
    window: int = 9,
    swa_sink: bool = True,
    full_sink: bool = False,
    value_scale: float | None = 0.707,
    intermediate: int = 48,
    experts: int = 8,
    top_k: int = 2,
    moe_intermediate: int = 16,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk: bool = True,
    scaling: float | None = None,
    vocab: int = 64,
    eps: float = 1e-5,
    tied: bool = False,
    context: int = 4096,
    **extra: Any,
) -> dict[str, Any]:
    """config.json of a tiny model. `attention`: f(ull) or s(liding) per layer, `mlp`: d(ense) or
    m(oe). `window` counts the keys a query sees, itself included (the file says window - 1)."""
    d: dict[str, Any] = {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "num_hidden_layers": len(attention),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "swa_num_attention_heads": swa_heads or heads,
        "swa_num_key_value_heads": swa_kv_heads or 2 * kv_heads,
        "swa_head_dim": swa_head_dim or head_dim,
        "swa_v_head_dim": swa_v_head_dim or v_head_dim,
        "rope_theta": theta,
        "swa_rope_theta": swa_theta,
        "partial_rotary_factor": rotary,
        "sliding_window": window - 1,
        "sliding_window_size": window - 1,
        "add_swa_attention_sink_bias": swa_sink,
        "add_full_attention_sink_bias": full_sink,
        "attention_value_scale": value_scale,
        "attention_bias": False,
        "hybrid_layer_pattern": [int(kind == "s") for kind in attention],
        "moe_layer_freq": [int(kind == "m") for kind in mlp],
        "intermediate_size": intermediate,
        "moe_intermediate_size": moe_intermediate,
        "n_routed_experts": experts,
        "n_shared_experts": None,
        "num_experts_per_tok": top_k,
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": norm_topk,
        "routed_scaling_factor": scaling,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "layernorm_epsilon": eps,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    # transformers reads none of the hub's keys for these.
    d |= {
        "rms_norm_eps": eps,
        "layer_types": [
            "sliding_attention" if kind == "s" else "full_attention" for kind in attention
        ],
        "mlp_layer_types": ["sparse" if kind == "m" else "dense" for kind in mlp],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": rotary}
            for kind, base in (("full_attention", theta), ("sliding_attention", swa_theta))
        },
    }
    return d | extra


def state_dict(
    d: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32, mtp_layers: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights under the hub's names, large enough that every feature shows in the logits.

    Router, its bias and the sinks stay float32, as routers do in the real checkpoint.
    """
    g = torch.Generator().manual_seed(seed)
    out: dict[str, torch.Tensor] = {}
    hidden, vocab = d["hidden_size"], d["vocab_size"]

    def normal(name: str, *shape: int, std: float = 0.2, mean: float = 0.0) -> None:
        exact = name.endswith(("mlp.gate.weight", "score_correction_bias", "sink_bias"))
        values = torch.randn(shape, generator=g) * std + mean
        out[name] = values if exact else values.to(dtype)

    def attention(prefix: str, *, sliding: bool) -> None:
        kind = "swa_" if sliding else ""
        heads = d[f"{kind}num_attention_heads"]
        kv_heads = d[f"{kind}num_key_value_heads"]
        dk, dv = d[f"{kind}head_dim"], d[f"{kind}v_head_dim"]
        normal(f"{prefix}q_proj.weight", heads * dk, hidden)
        normal(f"{prefix}k_proj.weight", kv_heads * dk, hidden)
        normal(f"{prefix}v_proj.weight", kv_heads * dv, hidden)
        normal(f"{prefix}o_proj.weight", hidden, heads * dv)
        if d[f"add_{'swa' if sliding else 'full'}_attention_sink_bias"]:
            normal(f"{prefix}attention_sink_bias", heads, std=1.0, mean=0.5)

    def ffn(prefix: str, width: int) -> None:
        normal(f"{prefix}gate_proj.weight", width, hidden)
        normal(f"{prefix}up_proj.weight", width, hidden)
        normal(f"{prefix}down_proj.weight", hidden, width)

    normal("model.embed_tokens.weight", vocab, hidden, std=1.0)
    normal("model.norm.weight", hidden, std=0.2, mean=1.0)
    if not d["tie_word_embeddings"]:
        normal("lm_head.weight", vocab, hidden, std=0.3)
    for i in range(d["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            normal(f"{prefix}{norm}.weight", hidden, std=0.2, mean=1.0)
        attention(f"{prefix}self_attn.", sliding=bool(d["hybrid_layer_pattern"][i]))
        if not d["moe_layer_freq"][i]:
            ffn(f"{prefix}mlp.", d["intermediate_size"])
            continue
        normal(f"{prefix}mlp.gate.weight", d["n_routed_experts"], hidden, std=0.3)
        normal(f"{prefix}mlp.gate.e_score_correction_bias", d["n_routed_experts"], std=0.2)
        for e in range(d["n_routed_experts"]):
            ffn(f"{prefix}mlp.experts.{e}.", d["moe_intermediate_size"])
    for i in range(mtp_layers):
        prefix = f"model.mtp.layers.{i}."
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            normal(f"{prefix}{norm}.weight", hidden, std=0.2, mean=1.0)
        normal(f"{prefix}eh_proj.weight", hidden, 2 * hidden)
        attention(f"{prefix}self_attn.", sliding=True)
        ffn(f"{prefix}mlp.", d["intermediate_size"])
    return out


def write(
    folder: Path,
    d: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    mtp_layers: int = 0,
    state: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder: one model.safetensors, or `shards` files and an index."""
    d = config() if d is None else d
    state = state_dict(d, seed=seed, dtype=dtype, mtp_layers=mtp_layers) if state is None else state
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(d, indent=1))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = sorted(state)
    where = {
        name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    size = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def oracle(d: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """transformers' MiMoV2FlashForCausalLM in float32 with these hub-named weights.

    transformers has one head geometry for both kinds of layer, always 2x K/V heads and sinks in
    sliding layers, and never sinks elsewhere; where the config says otherwise the attention module
    is rebuilt with the layer's own numbers.
    """
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM
    from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import MiMoV2FlashAttention

    hf = MiMoV2FlashConfig(**d)
    hf._attn_implementation = hf._experts_implementation = "eager"
    model = MiMoV2FlashForCausalLM(hf).float().eval()
    for i, layer in enumerate(model.model.layers):
        kind = "swa_" if d["hybrid_layer_pattern"][i] else ""
        heads, kv_heads = d[f"{kind}num_attention_heads"], d[f"{kind}num_key_value_heads"]
        own = copy.deepcopy(hf)
        own.num_attention_heads, own.num_key_value_heads = heads, kv_heads
        own.head_dim, own.v_head_dim = d[f"{kind}head_dim"], d[f"{kind}v_head_dim"]
        module = MiMoV2FlashAttention(own, i).float().eval()
        module.num_key_value_groups = heads // kv_heads
        hidden = d["hidden_size"]
        module.k_proj = torch.nn.Linear(hidden, kv_heads * own.head_dim, bias=False)
        module.v_proj = torch.nn.Linear(hidden, kv_heads * own.v_head_dim, bias=False)
        has_sink = f"model.layers.{i}.self_attn.attention_sink_bias" in state
        module.sinks = torch.nn.Parameter(torch.empty(heads)) if has_sink else None
        layer.self_attn = module
        dim = int(own.head_dim * d["partial_rotary_factor"])
        theta = hf.rope_parameters[hf.layer_types[i]]["rope_theta"]
        rope = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        setattr(model.model.rotary_emb, f"{hf.layer_types[i]}_inv_freq", rope)
    missing, unexpected = model.load_state_dict(_oracle_names(d, state), strict=False)
    assert not unexpected, unexpected
    assert not missing or (d["tie_word_embeddings"] and missing == ["lm_head.weight"]), missing
    return model


def _oracle_names(d: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        if ".mtp." not in name and ".experts." not in name:
            out[name.replace("attention_sink_bias", "sinks")] = tensor.float()
    for i, is_moe in enumerate(d["moe_layer_freq"]):
        if not is_moe:
            continue
        prefix = f"model.layers.{i}.mlp.experts."
        experts = range(d["n_routed_experts"])
        out[f"{prefix}gate_up_proj"] = torch.stack(
            [
                torch.cat([state[f"{prefix}{e}.{p}_proj.weight"].float() for p in ("gate", "up")])
                for e in experts
            ]
        )
        out[f"{prefix}down_proj"] = torch.stack(
            [state[f"{prefix}{e}.down_proj.weight"].float() for e in experts]
        )
    return out


def prompt(d: dict[str, Any], n: int, *, seed: int = 0) -> torch.Tensor:
    """n random ids (n,) int64."""
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, d["vocab_size"], (n,), generator=g)
