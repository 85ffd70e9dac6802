"""Every member of the family: read, converted, run and drafted with, against float references."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import family
import pytest
import tiny
import torch
from checkpoints import fp8_quantize
from family import MEMBERS
from safetensors.torch import load_file, save_file
from test_mtp import Reference, Sequence

from mimo_local.errors import CheckpointError, ConfigError
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.mtp import Drafter
from mimo_local.weights import Weights, open_weights
from quant import evidence
from quant.checkpoint import Checkpoint
from quant.convert import Recipe, convert
from quant.inventory import Qkv
from quant.jobs import checkpoint_notes
from quant.pack import Pack, expert_views
from quant.sources import fits

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=MEMBERS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any], dict[str, torch.Tensor]]:
    """(member, folder, config, exact weights)."""
    folder = tmp_path_factory.mktemp("family") / request.param
    return request.param, folder, *family.write(folder, request.param)


Written = tuple[str, Path, dict[str, Any], dict[str, torch.Tensor]]


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model.forward([Segment(ids, model.new_cache())]))


def test_every_tensor_comes_back_exactly(written: Written) -> None:
    _, folder, _, exact = written
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names() == sorted(exact)
    for name, w in exact.items():
        assert checkpoint.shape(name) == tuple(w.shape)
        assert torch.equal(checkpoint.read(name), w), name
        if len(w.shape) == 2 and len(w) > 300:  # a range across a shard's end
            assert torch.equal(checkpoint.read(name, slice(100, 300)), w[100:300]), name
    total = sum(f.entries[n].nbytes for f in checkpoint.files() for n in f.entries)
    skipped = sum(
        f.entries[n].nbytes for f in checkpoint.files() for n in f.entries if n in family.MODALITIES
    )
    assert checkpoint.nbytes == total - skipped


def off(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Per row, the largest difference over the largest logit."""
    return (found - wanted).abs().amax(1) / wanted.abs().max()


def oracle(d: dict[str, Any], exact: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return cast(torch.Tensor, tiny.oracle(d, exact)(ids[None]).logits[0])


def opened(folder: Path, dtype: torch.dtype | None = None) -> tuple[Model, Weights]:
    weights = open_weights(folder, dtype=dtype)
    return Model(weights, ExpertStore(weights)), weights


@pytest.mark.usefixtures("way")
def test_the_checkpoint_itself_runs(written: Written) -> None:
    _, folder, d, exact = written
    ids = tiny.prompt(d, 30)
    wanted = oracle(d, exact, ids)
    model, weights = opened(folder, torch.float32)
    assert off(logits(model, ids), wanted).max() < 1e-4
    check_drafts(model, weights, d, exact)
    # As stored, FP8 as bfloat16: a row whose eighth expert was a near tie may go another way.
    assert off(logits(opened(folder)[0], ids), wanted).median() < 0.01


def check_drafts(
    model: Model, weights: Weights, d: dict[str, Any], exact: dict[str, torch.Tensor]
) -> None:
    assert weights.config.n_mtp_layers == 3
    drafter = Drafter(weights, model, small_head=False)
    sequence = Sequence(model, drafter, Reference(d, exact))
    sequence.read(tiny.prompt(d, 20, seed=1).tolist())
    sequence.check(7)
    sequence.read([7, 8])
    sequence.check(9)


def test_a_pack_that_loses_nothing_is_the_reference(written: Written, tmp_path: Path) -> None:
    _, folder, d, exact = written
    ids = tiny.prompt(d, 30)
    pack = convert(folder, tmp_path / "pack", Recipe.uniform("f32"))
    model, weights = opened(pack.path)
    assert off(logits(model, ids), oracle(d, exact, ids)).max() < 1e-4
    check_drafts(model, weights, d, exact)


@pytest.mark.usefixtures("way")
def test_a_pack_as_people_have_it_is_near_it(written: Written, tmp_path: Path) -> None:
    member, folder, d, exact = written
    ids = tiny.prompt(d, 30)
    recipe = Recipe.for_format("mxfp4" if member == "MiMo-V2.6-Flash" else "nf4")
    model, weights = opened(convert(folder, tmp_path / "pack", recipe).path)
    bound = 0.05 if member == "MiMo-V2.6-Flash" else 0.1  # beside int8, or 4 bits anew
    assert off(logits(model, ids), oracle(d, exact, ids)).median() < bound
    assert weights.config.n_mtp_layers == 3


def test_native_experts_are_kept_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    d, _ = family.write(folder, "MiMo-V2.6-Flash")
    pack = convert(folder, tmp_path / "pack", Recipe.for_format("mxfp4"))
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    for layer in (1, 2):
        layout = pack.expert_layout(layer)
        assert layout.format == "mxfp4"
        for e in range(d["n_routed_experts"]):
            views = expert_views(pack.read_expert(layer, e), layout)
            for matrix, parts in views.items():
                name = f"model.layers.{layer}.mlp.experts.{e}.{matrix}.weight"
                swapped = (stored[name] << 4) | (stored[name] >> 4)  # a pack's first nibble is high
                assert torch.equal(parts["codes"], swapped)
                assert torch.equal(parts["scales"], stored[name + "_scale"])


def test_the_router_is_kept_as_it_is_stored(written: Written, tmp_path: Path) -> None:
    member, folder, _, exact = written
    pack = convert(folder, tmp_path / "pack", Recipe.for_format("nf4"))
    name = "model.layers.1.mlp.gate.weight"
    narrow = member == "MiMo-V2.6-Flash"
    assert pack.tensors[name].format == ("bf16" if narrow else "f32")
    assert pack.tensors["model.layers.1.mlp.gate.e_score_correction_bias"].format == "f32"
    weights = open_weights(pack.path)
    assert weights.config.router_dtype == ("bfloat16" if narrow else "float32")
    assert torch.equal(weights.tensor(name), exact[name])


# ---- how many shards a fused qkv_proj has --------------------------------------------------------


def reindex(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    family.write(tmp_path / "m", "MiMo-V2.5", mtp_layers=0)
    return tmp_path / "m"


def test_the_shapes_of_scales_tell_how_many_shards_there_are(fused: Path) -> None:
    before = Checkpoint.open(fused)
    name = "model.layers.0.self_attn.v_proj.weight"
    wanted = before.read(name)
    assert before.tp == 2
    reindex(fused, lambda index: index["metadata"].pop("tp_size"))
    again = Checkpoint.open(fused)
    assert again.tp == 2 and torch.equal(again.read(name), wanted)


@pytest.mark.parametrize("value", [1, 4, 3])
def test_a_wrong_number_of_shards_is_refused(fused: Path, value: int) -> None:
    reindex(fused, lambda index: index["metadata"].update(tp_size=value))
    with pytest.raises(CheckpointError, match=f"2 shards.*says tp_size {value}") as e:
        Checkpoint.open(fused)
    assert "qkv_proj" in str(e.value) and e.value.hint


@pytest.mark.parametrize("value", ["4", 0, -1, True, 2.0])
def test_no_number_of_shards_is_refused(fused: Path, value: object) -> None:
    reindex(fused, lambda index: index["metadata"].update(tp_size=value))
    with pytest.raises(CheckpointError, match="tp_size is"):
        Checkpoint.open(fused)


def test_where_nothing_tells_them_it_is_refused(fused: Path) -> None:
    """Plain bfloat16 has no scales to tell 1 shard from 2; with the index's word it is read."""
    exact = {n: Checkpoint.open(fused).read(n) for n in Checkpoint.open(fused).names()}
    fused_name = "model.layers.0.self_attn.qkv_proj.weight"
    for path in fused.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith("qkv_proj.weight")]:
            del tensors[name + "_scale_inv"]
            parts = [exact[name.replace("qkv", p)].chunk(2) for p in "qkv"]
            tensors[name] = torch.cat([x for shard in zip(*parts, strict=True) for x in shard])
        save_file(tensors, path)

    def change(index: dict[str, Any]) -> None:
        index["metadata"].pop("tp_size")
        index["weight_map"] = {
            n: f for n, f in index["weight_map"].items() if "qkv_proj.weight_scale" not in n
        }

    reindex(fused, change)
    with pytest.raises(CheckpointError, match="nothing says in how many: 1 or 2 would fit") as e:
        Checkpoint.open(fused)
    assert "tp_size" in e.value.hint
    reindex(fused, lambda index: index["metadata"].update(tp_size=2))
    checkpoint = Checkpoint.open(fused)
    for name in ("q", "k", "v"):
        name = fused_name.replace("qkv", name)
        assert torch.equal(checkpoint.read(name), exact[name])


def test_a_fused_matrix_of_another_size_is_refused(fused: Path) -> None:
    config = json.loads((fused / "config.json").read_text())
    (fused / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight has 1408 rows.*1152"):
        Checkpoint.open(fused)
    del config["num_key_value_heads"]
    (fused / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="num_key_value_heads is missing"):
        Checkpoint.open(fused)


def test_the_real_shapes_decide() -> None:
    """V2.5: 13568 rows with 108 of scales are 4 shards, V2.5-Pro's 27136 with 216 are 8."""
    for heads, kv, rows, scales, tp in ((64, 4, 13568, 108, 4), (128, 8, 27136, 216, 8)):
        qkv = Qkv((heads * 192, kv * 192, kv * 128), kv)
        assert sum(qkv.rows) == rows
        assert [n for n in range(1, kv + 1) if fits(qkv, scales, n, 128)] == [tp]
    sliding = Qkv((64 * 192, 8 * 192, 8 * 128), 8)  # whole blocks: its shape tells nothing
    assert [n for n in range(1, 9) if fits(sliding, 116, n, 128)] == [1, 2, 4]


# ---- whether scales lie where they should --------------------------------------------------------


def layout_of(pack: Pack) -> dict[str, int]:
    return cast("dict[str, int]", pack.manifest["layout"])


def test_the_codes_say_that_the_layout_is_right(written: Written, tmp_path: Path) -> None:
    """Per full layer and shard: 3 blocks of q, 3 that hold rows of k or v; two column blocks."""
    member, folder, _, _ = written
    found = layout_of(convert(folder, tmp_path / "pack"))
    newer = member in ("MiMo-V2.5", "MiMo-V2.6-Flash")
    assert found["layers"] == (6 if newer else 2)  # where q, k, v are apart, sliding ones are plain
    assert found["plain"] == found["full"] and found["shared"] == found["shared_full"]
    if not newer:
        assert (found["plain"], found["shared"]) == (2 * 2 * 3 * 2, 2 * 2 * 3 * 2)
    assert "lie as expected" in evidence.told(found)


def test_another_layout_with_the_same_shapes_is_refused(tmp_path: Path) -> None:
    """K's and V's blocks begin anew with each of them: V's first half has V's own scale then."""
    folder = tmp_path / "m"
    d, _ = family.write(folder, "MiMo-V2-Flash", mtp_layers=0)
    g = torch.Generator().manual_seed(3)
    path = folder / "model_0.safetensors"
    tensors = load_file(path)
    for part, rows, cuts in (("k", 192, (0, 128, 192)), ("v", 128, (0, 128))):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        codes, scales = [], []
        for _ in range(d["num_key_value_heads"]):
            w = torch.randn(rows, 256, generator=g)
            for a, b in itertools.pairwise(cuts):
                c, s, _ = fp8_quantize(w[a:b])
                codes.append(c)
                scales.append(s)
        tensors |= {name: torch.cat(codes), name + "_scale_inv": torch.cat(scales)}
    save_file(tensors, path)
    checkpoint = Checkpoint.open(folder)  # the shapes are right
    with pytest.raises(CheckpointError, match=r"of 12 blocks reach.* 12 of 12") as e:
        convert(checkpoint, tmp_path / "pack")
    assert "v_proj" in str(e.value) and "report" in e.value.hint


def test_scales_that_are_powers_of_two_cannot_tell(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    family.write(folder, "MiMo-V2-Flash", mtp_layers=0)
    for path in folder.glob("model_?.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if "self_attn" in n and n.endswith("_scale_inv")]:
            weight = tensors[name.removesuffix("_scale_inv")].float()
            tensors[name.removesuffix("_scale_inv")] = (weight * 0.7).to(torch.float8_e4m3fn)
        save_file(tensors, path)
    found = layout_of(convert(folder, tmp_path / "pack"))
    assert found["full"] == 0 and "could not be checked" in evidence.told(found)


# ---- tensors of other models ---------------------------------------------------------------------


def add(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    save_file(extra, folder / "more.safetensors")
    added = dict.fromkeys(extra, "more.safetensors")
    reindex(folder, lambda index: index["weight_map"].update(added))


def test_an_unknown_tensor_of_the_text_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    family.write(folder, "MiMo-V2.5", mtp_layers=0)
    extra = [f"model.layers.1.self_attn.{n}_norm.weight" for n in "abcdq"]
    add(folder, {name: torch.ones(192) for name in extra})
    with pytest.raises(CheckpointError, match=r"a_norm.*b_norm.*c_norm.* and 2 more") as e:
        convert(folder, tmp_path / "pack")
    assert e.value.hint
    with pytest.raises(CheckpointError, match="no model of this kind has"):
        open_weights(folder)


def test_unknown_drafting_tensors_are_left_out_with_a_note(tmp_path: Path) -> None:
    """They could cost drafts, never answers."""
    folder = tmp_path / "m"
    family.write(folder, "MiMo-V2.6-Flash", mtp_layers=2)
    extra = {
        "model.mtp.layers.0.new_gate.weight": torch.ones(4),
        "model.mtp.norm.weight": torch.ones(4),
    }
    half = {"model.mtp.layers.2.eh_proj.weight": torch.ones(256, 512)}
    add(folder, extra | half)
    checkpoint = Checkpoint.open(folder)
    notes = checkpoint_notes(checkpoint)
    assert any(
        "3 tensors of drafting layers" in n and "2 drafting layers are used" in n for n in notes
    )
    pack = convert(checkpoint, tmp_path / "pack")
    assert not {*extra, *half} & set(pack.tensors)
    assert open_weights(pack.path).config.n_mtp_layers == 2
    assert open_weights(folder).config.n_mtp_layers == 2


def test_what_is_left_out_is_said(written: Written) -> None:
    member, folder, _, _ = written
    notes = checkpoint_notes(Checkpoint.open(folder))
    if member.startswith("MiMo-V2-Flash"):
        assert notes == []
    else:
        assert notes == ["4 tensors of vision, audio and speech are left out: only text is read"]


def test_a_checkpoint_without_drafting_layers_is_said(tmp_path: Path) -> None:
    family.write(tmp_path / "m", "MiMo-V2.6-Flash", mtp_layers=0)
    notes = checkpoint_notes(Checkpoint.open(tmp_path / "m"))
    assert "config.json promises 3 drafting layers, 0 are there whole" in notes
