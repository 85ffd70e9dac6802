"""Weights by name: the same numbers from a checkpoint and a pack, and folders that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from mimo_local.errors import CheckpointError, ConfigError, MimoError, ModelFilesError, PackError
from mimo_local.events import Progress
from mimo_local.weights import Embedding, QuantLinear, open_weights, shapes, stack
from quant.convert import Recipe, convert
from quant.formats import get_format

# NF4 needs columns in blocks of 64.
WIDE: dict[str, Any] = {"hidden": 64, "intermediate": 128, "moe_intermediate": 64, "v_head_dim": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as a float32 and a bfloat16 checkpoint and as packs."""
    root = tmp_path_factory.mktemp("weights")
    d = tiny.config("fs", "dm", **WIDE)
    out = {"f32": tiny.write(root / "f32", d, shards=3, mtp_layers=2)}
    out["bf16"] = tiny.write(root / "bf16", d, dtype=torch.bfloat16)
    for fmt in ("int8", "nf4"):
        out[f"pack {fmt}"] = root / f"pack-{fmt}"
        convert(out["f32"], out[f"pack {fmt}"], Recipe.for_format(fmt))
    return out


@pytest.fixture(scope="module")
def truth() -> dict[str, torch.Tensor]:
    return tiny.state_dict(tiny.config("fs", "dm", **WIDE), mtp_layers=2)


TOLERANCE = {"f32": 0.0, "bf16": 0.005, "pack int8": 0.012, "pack nf4": 0.12}


@pytest.mark.parametrize("kind", TOLERANCE)
def test_every_tensor_multiplies_as_the_one_that_was_written(
    kind: str, folders: dict[str, Path], truth: dict[str, torch.Tensor]
) -> None:
    weights = open_weights(folders[kind])
    assert weights.kind == ("pack" if "pack" in kind else "checkpoint")
    for name, shape in shapes(weights.config, experts=False):
        assert weights.has(name)
        if len(shape) == 1 or ".mlp.gate." in name:
            wanted = truth[name] if kind != "bf16" or "gate" in name else truth[name].bfloat16()
            if "sink" in name:
                wanted = truth[name]
            assert torch.equal(weights.tensor(name), wanted.float()), name
            continue
        linear = weights.linear(name)
        assert (linear.rows, linear.cols) == shape
        x = torch.randn(3, shape[1])
        wanted = x @ truth[name].T
        assert float((linear(x) - wanted).norm() / wanted.norm()) <= TOLERANCE[kind] + 1e-6
    expert = weights.expert(1, 5)
    for matrix, part in ((expert.gate, "gate"), (expert.up, "up"), (expert.down, "down")):
        w = truth[f"model.layers.1.mlp.experts.5.{part}_proj.weight"]
        found = matrix(torch.eye(w.shape[1])).T
        assert float((found - w).norm() / w.norm()) <= TOLERANCE[kind] + 1e-6


@pytest.mark.parametrize("kind", TOLERANCE)
def test_nbytes_is_what_loading_everything_takes(kind: str, folders: dict[str, Path]) -> None:
    weights = open_weights(folders[kind])
    total = 0
    for name, shape in shapes(weights.config, experts=False):
        exact = len(shape) == 1 or ".mlp.gate." in name
        total += weights.tensor(name).nbytes if exact else weights.linear(name).nbytes
    experts = sum(weights.expert(1, e).nbytes for e in range(8))
    if weights.kind == "pack":
        # Experts are page-aligned in their file, and read that way.
        assert experts <= weights.expert_nbytes < experts + 8 * 4096
    else:
        assert weights.expert_nbytes == experts
    # Small exact tensors may be stored in bf16 and widened when read.
    assert 0 <= total - (weights.nbytes - weights.expert_nbytes) <= total // 20


@pytest.mark.parametrize("fmt", ["f32", "bf16", "int8", "nf4"])
def test_embedding_rows_are_the_matrix_rows(fmt: str) -> None:
    w = torch.randn(50, 64)
    parts = get_format(fmt).pack(w)
    ids = torch.tensor([3, 49, 3, 0])
    found = Embedding(QuantLinear(get_format(fmt), parts, 50, 64)).rows(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, get_format(fmt).unpack(parts)[ids])


@pytest.mark.parametrize("formats", [("int8", "int8"), ("nf4", "nf4"), ("f32", "bf16")])
def test_stacked_matrices_multiply_like_their_parts(formats: tuple[str, str]) -> None:
    parts = [
        QuantLinear(get_format(f), get_format(f).pack(torch.randn(n, 64)), n, 64)
        for f, n in zip(formats, (12, 5), strict=True)
    ]
    x = torch.randn(3, 64)
    joined = stack(parts)
    assert (joined.rows, joined.cols) == (17, 64)
    torch.testing.assert_close(joined(x), torch.cat([p(x) for p in parts], 1))


def test_matrices_can_be_held_in_another_precision(folders: dict[str, Path]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    half = open_weights(folders["f32"], dtype=torch.bfloat16)
    full = open_weights(folders["bf16"], dtype=torch.float32)
    assert half.linear(name).parts["weight"].dtype == torch.bfloat16
    assert full.linear(name).parts["weight"].dtype == torch.float32
    assert half.nbytes < full.nbytes


def test_fp8_is_held_as_bf16_with_its_scales_applied(tmp_path: Path) -> None:
    d = tiny.config("fs", "dd", **WIDE, quantization_config={"weight_block_size": [128, 128]})
    state = tiny.state_dict(d)
    name = "model.layers.0.mlp.gate_proj.weight"
    wanted = (state[name] * 64).to(torch.float8_e4m3fn)
    state[name] = wanted
    state[name + "_scale_inv"] = torch.full((1, 1), 1 / 64)
    weights = open_weights(tiny.write(tmp_path / "m", d, state=state))
    linear = weights.linear(name)
    assert linear.format.name == "bf16"
    assert torch.equal(linear.parts["weight"].float(), wanted.float() / 64)
    assert open_weights(tmp_path / "m", dtype=torch.float32).linear(name).format.name == "f32"


def test_the_weights_say_how_many_mtp_layers_there_are(folders: dict[str, Path]) -> None:
    with_mtp, without = open_weights(folders["f32"]), open_weights(folders["bf16"])
    assert with_mtp.config.n_mtp_layers == 2 and with_mtp.config.mtp_layer is not None
    assert without.config.n_mtp_layers == 0 and without.config.mtp_layer is None
    assert open_weights(folders["pack int8"]).config == with_mtp.config


def test_opening_reports_and_takes_a_window(folders: dict[str, Path]) -> None:
    seen: list[Progress] = []
    weights = open_weights(folders["f32"], on_progress=seen.append, window=4)
    assert seen[-1].done == seen[-1].total
    assert weights.config.layers[1].window == 4


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    gone = ["model.norm.weight", "model.layers.1.self_attn.attention_sink_bias"]
    gone += [f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in range(5)]
    save_file({n: t for n, t in state.items() if n not in gone}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"7 tensors are missing: `model.norm.weight`.*4 more"
    ):
        open_weights(folder)


def test_a_shape_the_config_does_not_promise_is_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m")
    d = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(d | {"intermediate_size": 47}))
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight` has shape \(48, 32\).*\(47, 32\)"
    ):
        open_weights(folder)


def test_a_pack_of_another_model_than_its_config_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = open_weights(folders["pack int8"])
    assert weights.kind == "pack"
    narrow = tuple(
        dataclasses.replace(spec, intermediate=32) if spec.mlp == "moe" else spec
        for spec in weights.config.layers
    )
    for change in ({"n_experts": 9}, {"moe_intermediate_size": 32, "layers": narrow}):
        with pytest.raises(PackError):
            type(weights)(weights.pack, dataclasses.replace(weights.config, **change))


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="no model folder"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()))
    with pytest.raises(MimoError) as e:
        open_weights(tmp_path)
    assert e.value.hint
