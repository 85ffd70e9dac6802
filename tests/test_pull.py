"""`mimo pull` against a hub of our own: the same pack as `mimo quantize`, whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoints import write_fp8
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
from mimo_local.pull.run import Options, Pull, already_there
from mimo_local.pull.staging import Staging
from quant.convert import convert
from quant.pack import Pack
from quant.recipe import Recipe

torch.set_num_threads(1)
CONFIG: dict[str, Any] = tiny.config(
    "fsf", "dmm", hidden=256, kv_heads=2, head_dim=192, v_head_dim=128, intermediate=384,
    experts=4, moe_intermediate=128, vocab=320, window=129, num_nextn_predict_layers=1,
)  # fmt: skip
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
    write_fp8(folder, CONFIG, shards=2)
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
    for name in ("fsync", "fdatasync"):  # a power cut is not what is tested here
        monkeypatch.setattr(os, name, lambda _: None)
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
    write_fp8(hub.folder, CONFIG, shards=shards, mtp_in_index=shards > 1)
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


def test_wrong_bytes_twice_are_an_error_that_names_the_file(hub: HubServer, tmp_path: Path) -> None:
    hub.fault = shard_fault(Fault(flip=True), times=10**6, name="model_1_linear_fc2")
    with pytest.raises(DownloadError, match=r"model_1_linear_fc2\.safetensors has the wrong") as e:
        pull(tmp_path)
    assert "HF_ENDPOINT" in e.value.hint
    assert not (tmp_path / "pack.source" / "model_1_linear_fc2.safetensors").exists()


def test_a_server_that_stays_away_is_given_up_and_what_came_is_kept(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str]
) -> None:
    made, held = tmp_path / "pack" / "layer-001.safetensors", threading.Event()
    gone = shard_fault(Fault(status=503, wait=held), times=10**6, name="model_2_linear_fc1")
    hub.fault = gone

    def look(_: Progress) -> None:
        if made.exists():  # else this file would be given up before the others are here
            held.set()

    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    with pytest.raises(DownloadError, match=r"model_2_linear_fc1.*503") as e:
        found.run(look, block=BLOCK)
    found.close()
    assert "run the command again" in e.value.hint
    hub.fault = lambda _: None
    hub.asked.clear()
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted
    assert "model_embedding.safetensors" not in hub.files("cdn"), "it was finished before"


def test_a_file_goes_on_inside_where_it_stopped(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], source: Path
) -> None:
    name = "model_1_linear_fc1.safetensors"
    size = (source / name).stat().st_size
    assert size > 4 * BLOCK
    options = replace(OPTIONS, connections=1)
    hub.fault = shard_fault(Fault(status=500), times=10**6, name=name, start=3 * BLOCK)
    with pytest.raises(DownloadError):
        pull(tmp_path, options)
    assert (tmp_path / "pack.source" / ".pull" / f"{name}.part").exists()
    hub.fault = lambda _: None
    hub.asked.clear()
    pull(tmp_path, options)
    assert hashes(tmp_path / "pack") == wanted
    starts = [asked.start for asked in hub.asked if asked.file == name and asked.stored]
    assert min(starts) == 3 * BLOCK


def test_a_damaged_part_of_an_earlier_run_is_found_out(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str]
) -> None:
    name = "model_1_linear_fc1.safetensors"
    hub.fault = shard_fault(Fault(status=500), times=10**6, name=name, start=3 * BLOCK)
    with pytest.raises(DownloadError):
        pull(tmp_path, replace(OPTIONS, connections=1))
    part = tmp_path / "pack.source" / ".pull" / f"{name}.part"
    data = bytearray(part.read_bytes())
    data[10_000] ^= 1
    part.write_bytes(data)
    hub.fault = lambda _: None
    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    found.notes.clear()
    found.run(block=BLOCK)
    assert found.notes == [f"{name} came with wrong bytes: fetching it once more"]
    assert hashes(tmp_path / "pack") == wanted


def unfinished(hub: HubServer, tmp_path: Path) -> None:
    hub.fault = shard_fault(Fault(status=503), times=10**6, name="model_2_linear_fc1")
    with pytest.raises(DownloadError):
        pull(tmp_path)
    hub.fault = lambda _: None


def test_a_branch_that_moves_between_runs_does_not_mix_commits(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str]
) -> None:
    unfinished(hub, tmp_path)
    hub.moved = "b" * 40
    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    assert "main has moved to bbbbbbbbbbbb" in found.notes[1]
    found.run(block=BLOCK)
    assert hashes(tmp_path / "pack") == wanted


@pytest.mark.parametrize(
    "change", [{"revision": "v1"}, {"repo": "somebody/else"}], ids=["revision", "repository"]
)
def test_another_source_is_refused_while_a_pull_is_unfinished(
    change: dict[str, str], hub: HubServer, tmp_path: Path
) -> None:
    unfinished(hub, tmp_path)
    with pytest.raises(UsageError, match="unfinished pull of Xiaomi") as e:
        pull(tmp_path, replace(OPTIONS, **change))
    assert "--restart" in e.value.hint


def test_a_file_that_changed_under_its_commit_is_refused_and_restart_begins_anew(
    hub: HubServer, tmp_path: Path, source: Path
) -> None:
    unfinished(hub, tmp_path)
    hub.folder = tmp_path / "other"
    write_fp8(hub.folder, CONFIG, shards=2, seed=1)
    real_names(hub.folder)
    hub._hashes.clear()
    with pytest.raises(DownloadError, match="is not the file it was") as e:
        pull(tmp_path)
    assert "--restart" in e.value.hint
    alone = hashes(convert(hub.folder, tmp_path / "alone").path)
    pull(tmp_path, replace(OPTIONS, restart=True))
    assert hashes(tmp_path / "pack") == alone


def test_a_changed_size_is_noticed_without_the_hubs_own_headers(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.fault = shard_fault(
        Fault(status=206, headers={"Content-Range": "bytes 0-9/77"}, body=b"0123456789")
    )
    with pytest.raises(DownloadError, match="is not the file it was"):
        pull(tmp_path)


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token, hub.gated = "hf_secret", True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(tmp_path)
    for asked in hub.asked:
        there = asked.headers.get("Authorization")
        assert there == (None if asked.stored else "Bearer hf_secret"), asked.path
    assert any(asked.stored for asked in hub.asked)


@pytest.mark.parametrize(
    ("gated", "private", "token", "text", "hint"),
    [
        (True, False, "", "is gated", "accept them at"),
        (True, False, "hf_old", "cannot be read: the token was refused", "hf auth login"),
        (False, True, "", "no public repository", "HF_TOKEN"),
        (False, True, "hf_old", "cannot be read: the token was refused", "hf auth login"),
    ],
)
def test_a_repository_that_lets_nobody_in(
    gated: bool, private: bool, token: str, text: str, hint: str,
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.gated, hub.private, hub.token = gated, private, "hf_right"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError, match=text) as e:
        pull(tmp_path)
    assert hint in e.value.hint
    assert not list(tmp_path.iterdir()), "nothing is left of a pull that never began"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (replace(OPTIONS, repo="nobody/nothing"), "no public repository nobody/nothing"),
        (replace(OPTIONS, revision="v9"), "has no revision `v9`"),
        (replace(OPTIONS, repo="just-a-name"), "is not a repository"),
        (replace(OPTIONS, repo="../../etc"), "is not a repository"),
        (replace(OPTIONS, offline=True), "nothing of .* is here"),
    ],
)
def test_what_is_not_there_is_said(
    options: Options, text: str, hub: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(MimoError, match=text):
        pull(tmp_path, options)


@pytest.mark.parametrize(
    "fault",
    [Fault(status=200, body=b"<html>log in</html>"), Fault(status=200, body=b"[]"),
     Fault(status=418)],
    ids=["page", "list", "teapot"],
)  # fmt: skip
def test_a_login_page_is_not_a_hub(fault: Fault, hub: HubServer, tmp_path: Path) -> None:
    hub.fault = lambda asked: fault if asked.path.startswith("/api/") else None
    with pytest.raises(DownloadError, match="does not answer as a hub does"):
        pull(tmp_path)


def test_the_hub_itself_may_be_busy(hub: HubServer, tmp_path: Path, wanted: dict[str, str]) -> None:
    left = [3]

    def busy(asked: Asked) -> Fault | None:
        if (left[0] and "/api/" in asked.path) or ("/resolve/" in asked.path and left[0] > 1):
            left[0] -= 1
            return Fault(status=429, headers={"RateLimit": '"api";r=0;t=0'})
        return None

    hub.fault = busy
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted


def test_redirects_in_circles_end(hub: HubServer, tmp_path: Path) -> None:
    again = Fault(status=302, headers={"Location": "/again"})
    hub.fault = lambda asked: None if asked.path.startswith("/api/") else again
    with pytest.raises(DownloadError, match="in circles"):
        pull(tmp_path)


def test_a_proxy_carries_everything(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted
    assert {asked.host for asked in hub.asked} == {"hub.invalid", f"localhost:{hub.port}"}


def test_offline_uses_what_is_here_or_says_what_is_missing(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], source: Path
) -> None:
    unfinished(hub, tmp_path)
    hub.asked.clear()
    with pytest.raises(DownloadError, match="files are not all here") as e:
        pull(tmp_path, replace(OPTIONS, offline=True))
    assert "--offline" in e.value.hint and not hub.asked
    for path in source.iterdir():  # put there by hand
        shutil.copy(path, tmp_path / "pack.source")
    pull(tmp_path, replace(OPTIONS, offline=True))
    assert hashes(tmp_path / "pack") == wanted and not hub.asked


def test_a_wrong_file_put_there_by_hand_is_not_believed(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], source: Path
) -> None:
    unfinished(hub, tmp_path)
    name = "model_2_linear_fc2.safetensors"
    data = bytearray((source / name).read_bytes())
    data[-5] ^= 1
    (tmp_path / "pack.source" / name).write_bytes(data)
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted


@pytest.mark.parametrize("where", [".part", "experts-001"])
def test_a_full_disk_is_an_error_and_the_next_run_goes_on(
    where: str, hub: HubServer, tmp_path: Path, wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import errno

    left = [100_000]
    real = {"pwrite": os.pwrite, "write": os.write}

    def full(name: str) -> Any:
        def write(fd: int, data: Any, *rest: Any) -> int:
            path = str(Path(f"/proc/self/fd/{fd}").readlink())
            if where in path and path.endswith(".part"):
                if left[0] <= 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                left[0] -= len(data)
            return int(real[name](fd, data, *rest))

        return write

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, full(name))
        with pytest.raises(DiskSpaceError, match="the disk is full") as e:
            pull(tmp_path)
    assert "run the same command again" in e.value.hint
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted


def test_too_little_room_is_said_before_the_first_byte(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    need, _ = found.space
    assert found.pack_bytes < need < found.pack_bytes + found.remote.nbytes + (17 << 20)
    hub.asked.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, need - 1))
    with pytest.raises(DiskSpaceError, match="the pull needs") as e:
        found.run()
    assert "--to" in e.value.hint and not hub.asked
    found.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_one_may_not_write_to(hub: HubServer, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PackError, match="cannot write"):
        pull(tmp_path)


def test_a_folder_that_cannot_be_made(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "pack.source").write_text("a file is in the way")
    with pytest.raises(PackError, match="cannot write"):
        pull(tmp_path)


def test_two_pulls_into_one_folder_are_one_too_many(hub: HubServer, tmp_path: Path) -> None:
    first = Pull.prepare(OPTIONS, tmp_path / "pack")
    with pytest.raises(UsageError, match=r"another pull into .* is running"):
        pull(tmp_path)
    first.close()


def test_somebodys_folder_is_not_written_to(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        pull(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_a_kill_in_the_very_last_moment_leaves_nothing_for_long(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "clear", lambda *_, **__: None)
        pull(tmp_path)
    (tmp_path / "pack" / "convert.journal").write_text("{}\n")
    assert (tmp_path / "pack.source" / ".pull").is_dir()
    assert already_there(tmp_path / "pack", OPTIONS.recipe) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]
    assert hashes(tmp_path / "pack") == wanted
    pull_again = already_there(tmp_path / "pack", OPTIONS.recipe)
    assert pull_again is not None and pull_again.nbytes > 0


def test_a_kept_source_is_never_tidied_away(hub: HubServer, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "clear", lambda *_, **__: None)
        pull(tmp_path, replace(OPTIONS, keep=True))
    already_there(tmp_path / "pack", OPTIONS.recipe)
    kept = tmp_path / "pack.source"
    assert len(list(kept.glob("*.safetensors"))) == 10 and not (kept / ".pull").exists()


def test_a_header_damaged_on_its_way_is_found_out_before_it_does_harm(
    hub: HubServer, tmp_path: Path, wanted: dict[str, str], source: Path
) -> None:
    """It still is a valid header, of numbers of the same size: only their meaning is another."""
    name = "model_0.safetensors"
    data = (source / name).read_bytes()
    other = data.replace(b'"dtype":"BF16"', b'"dtype":"F16" ', 1)
    assert other != data and len(other) == len(data)
    told = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}

    def damaged(asked: Asked) -> Fault | None:
        planning = asked.file == name and asked.stored and not asked.start
        return (
            Fault(status=206, headers=told, body=other)
            if planning and asked.stop != BLOCK
            else None
        )

    hub.fault = damaged
    with pytest.raises(DownloadError, match=f"{name} for planning was damaged") as e:
        pull(tmp_path)
    assert "run the same command again" in e.value.hint
    hub.fault = lambda _: None
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted


def test_a_damaged_configuration_is_not_planned_with(hub: HubServer, tmp_path: Path) -> None:
    hub.fault = lambda asked: Fault(flip=True) if asked.file == "config.json" else None
    with pytest.raises(DownloadError, match=r"config\.json has the wrong checksum"):
        pull(tmp_path)
    assert not list(tmp_path.iterdir())


def test_waiting_for_a_server_is_told(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "TOLD_S", 0.0)
    hub.fault = shard_fault(Fault(status=503), times=2)
    seen: list[Progress] = []
    pull(tmp_path, seen=seen)
    told: list[str] = []
    hub.fault = lambda asked: Fault(status=500) if hub.asked.index(asked) == 0 else None
    hub.asked.clear()
    other = replace(OPTIONS, recipe=Recipe())
    Pull.prepare(other, tmp_path / "other", on_wait=told.append).close()
    assert told and "500; trying again in" in told[0]


def test_ctrl_c_keeps_what_was_made(hub: HubServer, tmp_path: Path, wanted: dict[str, str]) -> None:
    held = threading.Event()

    def stop(event: Progress) -> None:
        if (tmp_path / "pack" / "experts-001.safetensors").exists():
            held.set()
            raise KeyboardInterrupt

    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    hub.fault = shard_fault(Fault(status=503, wait=held), times=10**6, name="model_2_linear")
    with pytest.raises(KeyboardInterrupt):
        found.run(stop, block=BLOCK)
    found.close()
    assert (tmp_path / "pack" / "experts-001.safetensors").exists()
    hub.fault = lambda _: None
    hub.asked.clear()
    pull(tmp_path)
    assert hashes(tmp_path / "pack") == wanted
    assert not any("_1" in name for name in hub.files("cdn"))


def test_a_rate_limit_holds_for_all_connections_together() -> None:
    now = [0.0]
    limit = fetch.RateLimit(1000.0, clock=lambda: now[0])
    assert limit.pause(500) == 0.5
    assert limit.pause(500) == 1.0  # the second connection waits for both
    now[0] = 5.0
    assert limit.pause(1000) == 1.0  # an idle time is not made up for
    assert fetch.RateLimit(None).pause(10**9) == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "7"}, 7.0), ({"Retry-After": "soon"}, None), ({}, None),
     ({"RateLimit": '"api";r=0;t=55'}, 55.0),
     ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0)],
)  # fmt: skip
def test_what_a_server_says_about_coming_back(
    headers: dict[str, str], seconds: float | None
) -> None:
    from mimo_local.pull.hub import retry_after

    assert retry_after(headers) == seconds


def test_patience_waits_longer_each_time_obeys_the_server_and_ends() -> None:
    waits: list[float] = []
    calm = patience.Patience(waits.append)
    calm.again(patience.TransientError("busy", after=77.0), "x")
    assert waits == [77.0]
    for _ in range(patience.TRIES - 2):
        calm.again(patience.TransientError("gone"), "x")
    assert all(0.5 <= wait / min(60, 2**n) <= 1 for n, wait in enumerate(waits[1:], 1))
    with pytest.raises(DownloadError, match="x cannot be fetched: gone"):
        calm.again(patience.TransientError("gone"), "x")
    with pytest.raises(DownloadError, match="come back in 60 min"):
        patience.Patience(waits.append).again(patience.TransientError("busy", after=3600.0), "x")


def test_nothing_is_told_to_the_hub_but_the_request(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    Pull.prepare(OPTIONS, tmp_path / "pack").close()
    agents = {asked.headers["User-Agent"] for asked in hub.asked}
    assert not any("torch" in agent for agent in agents)
    assert {asked.path.split("/")[1] for asked in hub.asked} == {"api", "cdn", "XiaomiMiMo"}


@pytest.mark.parametrize(
    "address", ["ftp://x", "just text", "http://"], ids=["scheme", "text", "host"]
)
def test_an_endpoint_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        Hub()
