"""Killed at any moment, an answer leaves nothing behind: no file, no damage, the same ids again.

The killing is done by a process of its own, this file as a script: it imports torch once, forks for
every moment, and no thread of the tests is in its way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny

from quant.convert import convert
from quant.recipe import Recipe

MOMENTS = 4
CONFIG: dict[str, Any] = tiny.config(
    "fsfs", "dmmm", experts=16, top_k=4, hidden=64, moe_intermediate=64
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files")
@pytest.mark.parametrize("doing", ["decode", "sweep"])
def test_killed_at_any_moment(doing: str, tmp_path: Path) -> None:
    convert(tiny.write(tmp_path / "m", CONFIG), tmp_path / "pack", Recipe.for_format("nf4"))
    before = {path: path.read_bytes() for path in (tmp_path / "pack").iterdir()}
    spill = tmp_path / "spill"
    spill.mkdir()
    done = subprocess.run(
        [sys.executable, __file__, tmp_path / "pack", doing],
        env=os.environ | {"TMPDIR": str(spill), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == MOMENTS
    assert len(found["ids"][0]) > 10
    assert all(ids == found["ids"][0] for ids in found["ids"])
    assert found["spilling"] == (MOMENTS if doing == "sweep" else 0)
    assert not list(spill.iterdir())
    assert {path: path.read_bytes() for path in (tmp_path / "pack").iterdir()} == before


# ---- the process that forks and kills ------------------------------------------------------------


def main() -> None:
    """Answer, then MOMENTS times: begin, be killed, answer again; says what came of it."""
    import torch

    from mimo_local import loading  # noqa: F401  (everything that takes time to import)

    torch.set_num_threads(1)
    pack, doing, chance = Path(sys.argv[1]), sys.argv[2], random.Random(5)
    ids, killed, spilling = [answered(pack)], 0, 0
    for _ in range(MOMENTS):
        begun, told = os.pipe()
        pid = os.fork()
        if not pid:
            work(pack, doing, told)
        assert os.read(begun, 1)
        if doing == "sweep":
            spilling += any(spills(pid) or time.sleep(0.001) for _ in range(5000))
        time.sleep(chance.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        ids.append(answered(pack))
    print(json.dumps({"ids": ids, "killed": killed, "spilling": spilling}))


def spills(pid: int) -> bool:
    """Whether the process has a file open that no longer has a name."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            link = str(fd.readlink())
            if os.environ["TMPDIR"] in link and "deleted" in link:
                return True
    return False


def answered(pack: Path) -> list[int]:
    """The ids of an answer after a prompt that is long enough to sweep, from a fresh process."""
    begun, told = os.pipe()
    if not (pid := os.fork()):
        os.write(told, json.dumps(answer(opened(pack), 300, 24)).encode())
        os._exit(0)
    os.close(told)
    with open(begun, encoding="ascii") as file:
        ids: list[int] = json.loads(file.read())
    os.waitpid(pid, 0)
    return ids


def work(pack: Path, doing: str, told: int) -> None:
    """Decode, or read one long prompt after the other, until somebody ends it."""
    model = opened(pack)
    length, tokens = (4000, 1) if doing == "sweep" else (20, 500)
    answer(model, length, 1)
    os.write(told, b".")
    while True:
        answer(model, length, tokens)


def opened(pack: Path) -> Any:
    """A model with some of its experts on disk and no memory for hidden states."""
    from mimo_local.experts.tiered import TieredStore
    from mimo_local.model import Model
    from mimo_local.weights import PackWeights, open_weights

    weights = open_weights(pack)
    assert isinstance(weights, PackWeights)
    slot = weights.pack.expert_layout(1).stride
    return Model(weights, TieredStore(weights, 20 * slot, reserve=0), hidden_budget=1)


def answer(model: Any, length: int, tokens: int) -> list[int]:
    """The likeliest ids after a prompt of `length`."""
    from mimo_local.generate import generate
    from mimo_local.sampler import SamplingParams

    ids = tiny.prompt(CONFIG, length).tolist()
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    return list(generate(model, model.new_cache(), ids, params))


if __name__ == "__main__":
    main()
