"""Conversion: faithful, reproducible, resumable after any death, and careful with folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_bf16, write_fp8, write_fused, write_mxfp4
from safetensors.torch import load_file, save_file

from mimo_local.errors import (
    CancelledError,
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    PackError,
    UsageError,
)
from mimo_local.events import Progress
from quant.checkpoint import Checkpoint
from quant.convert import Recipe, convert, plan_bytes
from quant.formats import FORMATS, get_format
from quant.inventory import expert_name, expert_of, role_of
from quant.measure import relative_rms
from quant.meter import Meter
from quant.pack import Pack, expert_views

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("source") / "ckpt"
    weights = write_fp8(folder, tiny_config(), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("MIT")
    return folder, weights


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def stored(folder: Path) -> dict[str, str]:
    """Hashes of all but the report, which looks at some rows of every range."""
    return {name: value for name, value in hashes(folder).items() if name != "quality.json"}


def stored_weight(pack: Pack, name: str) -> tuple[str, torch.Tensor]:
    """(format, float32 values) of a tensor or expert matrix of a pack."""
    where = expert_of(name)
    if where:
        layer, expert, matrix = where
        layout = pack.expert_layout(layer)
        parts = expert_views(pack.read_expert(layer, expert), layout)[matrix]
        return layout.format, get_format(layout.format).unpack(parts)
    entry = pack.tensors[name]
    return entry.format, get_format(entry.format).unpack(pack.read(name))


BOUNDS = {"nf4": 0.1, "mxfp4": 0.12, "int8": 0.012, "bf16": 2**-8, "f32": 0.0}


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_arrives_in_its_format(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    folder, weights = source
    recipe = Recipe.for_format(name)
    ckpt = Checkpoint.open(folder)
    with convert(folder, tmp_path / "pack", recipe) as pack:
        for tensor, w in weights.items():
            fmt, values = stored_weight(pack, tensor)
            role = role_of(tensor, tuple(w.shape))
            if role == "exact":
                assert fmt == {"BF16": "bf16", "F32": "f32"}[ckpt.dtype(tensor)]
                assert torch.equal(values, w), tensor
            else:
                assert fmt == getattr(recipe, role), tensor
                assert relative_rms(w, values) <= BOUNDS[fmt], tensor
        assert pack.config == ckpt.config
        assert pack.manifest["recipe"] == recipe.to_json()
        assert pack.manifest["fallbacks"] == []
        assert pack.manifest["source"]["fingerprint"] == ckpt.fingerprint()
        assert pack.aux_path("tokenizer.json") and pack.aux_path("LICENSE")
        assert set(hashes(tmp_path / "pack")) == {
            *(f"layer-00{i}.safetensors" for i in range(3)),
            *(f"experts-00{i}.safetensors" for i in (1, 2)),
            *("model.safetensors", "mtp.safetensors", "pack.json", "config.json"),
            *("tokenizer.json", "LICENSE", "quality.json"),
        }
        written = sum(p.stat().st_size for p in (tmp_path / "pack").glob("*.safetensors"))
        assert plan_bytes(ckpt, recipe) == plan_bytes(ckpt.config, recipe) == written
        pack.verify()


def test_large_tensors_go_through_in_row_ranges(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stored(convert(source[0], tmp_path / "a").path)
    monkeypatch.setattr("quant.making.CHUNK", 5000)
    assert stored(convert(source[0], tmp_path / "b").path) == whole


def test_all_spellings_of_a_checkpoint_give_the_same_weights(tmp_path: Path) -> None:
    config = tiny_config()
    write_bf16(tmp_path / "hub", config, shards=2)
    write_fused(tmp_path / "fused", config)  # the same values, stored in float32
    a = convert(tmp_path / "hub", tmp_path / "a")
    b = convert(Checkpoint.open(tmp_path / "fused"), tmp_path / "b")
    assert hashes(a.path)["experts-001.safetensors"] == hashes(b.path)["experts-001.safetensors"]
    for name in a.tensors:
        assert torch.equal(stored_weight(a, name)[1], stored_weight(b, name)[1])


def test_mxfp4_experts_stay_what_they_are(tmp_path: Path) -> None:
    """Into a pack of the same format without loss; into another one as any weights."""
    weights = write_mxfp4(tmp_path / "src", tiny_config())
    with convert(tmp_path / "src", tmp_path / "pack", Recipe.for_format("mxfp4")) as pack:
        for name, w in weights.items():
            fmt, values = stored_weight(pack, name)
            assert (fmt == "mxfp4") == (role_of(name, tuple(w.shape)) == "experts")
            if fmt == "mxfp4":
                assert torch.equal(values, w), name
        assert pack.manifest["fallbacks"] == []
        pack.verify()
    with convert(tmp_path / "src", tmp_path / "nf4") as pack:
        for name, w in weights.items():
            fmt, values = stored_weight(pack, name)
            if fmt == "nf4":
                assert relative_rms(w, values) < 0.12, name  # codes are uniform, not normal


def test_mxfp4_passes_through_in_row_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    name = "model.layers.0.mlp.gate_proj.weight"
    weights = write_mxfp4(tmp_path / "src", config, dense=True)
    whole = stored(convert(tmp_path / "src", tmp_path / "a", Recipe(dense="mxfp4")).path)
    monkeypatch.setattr("quant.making.CHUNK", 5000)
    pack = convert(tmp_path / "src", tmp_path / "b", Recipe(dense="mxfp4"))
    assert stored(pack.path) == whole
    assert torch.equal(stored_weight(pack, name)[1], weights[name])


def test_tied_and_without_mtp(tmp_path: Path) -> None:
    write_bf16(tmp_path / "src", tiny_config(tie_word_embeddings=True))
    pack = convert(tmp_path / "src", tmp_path / "pack")
    assert "lm_head.weight" not in pack.tensors
    assert not (tmp_path / "pack/mtp.safetensors").exists()


def test_odd_widths_fall_back_and_the_manifest_says_so(tmp_path: Path) -> None:
    """moe_intermediate_size 96: down_proj has 96 columns, no multiple of 64."""
    config = tiny_config(moe_intermediate_size=96)
    weights = write_bf16(tmp_path / "src", config)
    with convert(tmp_path / "src", tmp_path / "pack") as pack:
        for layer in (1, 2):
            assert pack.expert_layout(layer).format == "int8"
        fallbacks = pack.manifest["fallbacks"]
        assert [f["tensor"] for f in fallbacks] == [
            "model.layers.1.mlp.experts",
            "model.layers.2.mlp.experts",
        ]
        assert fallbacks[0]["reason"] == "nf4 cannot hold 256 x 96"
        name = expert_name(1, 3, "down_proj")
        assert relative_rms(weights[name], stored_weight(pack, name)[1]) < BOUNDS["int8"]


# ---- dying and going on -------------------------------------------------------------------------

KILLER = """
import os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from quant.convert import convert

source, root, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
calls = 0

def arm(limit):
    '''Every call that changes the disk counts; the one after `limit` kills the process.'''
    def guard(real, torn):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls > limit:
                if torn:  # half of the bytes arrive
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    os.fsync = lambda fd: None  # SIGKILL loses no page cache, and the disk is slow
    for name in ("write", "fsync", "ftruncate", "replace", "unlink"):
        setattr(os, name, guard(getattr(os, name), name == "write"))

def run(target, limit):
    '''Convert in a child that may die; (exit status, calls made).'''
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        arm(limit)
        convert(source, target)
        n = str(calls).encode()
        arm(10**9)
        os.write(write, n)
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    calls_made = os.read(read, 20)
    os.close(read)
    return status, int(calls_made or 0)

status, total = run(root / "whole", 10**9)
assert status == 0, status
draw, killed = random.Random(0), 0
for i in range(rounds):
    for _ in range(draw.randint(1, 4)):
        if not (root / str(i) / "pack.json").exists():
            killed += os.WIFSIGNALED(run(root / str(i), draw.randrange(total))[0])
    assert run(root / str(i), 10**9)[0] == 0
print(killed, total)
"""


def test_killed_at_any_point_it_resumes_to_the_same_bytes(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    rounds = 6
    out = subprocess.run(
        [sys.executable, "-c", KILLER, str(source[0]), str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    killed, total = map(int, out.stdout.split())
    assert killed >= rounds and total > 50
    whole = hashes(tmp_path / "whole")
    assert "convert.journal" not in whole and "pack.json" in whole
    for i in range(rounds):
        assert hashes(tmp_path / str(i)) == whole, i


def cancel_after(n: int) -> Any:
    calls = iter(range(n))
    return lambda: next(calls, None) is None


def test_cancel_keeps_what_is_finished(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, target = source[0], tmp_path / "pack"
    with pytest.raises(CancelledError, match=r"[1-9] of 7 files are finished and kept"):
        convert(folder, target, cancel=cancel_after(40))
    with pytest.raises(PackError, match="unfinished"):
        Pack.open(target)
    kept = hashes(target)
    seen: list[Progress] = []
    convert(folder, target, on_progress=seen.append)
    assert kept.items() - hashes(target).items() == {
        ("convert.journal", kept["convert.journal"])
    } | {i for i in kept.items() if i[0].endswith(".part")}
    assert seen[0].done > 0 and seen[-1].done == seen[-1].total == Checkpoint.open(folder).nbytes


def test_a_damaged_journal_or_a_lost_file_is_made_again(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    whole = hashes(convert(source[0], tmp_path / "whole").path)
    for damage in ("torn", "garbage", "lost", "empty"):
        target = tmp_path / damage
        with pytest.raises(CancelledError):
            convert(source[0], target, cancel=cancel_after(40))
        journal = target / "convert.journal"
        if damage == "torn":
            journal.write_bytes(journal.read_bytes()[:-7])
        elif damage == "garbage":
            journal.write_bytes(journal.read_bytes() + b'\x00\x00\x00{"file"')
        elif damage == "empty":
            journal.write_bytes(b"")
        else:
            (target / "layer-000.safetensors").unlink()
        assert hashes(convert(source[0], target).path) == whole


def test_another_recipe_or_source_does_not_mix(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    target = tmp_path / "pack"
    write_bf16(tmp_path / "other", tiny_config())
    with pytest.raises(CancelledError):
        convert(source[0], target, cancel=cancel_after(40))
    with pytest.raises(UsageError, match="unfinished conversion with another recipe") as e:
        convert(source[0], target, Recipe.for_format("int8"))
    assert "another folder" in e.value.hint
    with pytest.raises(UsageError, match="unfinished conversion with another source"):
        convert(tmp_path / "other", target)
    finished = hashes(convert(source[0], target).path)
    with pytest.raises(UsageError, match="finished pack with another recipe"):
        convert(source[0], target, Recipe(search=False))
    with pytest.raises(UsageError, match="finished pack with another source"):
        convert(tmp_path / "other", target)
    again = convert(source[0], target)  # nothing to do
    assert hashes(again.path) == finished


def test_two_conversions_into_one_folder(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    target = tmp_path / "pack"
    tried: list[str] = []

    def second() -> bool:
        if not tried:
            with pytest.raises(UsageError, match="is running") as e:
                convert(source[0], target)
            tried.append(e.value.hint)
        return False

    convert(source[0], target, cancel=second)
    assert "wait" in tried[0]


# ---- room and folders ---------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_free_space_is_asked_for_before_the_first_byte(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.convert.shutil.disk_usage", lambda p: Usage(10**9, 0, 10**6))
    with pytest.raises(DiskSpaceError, match=r"needs 0\.00 GB more .* 0\.00 GB are free") as e:
        convert(source[0], tmp_path / "pack")
    assert "free 0.0" in e.value.hint
    assert not list((tmp_path / "pack").glob("*.safetensors*"))
    monkeypatch.undo()
    convert(source[0], tmp_path / "pack")


@pytest.mark.parametrize("room", [0, 100, 5000, 400_000, 900_000, 1_400_000])
def test_a_disk_that_fills_up_keeps_the_finished_files(
    source: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    """Wherever it happens, also in the journal: our error, and the next run goes on from there."""
    real, left = os.write, room

    def write(fd: int, data: Any) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = real(fd, data[:left])
        left -= n
        return n

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DiskSpaceError, match="the disk is full") as e:
        convert(source[0], tmp_path / "pack")
    assert "again" in e.value.hint
    monkeypatch.undo()
    kept = {p.name for p in (tmp_path / "pack").iterdir()}
    assert ("model.safetensors" in kept) == (room > 200_000)
    assert not any(n.endswith(".part") for n in kept)
    whole = hashes(convert(source[0], tmp_path / "whole").path)
    assert hashes(convert(source[0], tmp_path / "pack").path) == whole


def test_a_file_that_cannot_be_copied(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "tokenizer.json":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(PackError, match=r"cannot read .*tokenizer\.json"):
        convert(source[0], tmp_path / "pack")


def test_folders_a_pack_may_not_go_to(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_bf16(src, tiny_config())
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").write_text("mine")
    (tmp_path / "link").symlink_to(src)
    for target, message in (
        (src, "inside each other"),
        (src / "pack", "inside each other"),
        (tmp_path, "inside each other"),
        (tmp_path / "link/pack", "inside each other"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "is not empty"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match=message) as e:
            convert(src, target)
        assert e.value.hint and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full/model.safetensors").read_text() == "mine"
    with pytest.raises(PackError, match="cannot write"):
        convert(src, tmp_path / "file/pack")


def test_a_read_only_target(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(PackError, match="Read-only file system") as e:
        convert(source[0], tmp_path / "pack")
    assert "another" in e.value.hint or "choose" in e.value.hint


# ---- what is not a whole model ------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hybrid_layer_pattern": [0]}, "hybrid_layer_pattern has 1 entries"),
        ({"moe_layer_freq": None}, "moe_layer_freq is missing"),
    ],
)
def test_a_config_that_does_not_describe_the_model(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_bf16(tmp_path / "src", tiny_config())
    edit(tmp_path / "src", **changes)
    with pytest.raises(ConfigError, match=message) as e:
        convert(tmp_path / "src", tmp_path / "pack")
    assert e.value.hint and not (tmp_path / "pack").exists()


def test_missing_and_misshapen_tensors_are_found_before_the_first_byte(tmp_path: Path) -> None:
    src, name = tmp_path / "src", expert_name(2, 1, "up_proj")
    write_bf16(src, tiny_config())
    whole = load_file(src / "model.safetensors")
    for tensors, message in (
        ({n: t for n, t in whole.items() if n != name}, f"{name} is not in the checkpoint"),
        (whole | {name: torch.ones(2, 2)}, rf"{name} has shape \[2, 2\]"),
    ):
        save_file(tensors, src / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            convert(src, tmp_path / "pack")
        assert not (tmp_path / "pack").exists()


def test_nan_in_the_source_stops_the_conversion(tmp_path: Path) -> None:
    src, name = tmp_path / "src", expert_name(2, 1, "up_proj")
    write_bf16(src, tiny_config())
    tensors = load_file(src / "model.safetensors")
    tensors[name][5, 5] = float("nan")
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        convert(src, tmp_path / "pack")
    with pytest.raises(PackError, match="unfinished"):
        Pack.open(tmp_path / "pack")


def test_nan_in_fp8_is_named_by_tensor_and_file(tmp_path: Path) -> None:
    src, name = tmp_path / "src", expert_name(2, 1, "up_proj")
    write_fp8(src, tiny_config())
    files = [f for f in src.glob("*.safetensors") if name in load_file(f)]
    tensors = load_file(files[0])
    tensors[name].view(torch.uint8)[5, 5] = 0x7F
    save_file(tensors, files[0])
    with pytest.raises(CheckpointError, match=f"{files[0].name}: {name} holds NaN"):
        convert(src, tmp_path / "pack")


def test_recipes_name_formats_there_are() -> None:
    with pytest.raises(UsageError, match="'nf3' for head"):
        Recipe(head="nf3")
    with pytest.raises(UsageError, match="'q4'"):
        Recipe.for_format("q4")


# ---- progress and memory ------------------------------------------------------------------------


def test_progress_rises_and_ends_at_the_total(
    source: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    now = iter(range(10**6))
    monkeypatch.setattr(Meter.__init__, "__defaults__", (lambda: float(next(now)),))
    convert(source[0], tmp_path / "pack", on_progress=seen.append)
    done = [p.done for p in seen]
    assert len(seen) > 40 and done == sorted(done)
    assert seen[-1].done == seen[-1].total == Checkpoint.open(source[0]).nbytes
    assert {p.stage for p in seen} >= {"converting layer 2", "converting MTP layers"}
    assert all(p.eta_s is not None and p.eta_s >= 0 for p in seen)


def test_the_time_left_comes_from_the_last_half_minute() -> None:
    seen: list[Progress] = []
    now = 0.0
    meter = Meter(10_000, seen.append, lambda: now)
    meter.skip(4000)  # by an earlier run: says nothing about the speed of this one
    for second in range(1, 101):
        now = float(second)
        meter.add(10 if second <= 50 else 50, "x")
        if second == 10:
            assert seen[-1].eta_s == pytest.approx((10_000 - 4100) / 10)
    assert seen[-1].eta_s == pytest.approx((10_000 - 4000 - 500 - 2500) / 50)


MEMORY = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import quant.making
from quant.convert import Recipe, convert

def megabytes(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) / 1024

small, large, target = map(Path, sys.argv[1:4])
quant.making.CHUNK = int(sys.argv[4])
convert(small, target / "warm")  # libraries and the allocator's reserves are in memory now
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = megabytes("VmRSS")
convert(large, target / "pack", Recipe(embedding="nf4"))
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """A 100 000 x 256 embedding, 102 MB in float32, passes through in steps of 4 MiB."""
    write_bf16(tmp_path / "small", tiny_config())
    write_bf16(tmp_path / "large", tiny_config(vocab_size=100_000, tie_word_embeddings=True))
    folders = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path)]
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, *folders, str(1 << 20)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 60  # 26 here; 146 if the tensor went through whole
    shutil.rmtree(tmp_path / "large")


def test_the_real_models_size() -> None:
    """Experts at 4.25 bits: 302.8 G weights; the rest, 5.98 G, and MTP, 0.99 G, at 8 bits."""
    config = tiny_config(
        num_hidden_layers=48,
        hidden_size=4096,
        num_attention_heads=64,
        num_key_value_heads=4,
        swa_num_attention_heads=64,
        swa_num_key_value_heads=8,
        intermediate_size=16384,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        vocab_size=152576,
        hybrid_layer_pattern=[int(i != 0 and (i + 1) % 6 != 0) for i in range(48)],
        moe_layer_freq=[0] + [1] * 47,
    )
    del config["num_nextn_predict_layers"]
    size = plan_bytes(config, Recipe())
    assert size == pytest.approx(
        302_795_194_368 * 4.25 / 8 + 5_983_586_496 + 987_820_224, rel=0.002
    )
