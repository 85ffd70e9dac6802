"""The pack: valid safetensors, aligned experts, and nothing damaged or foreign taken for whole."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mimo_local.errors import DiskSpaceError, PackError
from mimo_local.events import Progress
from quant.formats import Parts, get_format
from quant.inventory import EXPERT_PARTS, expert_name
from quant.layout import plan_experts, stored_name
from quant.pack import Pack, PackWriter, TensorSpec, expert_views
from quant.writer import MANIFEST, manifest_digest

torch.set_num_threads(1)
HIDDEN, INNER, EXPERTS = 128, 64, 5
SHAPES = {
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
ABOUT: dict[str, Any] = {"model_type": "mimo_v2_flash", "fallbacks": []}


def matrix(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that depend on the name only."""
    g = torch.Generator().manual_seed(sum(name.encode()) * 31 + len(name))
    return torch.randn(shape, generator=g)


def packed(spec: TensorSpec) -> Parts:
    w = matrix(spec.name, spec.shape)
    if len(spec.shape) == 2:
        return get_format(spec.format).pack(w)
    return {"weight": w.bfloat16() if spec.format == "bf16" else w}


def expert(layer: int, e: int, fmt: str) -> dict[str, Parts]:
    names = {m: expert_name(layer, e, m) for m in EXPERT_PARTS}
    return {m: get_format(fmt).pack(matrix(names[m], SHAPES[m])) for m in EXPERT_PARTS}


def fill(e: int, views: dict[str, Parts], *, layer: int, fmt: str) -> None:
    for matrix, parts in expert(layer, e, fmt).items():
        for part, tensor in parts.items():
            views[matrix][part].copy_(tensor)


SPECS = (
    TensorSpec("model.embed_tokens.weight", "int8", (50, HIDDEN)),
    TensorSpec("model.norm.weight", "bf16", (HIDDEN,)),
    TensorSpec("odd.bias", "f32", (3,)),
    TensorSpec("lm_head.weight", "nf4", (50, HIDDEN)),
    TensorSpec("odd.weight", "bf16", (7, 9)),
    TensorSpec("router.weight", "f32", (EXPERTS, HIDDEN)),
)


def write_pack(folder: Path, fmt: str = "nf4") -> Path:
    writer = PackWriter(folder)
    records = [writer.tensors("model.safetensors", SPECS, lambda s: iter([packed(s)]))]
    for layer in (1, 2):
        planned = plan_experts(f"experts-{layer:03d}.safetensors", layer, EXPERTS, fmt, SHAPES)
        records.append(writer.experts(layer, planned, partial(fill, layer=layer, fmt=fmt)))
    records.append(writer.blob("config.json", b'{"model_type": "mimo_v2_flash"}'))
    writer.finish(ABOUT, records)
    return folder


@pytest.fixture
def pack_dir(tmp_path: Path) -> Path:
    return write_pack(tmp_path / "pack")


def test_everything_written_is_read_back(pack_dir: Path) -> None:
    with Pack.open(pack_dir) as pack:
        assert set(pack.tensors) == {s.name for s in SPECS}
        for spec in SPECS:
            entry, parts = pack.tensors[spec.name], pack.read(spec.name)
            assert (entry.format, entry.shape) == (spec.format, spec.shape)
            wanted = packed(spec)
            assert parts.keys() == wanted.keys()
            for part in parts:
                assert torch.equal(parts[part], wanted[part])
                assert parts[part].dtype == wanted[part].dtype
        assert pack.config == {"model_type": "mimo_v2_flash"}
        assert pack.nbytes == sum(
            p.stat().st_size for p in pack_dir.iterdir() if p.name != MANIFEST
        )
        assert pack.aux_path("config.json") == pack_dir / "config.json"
        assert pack.aux_path("tokenizer.json") is None


@pytest.mark.parametrize("fmt", ["nf4", "int8", "bf16"])
def test_an_expert_is_one_aligned_read(tmp_path: Path, fmt: str) -> None:
    with Pack.open(write_pack(tmp_path / fmt, fmt)) as pack:
        assert pack.expert_layers == (1, 2)
        layout = pack.expert_layout(2)
        assert layout.offset0 % 4096 == layout.stride % 4096 == 0
        assert layout.nbytes <= layout.stride < layout.nbytes + 4096
        kept = pack.read_expert(2, 0)
        for e in range(EXPERTS):
            buffer = pack.read_expert(2, e)
            assert buffer.data_ptr() % 4096 == 0 and buffer.numel() == layout.stride
            views = expert_views(buffer, layout)
            for m, parts in expert(2, e, fmt).items():
                for part, tensor in parts.items():
                    assert torch.equal(views[m][part], tensor)
                    assert views[m][part].data_ptr() % 64 == 0
                    assert views[m][part].untyped_storage().data_ptr() == (
                        buffer.untyped_storage().data_ptr()
                    )
            reused = pack.read_expert(2, e, out=kept)
            assert reused.data_ptr() == kept.data_ptr() and torch.equal(reused, buffer)


def test_the_files_are_safetensors_to_everybody(pack_dir: Path) -> None:
    """The safetensors library opens them and finds the same tensors; data starts at a page."""
    pack = Pack.open(pack_dir)
    for path in pack_dir.glob("*.safetensors"):
        head = path.read_bytes()[:8]
        assert (8 + int.from_bytes(head, "little")) % 4096 == 0
        with safe_open(path, framework="pt") as f:
            names = set(f.keys())
            for name in names:
                f.get_tensor(name)
    with safe_open(pack_dir / "model.safetensors", framework="pt") as f:
        for spec in SPECS:
            for part, tensor in pack.read(spec.name).items():
                assert torch.equal(f.get_tensor(stored_name(spec.name, part)), tensor)
    with safe_open(pack_dir / "experts-001.safetensors", framework="pt") as f:
        for e in range(EXPERTS):
            for m, parts in expert(1, e, "nf4").items():
                for part, tensor in parts.items():
                    name = stored_name(expert_name(1, e, m), part)
                    assert torch.equal(f.get_tensor(name), tensor)
    pack.close()


@settings(deadline=None, max_examples=25)
@given(
    inner=st.integers(1, 5),
    hidden=st.integers(1, 5),
    count=st.integers(1, 12),
    fmt=st.sampled_from(["nf4", "int8", "bf16"]),
)
def test_every_expert_layout_is_regular_and_without_holes(
    inner: int, hidden: int, count: int, fmt: str
) -> None:
    odd = 0 if fmt == "nf4" else 3
    i, h = 64 * inner + odd, 64 * hidden + odd
    shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    header, size, layout = plan_experts("x", 7, count, fmt, shapes)
    assert len(header) % 4096 == 0 and size == len(header) + count * layout.stride
    entries = json.loads(header[8:])
    del entries["__metadata__"]
    end = 0
    for e in entries.values():
        assert e["data_offsets"][0] == end
        end = e["data_offsets"][1]
    assert end == count * layout.stride
    for e in range(count):
        for key, (_, shape, offset) in layout.parts.items():
            m, part = key.split(".")
            stored = entries[stored_name(expert_name(7, e, m), part)]
            assert stored["data_offsets"][0] == e * layout.stride + offset
            assert stored["shape"] == list(shape) and offset % 64 == 0


# ---- damage -------------------------------------------------------------------------------------


def test_verify_counts_every_byte(pack_dir: Path) -> None:
    seen: list[Progress] = []
    pack = Pack.open(pack_dir)
    pack.verify(seen.append)
    done = [p.done for p in seen]
    assert done == sorted(done) and done[-1] == seen[-1].total == pack.nbytes
    pack.close()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_flipped_byte_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        write_pack(folder)
    files = sorted(p for p in folder.iterdir())
    path = data.draw(st.sampled_from(files))
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    flipped = bytearray(raw)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        with pytest.raises(PackError) as e:
            pack = Pack.open(folder)
            pack.verify()
        assert path.name in str(e.value) and e.value.hint
    finally:
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("experts-002.safetensors", "expert 3 of layer 2"),
        ("model.safetensors", "lm_head.weight"),
        ("model.safetensors", "router.weight"),
    ],
)
def test_damage_names_its_tensor_or_expert(pack_dir: Path, file: str, what: str) -> None:
    pack = Pack.open(pack_dir)
    if "expert" in what:
        layout = pack.expert_layout(2)
        at = layout.offset0 + 3 * layout.stride + layout.stride // 2
    else:
        last = list(pack.tensors[what].parts.values())[-1]
        at = last[2] + 1
    raw = bytearray((pack_dir / file).read_bytes())
    raw[at] ^= 0x10
    (pack_dir / file).write_bytes(raw)
    with pytest.raises(PackError, match=f"{file} is damaged: checksum of {what}"):
        pack.verify()
    pack.close()


def resign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit pack.json as an attacker would: with a checksum that fits."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


NORM = ("tensors", "model.norm.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", value=2), "pack format 2"),
        (put("format_version", value="1"), "format_version is '1'"),
        (put("format_version", value=True), "format_version is True"),
        (put("files", "../evil", value={"bytes": 1, "sha256": ""}), "leaves the folder"),
        (put("files", "/etc/passwd", value={"bytes": 1, "sha256": ""}), "leaves the folder"),
        (put("files", "..", value={"bytes": 1, "sha256": ""}), "leaves the folder"),
        (put("files", "ghost", value={"bytes": 1, "sha256": ""}), "ghost of the pack"),
        (put("files", "config.json", value={"bytes": "9"}), "no size"),
        (put("files", value=[]), "damaged"),
        (put(*NORM, "file", value="../model.safetensors"), "is not listed"),
        (put(*NORM, "format", value="nf9"), "unknown weight format 'nf9'"),
        (put(*NORM, "shape", value=[-1]), "is not a count"),
        (put(*NORM, "parts", "weight", "offset", value=4096), "disagree about model.norm"),
        (put(*NORM, "parts", "weight", "dtype", value="F16"), "disagree about model.norm"),
        (put(*NORM, "parts", "weight", "shape", value=[64]), "disagree about model.norm"),
        (put("tensors", "ghost", value={}), "damaged"),
        (put("experts", "1", "stride", value=100), "impossible expert layout"),
        (put("experts", "1", "stride", value=1 << 20), "disagree about"),
        (put("experts", "1", "count", value=6), "impossible expert layout"),
        (put("experts", "1", "offset", value=1 << 40), "disagree about"),
        (put("experts", "1", "parts", value={}), "impossible expert layout"),
        (put("experts", "x", value={}), "damaged"),
    ],
)
def test_a_manifest_that_lies_is_not_believed(
    pack_dir: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    resign(pack_dir, change)
    with pytest.raises(PackError) as e:
        Pack.open(pack_dir)
    assert message in str(e.value) and e.value.hint


def test_missing_and_short_files_are_named(pack_dir: Path) -> None:
    path = pack_dir / "experts-002.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(PackError, match=rf"{path.name} .* is {len(raw) - 1} bytes long"):
        Pack.open(pack_dir)
    path.unlink()
    with pytest.raises(PackError, match=f"{path.name} .* is missing"):
        Pack.open(pack_dir)


def test_folders_that_are_no_pack(tmp_path: Path, pack_dir: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PackError, match=r"pack\.json is missing") as e:
            Pack.open(folder)
        assert "mimo quantize" in e.value.hint
    (pack_dir / MANIFEST).unlink()
    (pack_dir / "convert.journal").write_text("")
    with pytest.raises(PackError, match="is unfinished") as e:
        Pack.open(pack_dir)
    assert "again" in e.value.hint


def test_what_the_pack_does_not_have(pack_dir: Path) -> None:
    with Pack.open(pack_dir) as pack:
        with pytest.raises(PackError, match="ghost is not in the pack"):
            pack.read("ghost")
        with pytest.raises(PackError, match=r"layer 0 .* has no experts"):
            pack.read_expert(0, 0)
        for e in (-1, EXPERTS):
            with pytest.raises(PackError, match=rf"experts 0\.\.4, not {e}"):
                pack.read_expert(1, e)


# ---- writing ------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_of_ours_and_leaves_no_torso(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.write, 5000

    def write(fd: int, data: Any) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = real(fd, data[:left])
        left -= n
        return n

    writer = PackWriter(tmp_path / "pack")
    monkeypatch.setattr("quant.writer.os.write", write)
    with pytest.raises(DiskSpaceError, match=r"model\.safetensors needs \d+ bytes") as e:
        writer.tensors("model.safetensors", SPECS, lambda s: iter([packed(s)]))
    assert "again" in e.value.hint
    assert not list((tmp_path / "pack").iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match="cannot write"):
        PackWriter(tmp_path / "file" / "pack")


def test_too_few_bytes_never_get_the_files_name(tmp_path: Path) -> None:
    def nothing(spec: TensorSpec) -> Iterator[Parts]:
        return iter(())

    def first_row(spec: TensorSpec) -> Iterator[Parts]:
        yield {part: t[:1] for part, t in packed(spec).items()}

    writer = PackWriter(tmp_path)
    for produce in (nothing, first_row):
        for specs in (SPECS[:2], SPECS[1:2], SPECS[4:]):
            with pytest.raises(ValueError, match=r"bytes were given|expected"):
                writer.tensors("model.safetensors", specs, produce)
    assert not (tmp_path / "model.safetensors").exists()
