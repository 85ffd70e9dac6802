"""A tiny checkpoint of every member of the family, each in its own files' layout and config.

`write(folder, member)` gives a folder as the hub would and returns the exact float32 weights by the
hub's split names, which a right reader must give back. Facts of the layouts: docs/family.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from checkpoints import BLOCK, E2M1, Weights, fp8_fused, fp8_quantize
from safetensors.torch import save_file

from quant.inventory import role_of

MEMBERS = ("MiMo-V2-Flash", "MiMo-V2-Flash-Base", "MiMo-V2.5", "MiMo-V2.6-Flash")
OWN_KEYS = ("rms_norm_eps", "layer_types", "mlp_layer_types", "rope_parameters")
TP = 2
RANKS = 4
MODALITIES: dict[str, tuple[int, ...]] = {
    "visual.patch_embed.proj.weight": (8, 3, 2, 4, 4),
    "visual.blocks.0.attn.qkv.weight": (24, 8),
    "audio_encoder.input_local_transformer.layers.0.self_attn.q_proj.weight": (8, 8),
    "speech_embeddings.0.weight": (16, 8),
}


def full_config(member: str, **changes: Any) -> dict[str, Any]:
    """The member's config with transformers' keys beside the hub's, as the oracle wants them.

    Full-attention layers have shards of [q 384 | k 192 | v 128] rows: K and V straddle a block.
    """
    newer = not member.startswith("MiMo-V2-Flash")
    arguments: dict[str, Any] = {
        "hidden": 256, "heads": 4, "kv_heads": TP, "swa_kv_heads": 4, "head_dim": 192,
        "v_head_dim": 128, "intermediate": 384, "experts": 8, "moe_intermediate": 128,
        "vocab": 320, "window": 9, "theta": 1e7 if newer else 5e6,
        "context": 1048576 if newer else 262144,
        "eps": 1e-6 if member == "MiMo-V2.6-Flash" else 1e-5,
    }  # fmt: skip
    d = tiny.config("fsf", "dmm", **arguments)
    quantization: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(3)],
    }
    if newer:
        d |= {
            "architectures": ["MiMoV2ForCausalLM"],
            "model_type": "mimo_v2",
            "attention_projection_layout": "fused_qkv",
            "vision_config": {"hidden_size": 8},
            "audio_config": {"out_hidden_size": 8},
            "eos_token_id": 5,
        }
    if member == "MiMo-V2.6-Flash":
        d |= {"moe_router_dtype": "bfloat16", "num_nextn_predict_layers": 3}
        quantization |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    return d | {"quantization_config": quantization} | changes


def hub_config(d: dict[str, Any]) -> dict[str, Any]:
    """What stands on the hub: its own keys only; V2.6 has one table of rotary parameters."""
    out = {k: v for k, v in d.items() if k not in OWN_KEYS}
    if d.get("moe_router_dtype"):
        table = {"rope_theta": d["rope_theta"], "partial_rotary_factor": 0.334}
        out["rope_parameters"] = table | {"rope_type": "default", "type": "default"}
    return out


def write(
    folder: Path, member: str, *, seed: int = 0, mtp_layers: int = 3, **changes: Any
) -> tuple[dict[str, Any], Weights]:
    """Write the member's checkpoint; returns (config with all keys, exact weights)."""
    d = full_config(member, **changes)
    exact = tiny.state_dict(d, seed=seed, mtp_layers=mtp_layers)
    stored: Weights = {}
    fused = d["model_type"] == "mimo_v2"
    g = torch.Generator().manual_seed(seed + 1)
    for name in list(exact):
        if name.endswith(".self_attn.q_proj.weight"):
            stored |= _attention(exact, name.removesuffix("q_proj.weight"), d, fused=fused)
    for name, w in exact.items():
        if name in stored or re.search(r"self_attn\.[qkv]_proj", name):
            continue
        role = role_of(name, tuple(w.shape))
        if role == "experts" and member == "MiMo-V2.6-Flash":
            stored |= _mxfp4(exact, name, g)
        elif role in ("experts", "dense") or (role == "mtp" and ".mlp." in name):
            stored |= _fp8(exact, name)
        else:
            router = ".mlp.gate." in name
            narrow = not router or (
                name.endswith("gate.weight") and d.get("moe_router_dtype") == "bfloat16"
            )
            stored[name] = w.bfloat16() if narrow else w.clone()
            exact[name] = stored[name].float()
    if fused:
        for name, shape in MODALITIES.items():
            stored[name] = torch.randn(shape, generator=g).bfloat16()
    _write_files(folder, member, d, stored)
    return d, exact


def _attention(exact: Weights, prefix: str, d: dict[str, Any], *, fused: bool) -> Weights:
    """Q, k and v of one layer, quantised shard by shard on the fused block."""
    names = [f"{prefix}{part}_proj.weight" for part in "qkv"]
    rows = [exact[name] * torch.logspace(-0.5, 0.5, len(exact[name]))[:, None] for name in names]
    rows[2] = rows[2] * 0.3  # V's magnitude is not K's: a wrong scale shows
    if not fused:
        found = fp8_fused(rows[0], rows[1], rows[2], int(d["num_key_value_heads"]))
        out = {}
        for name, part in zip(names, "qkv", strict=True):
            codes, scales, exact[name] = found[part]
            out |= {name: codes, name + "_scale_inv": scales}
        return out
    codes, scales = [], []
    values: list[list[torch.Tensor]] = [[], [], []]
    for shard in range(TP):
        pieces = [w.chunk(TP)[shard] for w in rows]
        c, s, e = fp8_quantize(torch.cat(pieces))
        codes.append(c)
        scales.append(s)
        for kept, piece in zip(values, e.split([len(p) for p in pieces]), strict=True):
            kept.append(piece)
    for name, kept in zip(names, values, strict=True):
        exact[name] = torch.cat(kept)
    name = prefix + "qkv_proj.weight"
    return {name: torch.cat(codes), name + "_scale_inv": torch.cat(scales)}


def _fp8(exact: Weights, name: str) -> Weights:
    codes, scales, exact[name] = fp8_quantize(exact[name])
    return {name: codes, name + "_scale_inv": scales}


def _mxfp4(exact: Weights, name: str, g: torch.Generator) -> Weights:
    """Codes and scales of the weights' own size, element 2i in the low nibble of byte i."""
    rows, cols = exact[name].shape
    codes = torch.randint(0, 16, (rows, cols), generator=g)
    scales = torch.randint(127 - 6, 127 - 3, (rows, cols // 32), generator=g)
    value = torch.tensor([*E2M1, *(-v for v in E2M1)])[codes]
    exact[name] = value * 2.0 ** (scales - 127).repeat_interleave(32, dim=1)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return {name: packed, name + "_scale": scales.to(torch.uint8)}


def _write_files(folder: Path, member: str, d: dict[str, Any], stored: Weights) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hub_config(d)))
    file_of = {"MiMo-V2.5": ranks_of_two, "MiMo-V2.6-Flash": ranks}.get(member, by_layer)
    files: dict[str, Weights] = {}
    for name, tensor in stored.items():
        files.setdefault(file_of(name, d), {})[name] = tensor.contiguous()
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    metadata: dict[str, Any] = {"total_size": sum(t.nbytes for t in stored.values())}
    if d["model_type"] == "mimo_v2":
        kind = "mxfp4" if "store_dtype" in d["quantization_config"] else "fp8"
        metadata |= {"save_format": kind, "tp_size": TP}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if member == "MiMo-V2.6-Flash":
        (folder / "dflash").mkdir()
        drafter = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
        save_file(drafter, folder / "dflash" / "dflash_draft_model.safetensors")


def by_layer(name: str, d: dict[str, Any]) -> str:
    """V2-Flash: a layer's experts in two files, its other tensors in a third."""
    if ".mtp." in name:
        return "model_mtp.safetensors"
    if found := re.match(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(\w+)_proj", name):
        return f"model_{found[1]}_linear_fc{2 if found[2] == 'down' else 1}.safetensors"
    if found := re.match(r"model\.layers\.(\d+)\.", name):
        return f"model_{found[1]}.safetensors"
    return f"model_{'embedding' if 'embed' in name else 'final'}.safetensors"


def ranks(name: str, d: dict[str, Any]) -> str:
    """V2.6: some experts of all layers in a file; in the first also all that is no expert."""
    if ".mtp." in name:
        return "model_mtp.safetensors"
    found = re.search(r"\.experts\.(\d+)\.", name)
    rank = int(found[1]) // math.ceil(d["n_routed_experts"] / RANKS) if found else 0
    return f"model_pp0_ep{rank}_shard0.safetensors"


def ranks_of_two(name: str, d: dict[str, Any]) -> str:
    """V2.5: the same, in two files each: what overflows one, and what is no expert."""
    file = ranks(name, d)
    last = f"model.layers.{d['num_hidden_layers'] - 1}.mlp.experts."
    overflows = ".experts." not in name or (name.startswith(last) and "down_proj" in name)
    return file.replace("shard0", "shard1") if overflows else file


FileOf = Callable[[str, dict[str, Any]], str]
