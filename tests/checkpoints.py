"""Synthetic checkpoints in every layout the readers must understand; small, seeded, fast.

`write_bf16`, `write_fp8`, `write_mxfp4`, `write_fused` give a folder and return the exact float32
weights that a right reader must give back, by hub name. Written with the safetensors library: our
own reader and writer are what is being tested.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quant.inventory import expected, expected_mtp, role_of

Weights = dict[str, torch.Tensor]
BLOCK = 128


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Three layers: full + dense, sliding + experts, full + experts; K/V heads of 192/128.

    The full-attention layers fuse per shard as [q 384 | k 192 | v 128]: K and V straddle a block,
    as in the real model.
    """
    config: dict[str, Any] = {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "num_hidden_layers": 3,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "head_dim": 192,
        "v_head_dim": 128,
        "swa_head_dim": 192,
        "swa_v_head_dim": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 320,
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
        "layernorm_epsilon": 1e-5,
    }
    return config | changes


def random_weights(config: Mapping[str, Any], seed: int = 0, *, mtp: bool = False) -> Weights:
    """Float32 values that bfloat16 holds exactly, for every tensor the config implies."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected(config) | (expected_mtp(config) if mtp else {})
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        scale = 0.05 if len(shape) == 2 else 1.0
        weights[name] = (values * scale).bfloat16().float()
    return weights


def _stored(weights: Weights) -> Weights:
    """The dtypes of the real checkpoint: router and its bias F32, everything else BF16."""
    return {n: w.contiguous() if ".mlp.gate." in n else w.bfloat16() for n, w in weights.items()}


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Weights,
    *,
    shards: int = 1,
    mtp_file: bool = True,
    mtp_in_index: bool = True,
) -> None:
    """config.json and the tensors in `shards` files; MTP tensors in a file of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    mtp = {n: t for n, t in tensors.items() if ".mtp." in n and mtp_file}
    main = sorted(n for n in tensors if n not in mtp)
    if shards == 1 and not (mtp and mtp_in_index):
        save_file({n: tensors[n] for n in main}, folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for i in range(shards):
            names = main[i::shards]  # neighbours in different files: a weight away from its scales
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n] for n in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        if mtp and mtp_in_index:
            weight_map |= dict.fromkeys(mtp, "model_mtp.safetensors")
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if mtp:
        save_file(mtp, folder / "model_mtp.safetensors")


def write_bf16(
    folder: Path, config: Mapping[str, Any], *, seed: int = 0, mtp: bool = False, shards: int = 1
) -> Weights:
    """A BF16 checkpoint (router F32); returns its weights."""
    weights = random_weights(config, seed, mtp=mtp)
    write_folder(folder, config, _stored(weights), shards=shards)
    return weights


def fp8_quantize(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes float8, scales float32 per 128 x 128 block, exact float32 values they stand for)."""
    rows, cols = w.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    exact = torch.empty(rows, cols)
    scales = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = w[at].abs().max() / 448
            codes[at] = (w[at] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[at] = codes[at].float() * scales[i, j]
    return codes, scales, exact


def fp8_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tp: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k, v quantised as the training did: per shard on the fused block, then split again.

    Returns name -> (codes, scales, exact values); a scale row goes to the tensor in which its
    128-row block begins.
    """
    collected: dict[str, list[list[torch.Tensor]]] = {n: [[], [], []] for n in "qkv"}
    sizes = {n: w.shape[0] // tp for n, w in zip("qkv", (q, k, v), strict=True)}
    for shard in range(tp):
        pieces = [
            w[shard * sizes[n] : (shard + 1) * sizes[n]]
            for n, w in zip("qkv", (q, k, v), strict=True)
        ]
        codes, scales, exact = fp8_quantize(torch.cat(pieces))
        start = 0
        for n in "qkv":
            end = start + sizes[n]
            first, last = -(-start // BLOCK), -(-end // BLOCK)  # blocks that begin in start..end
            for i, part in enumerate((codes[start:end], scales[first:last], exact[start:end])):
                collected[n][i].append(part.contiguous())
            start = end
    return {n: (torch.cat(c), torch.cat(s), torch.cat(e)) for n, (c, s, e) in collected.items()}


def write_fp8(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    mtp: bool = True,
    shards: int = 1,
    mtp_in_index: bool = True,
) -> Weights:
    """The official layout: FP8 matrices with scales, BF16 o_proj, norms, embedding and head.

    Full-attention q/k/v are quantised per tensor-parallel shard (as many as KV heads), rows of
    different size so that a wrong scale shows. Returns the exact weights.
    """
    weights = random_weights(config, seed, mtp=mtp)
    tp = int(config["num_key_value_heads"])
    stored: Weights = {}
    for name, w in weights.items():
        if len(w.shape) == 2:
            w *= torch.logspace(-1, 1, w.shape[0]).unsqueeze(1)  # rows differ 100-fold
        if "v_proj" in name:
            w *= 0.2  # unlike the K rows they share blocks with
    full = [f"model.layers.{i}." for i, s in enumerate(config["hybrid_layer_pattern"]) if not s]
    for prefix in full:
        names = {n: f"{prefix}self_attn.{n}_proj.weight" for n in "qkv"}
        q, k, v = (weights[names[n]] for n in "qkv")
        fused = fp8_fused(q, k, v, tp)
        for n, (codes, scales, exact) in fused.items():
            stored |= {names[n]: codes, names[n] + "_scale_inv": scales}
            weights[names[n]] = exact
    for name, w in weights.items():
        if name in stored:
            continue
        role = role_of(name, tuple(w.shape))
        plain = role in ("exact", "embedding", "head") or "o_proj" in name or "eh_proj" in name
        if plain:
            stored[name] = w if ".mlp.gate." in name else w.bfloat16()
            weights[name] = stored[name].float()
        else:
            codes, scales, exact = fp8_quantize(w)
            stored |= {name: codes, name + "_scale_inv": scales}
            weights[name] = exact
    write_folder(folder, config, stored, shards=shards, mtp_in_index=mtp_in_index)
    return weights


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def write_mxfp4(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    shards: int = 1,
    e8m0: bool = False,
    dense: bool = False,
) -> Weights:
    """Experts as MXFP4, element 2i in the LOW nibble of byte i, scales U8 or F8_E8M0; rest BF16.

    `dense`: the dense layer's matrices too. Every code is used and scales range from 2^-12 to 2^-3,
    so that none can be mistaken.
    """
    weights = random_weights(config, seed)
    stored = _stored(weights)
    g = torch.Generator().manual_seed(seed)
    for name, w in weights.items():
        if role_of(name, tuple(w.shape)) not in ("experts", *(("dense",) if dense else ())):
            continue
        rows, cols = w.shape
        codes = torch.randint(0, 16, (rows, cols), generator=g)
        scales = torch.randint(127 - 12, 127 - 2, (rows, cols // 32), generator=g)
        value = torch.tensor([*E2M1, *(-v for v in E2M1)])[codes]
        weights[name] = value * 2.0 ** (scales - 127).repeat_interleave(32, dim=1)
        stored[name] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        byte = scales.to(torch.uint8)
        stored[name + "_scale"] = byte.view(torch.float8_e8m0fnu) if e8m0 else byte
    write_folder(folder, config, stored, shards=shards)
    return weights


def write_fused(folder: Path, config: Mapping[str, Any], *, seed: int = 0) -> Weights:
    """A checkpoint under transformers' own names: fused experts, `sinks`; returns hub weights."""
    weights = random_weights(config, seed)
    stored = {
        n.replace("attention_sink_bias", "sinks"): w
        for n, w in weights.items()
        if ".mlp.experts." not in n
    }
    for layer, moe in enumerate(config["moe_layer_freq"]):
        if not moe:
            continue
        at = f"model.layers.{layer}.mlp.experts."
        n = int(config["n_routed_experts"])

        def part(matrix: str, at: str = at, n: int = n) -> list[torch.Tensor]:
            return [weights[f"{at}{e}.{matrix}.weight"] for e in range(n)]

        both = [torch.cat(pair) for pair in zip(part("gate_proj"), part("up_proj"), strict=True)]
        stored[at + "gate_up_proj"] = torch.stack(both)
        stored[at + "down_proj"] = torch.stack(part("down_proj"))
    write_folder(folder, config, stored)
    return weights
