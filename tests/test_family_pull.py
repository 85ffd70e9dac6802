"""Pulls of members whose files hold some experts of every layer: layers are filled in as they come.

The same pack as of the whole checkpoint, with one file of that on the disk at a time, even killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family
import pytest
import test_pull_killed
from hub_server import HubServer
from test_pull import BLOCK, OPTIONS, hashes, hub  # noqa: F401  (fixture)

from mimo_local.errors import CancelledError, PackError
from mimo_local.events import Progress
from mimo_local.pull.order import Step, arrange
from mimo_local.pull.run import Pull
from quant.checkpoint import Checkpoint
from quant.convert import checked_jobs, convert
from quant.jobs import split
from quant.making import planned_experts
from quant.pack import JOURNAL
from quant.recipe import Recipe
from quant.writer import PackWriter

MEMBERS = ("MiMo-V2.5", "MiMo-V2.6-Flash")


@pytest.fixture(scope="module", params=MEMBERS)
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hub") / request.param
    family.write(folder, request.param)
    yield folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hashes(convert(source, tmp_path_factory.mktemp("packs") / "pack").path)


def test_layers_are_filled_in_file_by_file(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mimo_local.pull.order.HELD", 1)
    found = Pull.prepare(OPTIONS, tmp_path / "pack")
    largest = max(file.size for file in found.remote.shards)
    peak, seen = 0, list[Progress]()

    def look(progress: Progress) -> None:
        nonlocal peak
        seen.append(progress)
        peak = max(peak, sum(p.stat().st_size for p in found.staging.folder.glob("*.safetensors")))

    total = found.pack_left
    pack = found.run(look, block=BLOCK)
    found.close()
    assert hashes(pack.path) == wanted
    assert sum(p.stat().st_size for p in pack.path.glob("*.safetensors")) == total
    assert 0 < peak <= found.order.peak <= max(largest, _pair(found)) < 0.8 * found.remote.nbytes
    done = [p.done for p in seen]
    assert done == sorted(done) and done[-1] == seen[-1].total


def _pair(found: Pull) -> int:
    """The largest files of one rank: V2.5 has two of them, and experts across both."""
    ranks: dict[str, int] = {}
    for file in found.remote.shards:
        rank = file.name.rpartition("_")[0]
        ranks[rank] = ranks.get(rank, 0) + file.size
    return max(ranks.values())


def test_stopped_and_begun_again_it_goes_on_inside_a_layer(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill, room = PackWriter.fill, 0

    def stopping(self: PackWriter, *args: Any) -> dict[str, int]:
        nonlocal room
        room -= 1
        if room < 0:
            raise KeyboardInterrupt
        return fill(self, *args)

    monkeypatch.setattr(PackWriter, "fill", stopping)
    left = []
    for _ in range(10):
        room = 3
        found = Pull.prepare(OPTIONS, tmp_path / "pack")
        left.append(found.pack_left)
        try:
            pack = found.run(block=BLOCK)
            break
        except KeyboardInterrupt:
            found.close()
    found.close()
    assert len(left) == 3 and left[0] > left[1] > left[2]  # 8 parts, 3 a run
    assert hashes(pack.path) == wanted


@pytest.mark.parametrize("source", ["MiMo-V2.6-Flash"], indirect=True)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(
    hub: HubServer,  # noqa: F811
    wanted: dict[str, str],
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, test_pull_killed.__file__, tmp_path, "4", "3"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] + found["full"] == 4
    assert all(pack == wanted for pack in found["packs"])


class Cut:
    """A supply of a whole checkpoint that ends after some jobs, as a crash would."""

    identity = "x@1"

    def __init__(self, after: int) -> None:
        self.after = after

    def order(self, jobs: list[Any], done: Any) -> list[Any]:
        return jobs

    def need(self, job: Any) -> None:
        self.after -= 1
        if self.after < 0:
            raise CancelledError("cut", hint="")

    def done(self, job: Any) -> None:
        pass


def test_an_expert_that_was_lost_on_the_disk_is_found_before_the_layer_is_used(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(CancelledError):
        convert(source, tmp_path / "pack", supply=Cut(after=4))
    part = next((tmp_path / "pack").glob("experts-*.part"))
    job = next(j for j in checked_jobs(Checkpoint.open(source), Recipe()) if j.file == part.stem)
    raw = bytearray(part.read_bytes())
    raw[planned_experts(job)[2].offset0 + 10] ^= 1
    part.write_bytes(raw)
    with pytest.raises(PackError, match=r"expert 0 in .*part is not what was written"):
        convert(source, tmp_path / "pack", supply=Cut(after=99))


def test_a_part_of_another_size_is_made_anew(
    source: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    with pytest.raises(CancelledError):
        convert(source, tmp_path / "pack", supply=Cut(after=5))
    records = (tmp_path / "pack" / JOURNAL).read_text().splitlines()
    assert any('"piece"' in record for record in records)
    for part in (tmp_path / "pack").glob("experts-*.part"):
        part.write_bytes(b"short")
    assert hashes(convert(source, tmp_path / "pack", supply=Cut(after=99)).path) == wanted


def test_nothing_is_split_that_one_set_of_files_makes(tmp_path: Path) -> None:
    family.write(tmp_path / "m", "MiMo-V2-Flash", mtp_layers=0)
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert all(split(checkpoint, job) == [job] for job in checked_jobs(checkpoint, Recipe()))


def test_parts_add_up_to_their_file(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    for job in checked_jobs(checkpoint, Recipe()):
        parts = split(checkpoint, job)
        assert sum(part.nbytes() for part in parts) == job.nbytes()
        assert sorted(name for part in parts for name in part.names()) == sorted(job.names())
        if job.shapes is not None:
            assert len(parts) == family.RANKS


def test_the_real_tables_fit() -> None:
    """V2.6-Flash: 64 files with four experts of each of 47 layers, the first also all else."""
    gb = 10**9
    sizes = {f"ep{i}": int(2.51 * gb) for i in range(64)} | {"mtp": int(1.19 * gb)}
    sizes["ep0"] += 10 * gb
    steps = [Step("model", frozenset({"ep0"}), 1), Step("mtp", frozenset({"mtp"}), 1)]
    for layer in range(48):
        steps.append(Step(f"layer-{layer}", frozenset({"ep0"}), 1))
        if layer:
            steps += [Step(f"e{layer}#{i}", frozenset({f"ep{i}"}), 1) for i in range(64)]
    order = arrange(steps, sizes)
    assert order.peak == sizes["ep0"] and len(order.steps) == len(steps)
