"""The real members' shapes, as headers without data: bytes, shards, what a pull holds at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mimo_local import sizes
from mimo_local.config import ModelConfig
from mimo_local.errors import CheckpointError
from mimo_local.family import member
from mimo_local.pull.order import arrange
from mimo_local.pull.remote import Remote, exact_sizes
from mimo_local.pull.supply import steps_of
from quant.checkpoint import Checkpoint
from quant.convert import checked_jobs
from quant.inventory import expected, expected_mtp, expert_of, qkv_of, role_of
from quant.jobs import split
from quant.recipe import Recipe, usual
from quant.shards import Shards
from quant.tensorfile import TensorFile

WIDTH = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
Header = dict[str, tuple[str, tuple[int, ...]]]


def real_config(name: str) -> dict[str, Any]:
    d: dict[str, Any] = json.loads(Path(sizes.__file__).with_name("real_config.json").read_text())
    if name == "MiMo-V2-Flash":
        return d
    d |= {
        "model_type": "mimo_v2", "rope_theta": 10000000, "max_position_embeddings": 1048576,
        "attention_projection_layout": "fused_qkv", "eos_token_id": 151645,
    }  # fmt: skip
    if name == "MiMo-V2.6-Flash":
        d |= {"moe_router_dtype": "bfloat16", "layernorm_epsilon": 1e-6}
        d["num_nextn_predict_layers"] = 3
        d["quantization_config"] |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    if name.endswith("Pro"):
        full = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)
        d |= {
            "num_hidden_layers": 70, "hidden_size": 6144, "num_attention_heads": 128,
            "num_key_value_heads": 8, "swa_num_attention_heads": 128, "n_routed_experts": 384,
            "hybrid_layer_pattern": [int(i not in full) for i in range(70)],
            "moe_layer_freq": [0] + [1] * 69,
        }  # fmt: skip
    return d


def header(config: dict[str, Any], *, tp: int, native: bool) -> Header:
    """Names, dtypes and shapes of the text model's tensors as the hub stores them."""
    out: Header = {}
    for name, shape in (expected(config) | expected_mtp(config)).items():
        role = role_of(name, shape)
        if "_proj.weight" in name and ".self_attn." in name and "o_proj" not in name:
            if "q_proj" in name:
                rows = sum(qkv_of(config, name.removesuffix("q_proj.weight")).rows)
                fused, scales = name.replace("q_proj", "qkv_proj"), tp * -(-rows // tp // 128)
                out[fused] = ("F8_E4M3", (rows, shape[1]))
                out[fused + "_scale_inv"] = ("F32", (scales, shape[1] // 128))
        elif role == "experts" and native:
            out[name] = ("U8", (shape[0], shape[1] // 2))
            out[name + "_scale"] = ("U8", (shape[0], shape[1] // 32))
        elif role in ("experts", "dense") or (".mtp." in name and ".mlp." in name):
            out[name] = ("F8_E4M3", shape)
            out[name + "_scale_inv"] = ("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))
        else:
            exact = ".mlp.gate." in name and not (native and name.endswith("gate.weight"))
            out[name] = ("F32" if exact else "BF16", shape)
    return out


def files_of(name: str, ranks: int, experts: int) -> str:
    if ".mtp." in name:
        return "model_mtp.safetensors"
    found = expert_of(name.removesuffix("_scale_inv").removesuffix("_scale"))
    return f"model_pp0_ep{found[1] // (experts // ranks) if found else 0}_shard0.safetensors"


def opened(config: dict[str, Any], stored: Header, ranks: int, tp: int | None) -> Checkpoint:
    """A checkpoint of headers: nobody may read its data."""
    files: dict[str, Header] = {}
    for name, entry in stored.items():
        files.setdefault(files_of(name, ranks, config["n_routed_experts"]), {})[name] = entry
    made = []
    for file, tensors in sorted(files.items()):
        at, entries = 0, {}
        for name, (dtype, shape) in tensors.items():
            end = at + math.prod(shape) * WIDTH[dtype]
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps(entries).encode()
        known = (8 + len(raw) + at, len(raw).to_bytes(8, "little") + raw)
        made.append(TensorFile(Path(file), error=CheckpointError, hint="", known=known))
    return Checkpoint.of_files(Path("x"), config, made, Shards(sorted(files), None, tp))


def test_v26_flash() -> None:
    config = real_config("MiMo-V2.6-Flash")
    assert member(ModelConfig.from_dict(config)) == "MiMo-V2.6-Flash" and usual(config) == "mxfp4"
    stored = header(config, tp=4, native=True)
    checkpoint = opened(config, stored, 64, 4)
    assert checkpoint.tp == 4
    # The repository's 172 923 364 096 bytes hold vision, audio and headers besides.
    assert 168e9 < checkpoint.nbytes < 172.9e9
    jobs = checked_jobs(checkpoint, Recipe.for_format("mxfp4"))
    experts = 47 * 256 * 3 * 2048 * 4096
    assert experts * 17 / 32 == 160_859_947_008
    made = sum(job.nbytes() for job in jobs)
    assert 160.8e9 + 4.5e9 < made < 172.9e9  # nothing is requantised upwards
    parts = [part for job in jobs for part in split(checkpoint, job)]
    assert len(parts) == len(jobs) + 47 * 63
    remote = Remote.__new__(Remote)
    object.__setattr__(remote, "checkpoint", checkpoint)
    files = {file.path.name: file.size for file in checkpoint.files()}
    order = arrange(steps_of(remote, parts), files)
    assert order.peak == max(files.values()) < 14e9  # the first file has all that is no expert
    found = exact_sizes(remote, Recipe.for_format("mxfp4"))
    assert found.expert == 13_369_344 and found.experts == 47 * 256
    plain = sizes.PackSizes.estimate(ModelConfig.from_dict(config), Recipe.for_format("mxfp4"))
    assert found.total == pytest.approx(plain.total, rel=1e-3)


def test_v25_and_pro() -> None:
    """What their attention's shapes say without an index, and V2.5's bytes: 315.7 GB with all."""
    for name, tp in (("MiMo-V2.5", 4), ("MiMo-V2.5-Pro", 8), ("MiMo-V2.6-Flash", 4)):
        config = real_config(name)
        assert member(ModelConfig.from_dict(config)) == name
        stored = header(config, tp=tp, native=False)
        if name == "MiMo-V2.5":
            at = "model.layers.0.self_attn.qkv_proj.weight"
            assert stored[at][1] == (13568, 4096) and stored[at + "_scale_inv"][1] == (108, 32)
            at = "model.mtp.layers.0.self_attn.qkv_proj.weight"
            assert stored[at][1] == (14848, 4096) and stored[at + "_scale_inv"][1] == (116, 32)
            total = sum(math.prod(shape) * WIDTH[dtype] for dtype, shape in stored.values())
            assert total == pytest.approx(313.05e9, rel=1e-4) and usual(config) == "nf4"
        attention = {n: entry for n, entry in stored.items() if "qkv_proj" in n}
        assert opened(config, attention, 1, None).tp == tp


def test_a_million_tokens_of_keys_and_values() -> None:
    config = ModelConfig.from_dict(real_config("MiMo-V2.5"))
    rings = 39 * 5120 * 129
    assert config.max_context == 1_048_576
    assert sizes.kv_bytes(config, 1_048_576) == 23_040 * 1_048_576 + rings
