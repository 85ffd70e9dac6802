"""Decode with less memory than the experts take: this project's tiers beside llama.cpp's mmap.

    python bench/beyond_ram.py --limit 2GiB,5GiB [--tokens 24] [--rounds 3] [--only mimo]

Both run the same layers of the real model (random weights, uniform routing: no expert is likelier
than another) under the same memory limit (a cgroup, so it needs root), in turn, on the same disk.
Beside them stands what the disk itself gives for whole experts read at random in the same minutes:
"of the disk" is the time the misses would take at that rate over the time the tokens took; what was
read on guesses that came true are misses, wrong guesses are not. Prints a
table, then one line of JSON. Files are made once, in --folder; llama.cpp is built once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import llamacpp_build
import random_pack
from cgroup import MemoryLimit
from engine_worker import Worker

from mimo_local.errors import MimoError
from mimo_local.experts.arena import Arena
from mimo_local.experts.disk import DiskTier, Read
from mimo_local.settings import PACK_MANIFEST, Paths, parse_size
from quant.pack import Pack

HERE = Path(__file__).resolve().parent
VOCAB = 1024


@dataclass
class Result:
    """One engine under one limit: a figure per round."""

    engine: str
    limit: int
    token_s: list[float] = field(default_factory=list)
    disk_gb_s: list[float] = field(default_factory=list)
    of_disk: list[float] = field(default_factory=list)
    miss_mb_token: list[float] = field(default_factory=list)
    hit_rate: list[float] = field(default_factory=list)
    read_mb_token: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    peak_rss: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.token_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", default="2GiB,5GiB")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--warm", type=int, default=24, help="tokens before the measured ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("mimo", "llama.cpp"))
    parser.add_argument("--prefetch", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--folder", type=Path, default=Paths.default().cache_dir / "bench")
    parser.add_argument("--venv", type=Path)
    args = parser.parse_args(argv)
    try:
        results = run(args)
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    print(table(results))
    print(json.dumps(document(results, args)))
    return 0


def run(args: argparse.Namespace) -> list[Result]:
    """Every limit, both engines in turn, round by round."""
    args.folder.mkdir(parents=True, exist_ok=True)
    pack = args.folder / f"slice-{args.layers}-nf4"
    if not (pack / PACK_MANIFEST).exists():
        say(f"writing {pack}")
        random_pack.write(pack, args.layers, VOCAB)
    engines = {"mimo": ours(args, pack)}
    if args.only != "mimo":
        python = llamacpp_build.ensure(args.venv or args.folder / "llamacpp", jobs=2, say=say)
        gguf = args.folder / f"slice-{args.layers}-q4_0.gguf"
        if not gguf.exists():
            say(f"writing {gguf}")
            os.spawnv(os.P_WAIT, python, [str(python), str(HERE / "llamacpp_slice.py"), str(gguf),
                      "--layers", str(args.layers), "--vocab", str(VOCAB)])  # fmt: skip
        engines["llama.cpp"] = theirs(args, python, gguf)
    if args.only:
        engines = {args.only: engines[args.only]}
    limits = [parse_size(text) for text in args.limit.split(",")]
    results = {(name, limit): Result(name, limit) for limit in limits for name in engines}
    for limit in limits:
        for number in range(args.rounds):
            for name, command in engines.items():
                say(f"round {number + 1} of {args.rounds}: {name} with {limit / 1e9:.2f} GB")
                measure(results[name, limit], command, pack, args.warm, args.tokens)
    return list(results.values())


def ours(args: argparse.Namespace, pack: Path) -> list[str]:
    """The command of this project's engine."""
    return [sys.executable, str(HERE / "engine_worker.py"), "ours", "--pack", str(pack),
            "--threads", str(args.threads), "--prefetch", args.prefetch]  # fmt: skip


def theirs(args: argparse.Namespace, python: Path, gguf: Path) -> list[str]:
    """The command of llama.cpp's; mmap is its default.

    Repacked weights would be memory of its own, more than the limit: the system kills it then.
    """
    return [str(python), str(HERE / "engine_worker.py"), "llamacpp", str(gguf), "--no-repack",
            "--threads", str(args.threads)]  # fmt: skip


def measure(result: Result, command: list[str], pack: Path, warm: int, tokens: int) -> None:
    """One engine once: loaded under the limit, warmed, timed."""
    log = Path(f"{pack}.{result.engine}.log")
    for path in pack.parent.glob("slice-*"):
        forget(path)
    with MemoryLimit(result.limit) as limit:
        with Worker(result.engine, limit.command(command), log) as worker:
            worker.ask("fill", 4)
            worker.ms("decode", warm)
            before, sectors = worker.ask("meters", 1), sectors_read(pack)
            times = worker.ms("decode", tokens)
            after = worker.ask("meters", 1)
            result.read_mb_token.append(512 * (sectors_read(pack) - sectors) / tokens / 1e6)
        result.peak.append(limit.peak or 0)
    seconds = sum(times) / tokens / 1e3
    result.token_s.append(seconds)
    if after:
        rate = expert_rate(pack)
        names = ("vram_hits", "ram_hits", "staged_hits", "misses")
        found = {name: after[name] - before[name] for name in names}
        wanted = sum(found.values())
        # What had to come from disk, in time or not; reads of wrong guesses are no use.
        opened = Pack.open(pack)
        expert = opened.expert_layout(opened.expert_layers[0]).stride
        missed = (found["misses"] + found["staged_hits"]) * expert / tokens
        result.disk_gb_s.append(rate / 1e9)
        result.miss_mb_token.append(missed / 1e6)
        result.of_disk.append(missed / rate / seconds)
        result.hit_rate.append(1 - found["misses"] / wanted)
        result.peak_rss.append(after["peak_rss"])


def expert_rate(pack: Path, seconds: float = 2.0) -> float:
    """Bytes a second of whole experts read at random, as many in flight as the tier has."""
    opened = Pack.open(pack)
    layouts = {layer: opened.expert_layout(layer) for layer in opened.expert_layers}
    tier, landed = DiskTier(pack, layouts), SimpleQueue[Read]()
    stride, chance = max(x.stride for x in layouts.values()), random.Random(time.monotonic_ns())
    arena = Arena(8, stride)
    for slot in range(8):  # what is measured is the disk
        arena.populate(slot)

    def more(slot: int) -> None:
        layer = chance.choice(list(layouts))
        key = (layer, chance.randrange(layouts[layer].count))
        tier.read(key, slot, arena.view(slot), listener=landed)

    for slot in range(8):
        more(slot)
    for _ in range(8):  # the first ones are checked
        more(landed.get().slot)
    start, done = time.perf_counter(), tier.bytes_read
    while time.perf_counter() - start < seconds:
        more(landed.get().slot)
    rate = (tier.bytes_read - done) / (time.perf_counter() - start)
    tier.close()
    return rate


def forget(path: Path) -> None:
    """Take a file or a folder's files out of the page cache."""
    for file in path.iterdir() if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def sectors_read(path: Path) -> int:
    """512-byte sectors everybody has read from the disk that holds `path`."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)} {os.minor(device)}"
    for line in Path("/proc/diskstats").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if f"{fields[0]} {fields[1]}" == wanted:
            return int(fields[5])
    return 0


def table(results: list[Result]) -> str:
    """A line per engine and limit."""
    head = ("limit GB", "engine", "s/token", "read MB", "misses MB", "disk GB/s", "of disk")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in results:
        rest = [f"{statistics.median(x):.3g}" if x else "-" for x in
                (r.read_mb_token, r.miss_mb_token, r.disk_gb_s, r.of_disk)]  # fmt: skip
        cells = [f"{r.limit / 1e9:.2f}", r.engine, f"{r.seconds:.4f}", *rest]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(results: list[Result], args: argparse.Namespace) -> dict[str, Any]:
    """Everything, and llama.cpp's time over ours by limit."""
    ratios = {}
    for limit in {r.limit for r in results}:
        by_name = {r.engine: r for r in results if r.limit == limit}
        if len(by_name) == 2:
            pairs = zip(by_name["llama.cpp"].token_s, by_name["mimo"].token_s, strict=True)
            ratios[str(limit)] = [round(theirs / ours, 3) for theirs, ours in pairs]
    return {
        "tool": "bench/beyond_ram.py",
        "layers": args.layers,
        "tokens": args.tokens,
        "threads": args.threads,
        "prefetch": args.prefetch,
        "ratios": ratios,
        "results": [asdict(r) for r in results],
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
