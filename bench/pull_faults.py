"""Fifty faults, one pack: pulls that are killed, run out of disk and meet a moody network.

    python bench/pull_faults.py [--moments 50] [--seed 1] [--calm]

A hub on 127.0.0.1 serves a small FP8 checkpoint; a process forks a pull, kills it at a random
moment or lets its disk fill up after a random number of bytes, and goes on with the next. Unless
--calm the hub drops connections, answers 503, ignores ranges and sends wrong bytes now and then.
Every pull that gets through must have made the pack that converting the whole checkpoint makes,
byte by byte, and left nothing else. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))

from hub_server import Asked, Fault, HubServer  # noqa: E402
from test_pull import CONFIG, hashes, real_names  # noqa: E402

from quant.convert import convert  # noqa: E402


class Moods:
    """What the network does to a request for data; wrong bytes once per file and minute at most."""

    def __init__(self, seed: int) -> None:
        self.chance, self.counts = random.Random(seed), Counter[str]()
        self._lock, self._flipped = threading.Lock(), dict[str, float]()

    def __call__(self, asked: Asked) -> Fault | None:
        if not asked.stored or asked.stop == 1 << 18:
            return None
        with self._lock:
            dice = self.chance.random()
            if dice < 0.10:
                self.counts["dropped"] += 1
                return Fault(cut=self.chance.randrange(60_000))
            if dice < 0.13:
                self.counts["503"] += 1
                return Fault(status=503, headers={"Retry-After": "0"})
            if dice < 0.15:
                self.counts["range ignored"] += 1
                return Fault(whole=True)
            if dice < 0.16 and time.monotonic() - self._flipped.get(asked.file, -60) > 60:
                self._flipped[asked.file] = time.monotonic()
                self.counts["wrong byte"] += 1
                return Fault(flip=True)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm", action="store_true", help="the network has no moods")
    options = parser.parse_args()
    from checkpoints import write_fp8

    with tempfile.TemporaryDirectory(prefix="pull-faults-") as place:
        source, work = Path(place) / "repo", Path(place) / "work"
        write_fp8(source, CONFIG, shards=2)
        real_names(source)
        (source / "tokenizer.json").write_text('{"a": 1}')
        wanted = hashes(convert(source, Path(place) / "pack").path)
        work.mkdir()
        hub, moods = HubServer(source), Moods(options.seed)
        if not options.calm:
            hub.fault = moods
        begin = time.monotonic()
        script = ROOT / "tests" / "test_pull_killed.py"
        done = subprocess.run(
            [sys.executable, script, work, str(options.moments), str(options.seed)],
            env=os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        hub.close()
    found = json.loads(done.stdout)
    packs = found.pop("packs")
    found["phases"] = dict(Counter(found["phases"]))
    found |= {"network_faults": dict(moods.counts), "packs": len(packs)}
    found["identical"] = sum(pack == wanted for pack in packs)
    found["seconds"] = round(time.monotonic() - begin, 1)
    print(json.dumps(found))
    sys.exit(found["identical"] != len(packs))


if __name__ == "__main__":
    main()
