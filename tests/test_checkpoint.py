"""The checkpoint reader: every layout gives the known weights, all damage a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    fp8_fused,
    fp8_quantize,
    random_weights,
    tiny_config,
    write_bf16,
    write_folder,
    write_fp8,
    write_fused,
    write_mxfp4,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mimo_local.errors import CheckpointError
from quant.checkpoint import Checkpoint
from quant.formats import FORMATS
from quant.fp8 import fp8_to_f32, fused_grid
from quant.mxfp4 import swap_nibbles
from quant.shards import INDEX
from quant.tensorfile import Scratch

torch.set_num_threads(1)
SCRATCH = Scratch()
K_FULL = "model.layers.0.self_attn.k_proj.weight"


def same(ckpt: Checkpoint, weights: dict[str, torch.Tensor]) -> None:
    assert ckpt.names() == sorted(weights)
    for name, w in weights.items():
        assert ckpt.shape(name) == tuple(w.shape)
        assert torch.equal(ckpt.read(name), w), name


# ---- the scale layout of the full-attention layers ----------------------------------------------


def test_the_real_models_scale_rows() -> None:
    """Full attention: q 12288, k 768, v 512 rows, four shards. K head g: rows 192g.., V: 128g.."""
    grid = fused_grid(12288, 768, 512, tp=4)
    assert grid.counts == (96, 8, 4)
    q, k, v = grid.rows
    assert q.tolist() == [r // 128 for r in range(12288)]
    ks, vs = 96, 96 + 8  # where K's and V's scale rows begin in the concatenation
    for g in range(4):
        assert k[192 * g : 192 * g + 128].eq(ks + 2 * g).all()
        assert k[192 * g + 128 : 192 * (g + 1)].eq(ks + 2 * g + 1).all()
        assert v[128 * g : 128 * g + 64].eq(ks + 2 * g + 1).all()  # from K's scale tensor
        assert v[128 * g + 64 : 128 * (g + 1)].eq(vs + g).all()


@given(tp=st.integers(1, 8), q=st.integers(1, 4), k=st.integers(1, 3), v=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_whole_blocks_per_shard_are_the_plain_grid(tp: int, q: int, k: int, v: int) -> None:
    sizes = [128 * tp * n for n in (q, k, v)]
    grid = fused_grid(sizes[0], sizes[1], sizes[2], tp)
    start = 0
    for n, count, rows in zip(sizes, grid.counts, grid.rows, strict=True):
        assert count == n // 128
        assert rows.tolist() == [start + r // 128 for r in range(n)]
        start += count


@given(
    tp=st.integers(1, 4),
    q=st.integers(1, 400),
    k=st.integers(1, 300),
    v=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_any_fused_layout_comes_back(tp: int, q: int, k: int, v: int, seed: int) -> None:
    """Against the writer, which quantises shard by shard and knows nothing of `fused_grid`."""
    g = torch.Generator().manual_seed(seed)
    sizes = [n * tp for n in (q, k, v)]
    w = [torch.randn(n, 4, generator=g) * torch.rand(n, 1, generator=g) for n in sizes]
    parts = fp8_fused(w[0], w[1], w[2], tp)
    grid = fused_grid(sizes[0], sizes[1], sizes[2], tp)
    assert grid.counts == tuple(parts[n][1].shape[0] for n in "qkv")
    table = torch.cat([parts[n][1] for n in "qkv"])
    for n, rows in zip("qkv", grid.rows, strict=True):
        codes, _, exact = parts[n]
        assert torch.equal(codes.float() * table[rows], exact)


def test_the_naive_layout_would_fail_by_a_wide_margin(tmp_path: Path) -> None:
    """K padded to the scale rows there are, V on its own grid: what a plain reader would do."""
    weights = write_fp8(tmp_path, tiny_config())
    ckpt = Checkpoint.open(tmp_path)
    stored = load_file(tmp_path / "model-00001-of-00001.safetensors")
    for kind in "kv":
        name = f"model.layers.0.self_attn.{kind}_proj.weight"
        assert torch.equal(ckpt.read(name), weights[name])
        scales = stored[name + "_scale_inv"]
        naive = stored[name].float()
        rows = torch.arange(naive.shape[0]) // 128
        naive *= scales[rows].repeat_interleave(128, dim=1)
        error = (naive - weights[name]).norm(dim=1) / weights[name].norm(dim=1)
        assert (error > 0.3).float().mean() > 0.3, kind  # a third of all rows and more are far off
    # and in the sliding layer, whose shards are whole blocks, the same rows are right
    name = "model.layers.1.self_attn.k_proj.weight"
    rows = torch.arange(768) // 128
    naive = stored[name].float() * stored[name + "_scale_inv"][rows].repeat_interleave(128, dim=1)
    assert torch.equal(naive, weights[name])
    assert torch.equal(ckpt.read(name), weights[name])


# ---- layouts ------------------------------------------------------------------------------------


def test_every_code_of_fp8_widens_as_torch_widens_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    for raw in (codes, codes[:1, :3].contiguous(), codes.view(torch.float8_e5m2)):
        wide = torch.empty(raw.shape)
        fp8_to_f32(raw, wide)
        assert torch.equal(wide.isnan(), raw.float().isnan())
        assert torch.equal(wide.nan_to_num(), raw.float().nan_to_num())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("mtp_in_index", [True, False])
def test_the_official_fp8_layout(tmp_path: Path, shards: int, mtp_in_index: bool) -> None:
    weights = write_fp8(tmp_path, tiny_config(), shards=shards, mtp_in_index=mtp_in_index)
    ckpt = Checkpoint.open(tmp_path)
    same(ckpt, weights)
    assert ckpt.dtype(K_FULL) == "F8_E4M3"
    assert ckpt.load(K_FULL).codes.dtype == torch.float8_e4m3fn
    assert ckpt.nbytes == sum(
        sum(t.nbytes for t in load_file(f).values()) for f in tmp_path.glob("*.safetensors")
    )


def test_bf16_and_transformers_names(tmp_path: Path) -> None:
    config = tiny_config()
    same_as = write_bf16(tmp_path / "bf16", config, shards=2)
    same(Checkpoint.open(tmp_path / "bf16"), same_as)
    fused = write_fused(tmp_path / "fused", config)
    ckpt = Checkpoint.open(tmp_path / "fused")
    same(ckpt, fused)
    assert "model.layers.1.self_attn.attention_sink_bias" in ckpt
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in ckpt


@pytest.mark.parametrize("e8m0", [False, True])
def test_experts_stored_as_mxfp4(tmp_path: Path, e8m0: bool) -> None:
    weights = write_mxfp4(tmp_path, tiny_config(), shards=2, e8m0=e8m0)
    ckpt = Checkpoint.open(tmp_path)
    same(ckpt, weights)
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    assert ckpt.dtype(name) == "MXFP4" and ckpt.shape(name) == (256, 128)
    assert ckpt.stored_bytes(name) == 256 * 64 + 256 * 4
    parts = ckpt.read_mxfp4(name, slice(3, 200))
    stated = FORMATS["mxfp4"].parts(197, 128)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == stated
    assert torch.equal(FORMATS["mxfp4"].unpack(parts), weights[name][3:200])
    assert ckpt.nbytes == sum(
        sum(t.nbytes for t in load_file(f).values()) for f in tmp_path.glob("*.safetensors")
    )


@given(n=st.integers(0, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_nibbles_change_places(n: int, seed: int) -> None:
    raw = torch.randint(
        0, 256, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    wanted = [(b >> 4) | (b & 15) << 4 for b in raw.tolist()]
    assert swap_nibbles(raw.clone()).tolist() == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:, :-1].contiguous(), r"scales of .* are U8 \[256, 3\]"),
        (lambda s: s.float(), r"scales of .* are F32"),
        (lambda s: s.fill_(253), "holds NaN or infinite scales"),
        (lambda s: s.fill_(255), "holds NaN or infinite scales"),
    ],
)
def test_mxfp4_scales_that_cannot_be(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    write_mxfp4(tmp_path, tiny_config())

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name + "_scale"] = change(tensors[name + "_scale"])

    rewrite(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message) as e:
        Checkpoint.open(tmp_path).read(name)
    assert "model.safetensors" in str(e.value) and name in str(e.value) and e.value.hint


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """Its own `save_pretrained` of a seeded model, compared with its own parameters."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    torch.manual_seed(0)
    config = MiMoV2FlashConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        v_head_dim=8,
        vocab_size=64,
        n_routed_experts=3,
        num_experts_per_tok=2,
    )
    model = MiMoV2FlashForCausalLM(config)
    model.save_pretrained(tmp_path)
    ckpt = Checkpoint.open(tmp_path)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e in range(3):
                at = name.replace("gate_up_proj", f"{e}.")
                gate, up = value[e].float().chunk(2)
                assert torch.equal(ckpt.read(at + "gate_proj.weight"), gate)
                assert torch.equal(ckpt.read(at + "up_proj.weight"), up)
        elif name.endswith("experts.down_proj"):
            for e in range(3):
                at = name.replace("down_proj", f"{e}.down_proj.weight")
                assert torch.equal(ckpt.read(at), value[e].float())
        else:
            hub = name.replace("self_attn.sinks", "self_attn.attention_sink_bias")
            assert torch.equal(ckpt.read(hub), value.float()), name


def test_tied_embeddings_and_other_modalities(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    extra = {"visual.patch.weight": torch.ones(2, 2), "model.audio_tower.0.bias": torch.ones(2)}
    write_folder(tmp_path, config, weights | extra)
    ckpt = Checkpoint.open(tmp_path)
    same(ckpt, weights)
    assert "lm_head.weight" not in ckpt
    assert ckpt.skipped() == sorted(extra)


def test_a_checkpoint_is_recognised_by_its_content(tmp_path: Path) -> None:
    config = tiny_config()
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        write_bf16(tmp_path / name, config, seed=seed)
    marks = [Checkpoint.open(tmp_path / n).fingerprint() for n in ("a", "same", "other")]
    assert marks[0] == marks[1] != marks[2]


# ---- row ranges ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_of_a_tensor_are_those_of_the_whole(
    data: st.DataObject, opened: dict[str, tuple[Checkpoint, dict[str, torch.Tensor]]]
) -> None:
    kind = data.draw(st.sampled_from(sorted(opened)))
    ckpt, weights = opened[kind]
    name = data.draw(st.sampled_from(sorted(weights)))
    n = weights[name].shape[0]
    start = data.draw(st.none() | st.integers(-n - 2, n + 2))
    stop = data.draw(st.none() | st.integers(-n - 2, n + 2))
    wanted = weights[name][start:stop]
    assert torch.equal(ckpt.read(name, slice(start, stop)), wanted)
    assert torch.equal(ckpt.read(name, slice(start, stop), scratch=SCRATCH), wanted)


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Checkpoint, dict[str, torch.Tensor]]]:
    root, config = tmp_path_factory.mktemp("opened"), tiny_config()
    made = {
        "fp8": write_fp8(root / "fp8", config, shards=2),
        "bf16": write_bf16(root / "bf16", config),
        "fused": write_fused(root / "fused", config),
        "mxfp4": write_mxfp4(root / "mxfp4", config),
    }
    return {kind: (Checkpoint.open(root / kind), weights) for kind, weights in made.items()}


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 300), cols=st.integers(1, 300), seed=st.integers(0, 99))
def test_blocks_may_be_ragged_at_both_edges(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("ragged")
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * torch.rand(rows, 1, generator=g)
    codes, scales, exact = fp8_quantize(w)
    write_folder(folder, {}, {"w": codes, "w_scale_inv": scales})
    assert torch.equal(Checkpoint.open(folder).read("w"), exact)


# ---- damage -------------------------------------------------------------------------------------


def header(entries: Any, data: int = 0) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header of 0 bytes"),
    "huge header": ((1 << 62).to_bytes(8, "little") + b"{}", "header of 4611686018427387904"),
    "header past the end": ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes"),
    "not json": (header(b"{not json"), "corrupt header"),
    "not utf-8": (header(b'{"\xff": 1}'), "corrupt header"),
    "deep json": (header(b"[" * 100_000), "corrupt header"),
    "a list": (header([]), "not a JSON object"),
    "twice": (header(b'{"a": 1, "a": 2}'), "appears twice"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [1]}}), "header entry for a"),
    "text offsets": (header({"a": entry([1], "0", "4")}, 4), "header entry for a"),  # type: ignore[arg-type]
    "unknown dtype": (header({"a": entry([1], 0, 4, "Q9")}, 4), "Q9"),
    "negative shape": (header({"a": entry([-1, -4], 0, 16)}, 16), "impossible shape"),
    "boolean shape": (header({"a": entry([True], 0, 4)}, 4), "impossible shape"),
    "wrapping shape": (header({"a": entry([1 << 62, 4], 0, 0)}), "claims 0 bytes"),
    "shape and size": (header({"a": entry([2], 0, 4)}, 4), "needs 8"),
    "negative start": (header({"a": entry([1], -4, 0)}), "claims 4 bytes"),
    "past the end": (header({"a": entry([1], 0, 4)}, 3), "short: a ends"),
    "overlap": (header({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8), "b overlaps"),
    "hole": (header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12), "hole before"),
    "tail": (header({"a": entry([1], 0, 4)}, 9), "too long"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_named(tmp_path: Path, kind: str) -> None:
    data, message = HOSTILE[kind]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as e:
        Checkpoint.open(tmp_path)
    assert message in str(e.value) and e.value.hint


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_header_never_gives_anything_but_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    good = header({"a": entry([2], 0, 8), "b": entry([1], 8, 12)}, 12)
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    keep = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    (folder / "model.safetensors").write_bytes(bytes(raw[:keep]))
    try:
        ckpt = Checkpoint.open(folder)
        for name in ckpt.names():
            ckpt.read(name)
    except CheckpointError as e:
        assert "model.safetensors" in str(e)
        assert e.hint


def test_a_folder_without_what_it_needs(tmp_path: Path) -> None:
    cases: list[tuple[Path, str]] = [(tmp_path / "nowhere", "no checkpoint folder")]
    for name in ("bare", "config only", "broken config"):
        (tmp_path / name).mkdir()
    (tmp_path / "config only/config.json").write_text("{}")
    (tmp_path / "broken config/config.json").write_text("{")
    cases += [
        (tmp_path / "bare", "config.json is missing"),
        (tmp_path / "config only", "no .safetensors files"),
        (tmp_path / "broken config", "config.json is not valid JSON"),
    ]
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message) as e:
            Checkpoint.open(path)
        assert e.value.hint


def test_missing_and_short_shards_are_named(tmp_path: Path) -> None:
    write_bf16(tmp_path, tiny_config(), shards=3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{second.name} is short"):
        Checkpoint.open(tmp_path)
    second.unlink()
    for index in (True, False):
        if not index:
            (tmp_path / INDEX).unlink()
        with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
            Checkpoint.open(tmp_path)
    second.write_bytes(whole)
    assert len(Checkpoint.open(tmp_path).names()) > 20


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m | {"ghost": "model-00001-of-00002.safetensors"}, "says ghost is in"),
        (lambda m: m | {"ghost": "gone.safetensors"}, "gone.safetensors is missing"),
        (lambda m: m | {"ghost": "../x.safetensors"}, "no usable weight_map"),
        (lambda m: m | {"ghost": 3}, "no usable weight_map"),
        (lambda m: None, "no usable weight_map"),
    ],
)
def test_an_index_that_lies(
    tmp_path: Path, edit: Callable[[dict[str, str]], Any], message: str
) -> None:
    write_bf16(tmp_path, tiny_config(), shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = edit(index["weight_map"])
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_needs_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        save_file({"x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"x is in both a\.safetensors and b\.safetensors"):
        Checkpoint.open(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    write_fp8(tmp_path, tiny_config(), mtp=False)
    return tmp_path


@pytest.mark.parametrize("name", [K_FULL, "model.layers.2.mlp.experts.1.up_proj.weight"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: None, "_scale_inv is missing"),
        (lambda s: s[:-2].contiguous(), "need"),
        (lambda s: torch.cat([s, s]), "need"),
        (lambda s: s[:, :1].contiguous(), "need 2 columns"),
        (lambda s: s.view(-1), "need 2 columns"),
        (lambda s: s.to(torch.int32), "need 2 columns"),
    ],
)
def test_wrong_scales_are_found_before_any_weight_is_read(
    fp8: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        new = change(tensors.pop(name + "_scale_inv"))
        if new is not None:
            tensors[name + "_scale_inv"] = new

    rewrite(fp8, edit)
    with pytest.raises(CheckpointError, match=message) as e:
        Checkpoint.open(fp8)
    assert "model.safetensors" in str(e.value) and name in str(e.value) and e.value.hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(fp8: Path, bad: float) -> None:
    expert, norm = "model.layers.1.mlp.experts.0.down_proj.weight", "model.norm.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K_FULL + "_scale_inv"][1, 0] = bad
        tensors[norm][3] = bad
        if bad != bad:
            tensors[expert].view(torch.uint8)[0, 0] = 0x7F  # FP8's NaN; it has no infinity

    rewrite(fp8, edit)
    ckpt = Checkpoint.open(fp8)
    # K's scales serve V too
    for name in (K_FULL, K_FULL.replace("k_proj", "v_proj")):
        with pytest.raises(CheckpointError, match=r"k_proj.weight_scale_inv holds NaN or inf"):
            ckpt.read(name)
    with pytest.raises(CheckpointError, match=f"{norm} holds NaN or infinite weights"):
        ckpt.read(norm)
    if bad != bad:
        with pytest.raises(CheckpointError, match=f"{expert} holds NaN"):
            ckpt.read(expert)


def test_large_weights_are_not_taken_for_infinite(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, {"w": torch.full((4, 4), 3e38)})
    assert torch.equal(Checkpoint.open(tmp_path).read("w"), torch.full((4, 4), 3e38))


def test_stored_integers_are_not_weights(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, {"w": torch.ones(2, 2, dtype=torch.uint8)})
    ckpt = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="w is stored as U8"):
        ckpt.read("w")
    with pytest.raises(CheckpointError, match="ghost is not in the checkpoint"):
        ckpt.read("ghost")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path, {}, {"w": torch.ones(64, 64)})
    ckpt = Checkpoint.open(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="100 bytes early while w"):
        ckpt.read("w")
