"""`mimo pull` against a hub of our own: the same pack as `mimo quantize`, whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, write_fp8, write_folder
from hub_server import REPO, Asked, Fault, HubServer

from mimo_local.errors import (
    DiskSpaceError,
    DownloadError,
    MimoError,
    PackError,
    UsageError,
)
from mimo_local.events import Progress
from mimo_local.pull import fetch, patience
from mimo_local.pull.hub import Hub
from mimo_local.pull.run import Options, Pull
from quant.convert import convert
from quant.pack import Pack
from quant.recipe import Recipe

torch.set_num_threads(1)
OPTIONS = Options(REPO, Recipe(), connections=3)
BLOCK = 50_000


def real_names(folder: Path) -> None:
    """Spread a checkpoint's tensors over files named and filled as the real model's are."""
    from safetensors.torch import load_file, save_file

    found: dict[str, dict[str, torch.Tensor]] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found.setdefault(real_file(name), {})[name] = tensor
        path.unlink()
    weight_map = {}
    for file, tensors in found.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def real_file(name: str) -> str:
    """The file the real model's hub page keeps a tensor in."""
    import re

    if ".mtp." in name:
        return "model_mtp.safetensors"
    if found := re.match(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(\w+)_proj", name):
        return f"model_{found[1]}_linear_fc{2 if found[2] == 'down' else 1}.safetensors"
    if found := re.match(r"model\.layers\.(\d+)\.", name):
        return f"model_{found[1]}.safetensors"
    return f"model_{'embedding' if 'embed' in name else 'final'}.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repo"
    write_fp8(folder, tiny_config(), shards=2)
    real_names(folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("# not fetched")
    (folder / "pytorch_model.bin").write_bytes(b"not fetched")
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pack `mimo quantize` makes of the whole checkpoint."""
    return hashes(convert(source, tmp_path_factory.mktemp("packs") / "pack").path)


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(source)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(patience, "FIRST_S", 0.001)
    yield server
    server.close()


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def pull(
    tmp_path: Path, options: Options = OPTIONS, seen: list[Progress] | None = None, **more: Any
) -> Pack:
    found = Pull.prepare(options, tmp_path / "pack", **more)
    try:
        return found.run(None if seen is None else seen.append, block=BLOCK)
    finally:
        found.close()


def shard_fault(fault: Fault, times: int = 1, name: str = ".safetensors", start: int = 0) -> Any:
    """The fault for the first `times` requests for data of such a file (headers excepted)."""
    left = [times]

    def decide(asked: Asked) -> Fault | None:
        data = asked.stored and name in asked.file and asked.start >= start
        if data and asked.stop != 1 << 18 and left[0]:
            left[0] -= 1
            return fault
        return None

    return decide


def test_a_pull_gives_the_pack_that_quantizing_the_whole_checkpoint_gives(
    hub: HubServer, wanted: dict[str, str], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    with pull(tmp_path, seen=seen) as pack:
        pack.verify()
    assert hashes(tmp_path / "pack") == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]  # nothing of the source is left
    done = [event.done for event in seen]
    assert done == sorted(done) and done[-1] <= seen[-1].total
    assert len({event.total for event in seen}) == 1
    assert not {"README.md", "pytorch_model.bin"} & set(hub.files())


@pytest.mark.parametrize("shards", [1, 3])
def test_any_spread_of_tensors_over_files_gives_the_same_pack(
    shards: int, tmp_path: Path, hub: HubServer
) -> None:
    hub.folder = tmp_path / "repo"
    write_fp8(hub.folder, tiny_config(), shards=shards, mtp_in_index=shards > 1)
    alone = hashes(convert(hub.folder, tmp_path / "alone").path)
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == alone


def test_vision_tensors_are_skipped_but_count_for_the_fingerprint(
    hub: HubServer, tmp_path: Path, source: Path
) -> None:
    from safetensors.torch import save_file

    hub.folder = tmp_path / "repo"
    shutil.copytree(source, hub.folder)
    save_file({"visual.blocks.0.weight": torch.randn(300, 300)}, hub.folder / "visual.safetensors")
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.blocks.0.weight"] = "visual.safetensors"
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    alone = hashes(convert(hub.folder, tmp_path / "alone").path)
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == alone
    size = (hub.folder / "visual.safetensors").stat().st_size
    asked = sum((a.stop or size) - a.start for a in hub.asked if a.file == "visual.safetensors")
    assert asked < 2 * (1 << 18) + 17 * 4096


def test_little_of_the_source_is_on_the_disk_at_a_time(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimo_local.pull.order.HELD", 1)
    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    peak, whole = 0, found.remote.nbytes

    def look(_: Progress) -> None:
        nonlocal peak
        peak = max(peak, sum(p.stat().st_size for p in found.staging.folder.glob("*.safetensors")))

    found.run(look, block=BLOCK)
    assert hashes(tmp_path / "pack") == wanted
    assert 0 < peak <= found.order.peak < 0.6 * whole


def test_keeping_the_source_leaves_a_checkpoint(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], source: Path
) -> None:
    pull(tmp_path, replace(OPTIONS, keep=True))
    assert hashes(tmp_path / "pack") == wanted
    kept = hashes(tmp_path / "pack.source")
    here = hashes(source)
    assert kept == {name: here[name] for name in here.keys() - {"README.md", "pytorch_model.bin"}}
    assert hashes(convert(tmp_path / "pack.source", tmp_path / "again").path) == wanted


FAULTS = {
    "dropped connections": shard_fault(Fault(cut=20_000), times=6),
    "dropped at once": shard_fault(Fault(cut=0), times=5),
    "429 with a number": shard_fault(Fault(status=429, headers={"Retry-After": "0"}), times=4),
    "503": shard_fault(Fault(status=503), times=4),
    "expired address": shard_fault(Fault(status=403), times=4),
    "wrong bytes once": shard_fault(Fault(flip=True)),
    "wrong bytes in a middle range": shard_fault(Fault(flip=True), start=BLOCK),
    "ranges ignored": shard_fault(Fault(whole=True), times=10**6),
    "ranges ignored, dropped": lambda asked: (
        Fault(whole=True, cut=60_000 + 40_000 * len(ASKED)) if _again(asked) else None
    ),
}
ASKED: list[Asked] = []


def _again(asked: Asked) -> bool:
    """Storage requests for one shard: each comes further than the one before."""
    if asked.stored and asked.file == "model_1_linear_fc1.safetensors":
        ASKED.append(asked)
        return asked.stop != 1 << 18
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way_changes_nothing(
    name: str, hub: HubServer, tmp_path: Path, wanted: dict[str, str]
) -> None:
    hub.fault = FAULTS[name]
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]
