"""Killed at any moment, a pull goes on in the next run and ends with the very same pack.

The killing is done by a process of its own, this file as a script: it imports torch once, forks for
every moment, and no thread of the tests is in its way. `bench/pull_faults.py` does the same at more
moments, and with disks that fill up.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_pull import BLOCK, OPTIONS, hashes, hub, source, wanted  # noqa: F401  (fixtures)

MOMENTS = 6
FAULTS = {-signal.SIGKILL: "killed", 7: "full", 9: "network"}
"""Exit status -> what ended the pull."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(hub: Any, wanted: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    done = subprocess.run(
        [sys.executable, __file__, tmp_path, str(MOMENTS), "7"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] + found["full"] == MOMENTS and found["killed"]
    assert all(pack == wanted for pack in found["packs"])


# ---- the process that forks and kills ------------------------------------------------------------


def main() -> None:
    """Pull, then `moments` times: begin or go on, be killed; says what came of it."""
    import torch

    import quant.convert  # noqa: F401  (everything that takes time to import)

    torch.set_num_threads(1)
    folder, moments, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(killed(folder, moments, random.Random(seed))))


def killed(folder: Path, moments: int, chance: random.Random) -> dict[str, Any]:
    """Faults until there were enough; a pull that got through is compared and begun anew."""
    begin = time.monotonic()
    while (status := wait_for(start(folder, None))) == 9:
        pass
    assert status == 0
    took = time.monotonic() - begin
    packs, phases = [finish(folder)], []
    counts = dict.fromkeys(("through", *FAULTS.values()), 0)
    while sum(counts.values()) - counts["through"] < moments:
        full = chance.random() < 0.3
        child = start(folder, chance.randrange(1, 4_000_000) if full else None)
        if not full:
            time.sleep(chance.uniform(0, took))
            os.kill(child, signal.SIGKILL)
        status = wait_for(child)
        if status == 0:
            counts["through"] += 1
            packs.append(finish(folder))
            continue
        assert status in FAULTS, f"the pull failed with {status}"
        counts[FAULTS[status]] += 1
        phases.append(phase(folder))
    while (status := wait_for(start(folder, None))) == 9:
        pass  # the network may still have its moods
    assert status == 0
    packs.append(finish(folder))
    return counts | {"packs": packs, "phases": phases, "seconds_alone": round(took, 2)}


def start(folder: Path, room: int | None) -> int:
    """A process that pulls; `room`: bytes after which the disk is full."""
    if child := os.fork():
        return child
    from mimo_local.errors import DiskSpaceError, DownloadError
    from mimo_local.pull.run import Pull, already_there

    status = 8
    try:
        if room is not None:
            fill_up(room)
        if already_there(folder / "pack", OPTIONS.recipe) is None:
            Pull.prepare(OPTIONS, folder / "pack").run(block=BLOCK)
        status = 0
    except DiskSpaceError:
        status = 7
    except DownloadError:
        status = 9
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def fill_up(room: int) -> None:
    """Let every write below fail once so many bytes have been written."""
    left, real = [room], {"write": os.write, "pwrite": os.pwrite}

    def limited(name: str) -> Any:
        def write(fd: int, data: Any, *rest: Any) -> int:
            if left[0] < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= len(data)
            return int(real[name](fd, data, *rest))

        return write

    for name in real:
        setattr(os, name, limited(name))


def wait_for(child: int) -> int:
    """Its status; a signal's number below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def phase(folder: Path) -> str:
    """What was being done, by what is left."""
    names = {path.name for path in leaves(folder)}
    if any(name.startswith(("experts-", "layer-", "model.", "mtp.")) and name.endswith(".part")
           and (folder / "pack" / name).exists() for name in names):  # fmt: skip
        return "convert"
    if any(name.endswith(".part") for name in names):
        return "network"
    return "between" if "pull.json" in names else "before"


def leaves(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file())


def finish(folder: Path) -> dict[str, str]:
    """The checksums of a finished pack, which is then removed; nothing else may be left."""
    assert [path.name for path in folder.iterdir()] == ["pack"], sorted(leaves(folder))
    found = hashes(folder / "pack")
    shutil.rmtree(folder / "pack")
    return found


if __name__ == "__main__":
    main()
