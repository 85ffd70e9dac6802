"""How fast a checkpoint becomes a pack, and what bounds it: `quant.convert` on a synthetic one.

    python bench/convert_checkpoint.py [--dir DIR] [--experts 48] [--threads 1 2] [--format nf4]

Writes an FP8 checkpoint with the real model's shapes (a dense layer and a mixture layer of some
experts; the vocabulary cut to 16384), converts it, and measures each stage alone in the same run:
rates are G weights per second, CPU seconds those of the whole process. The checkpoint was written
just before, so it is read from the page cache: the disk's own rates stand beside. With --dir on a
file system in memory (/dev/shm) the disk is out of it. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mimo_local import kernels  # noqa: E402
from quant.checkpoint import Checkpoint  # noqa: E402
from quant.convert import convert  # noqa: E402
from quant.formats import get_format  # noqa: E402
from quant.inventory import expected, expert_name, role_of  # noqa: E402
from quant.recipe import Recipe  # noqa: E402
from quant.tensorfile import Layout, Scratch, bytes_of  # noqa: E402

ROWS, COLS = 2048, 4096
NAME = expert_name(1, 0, "gate_proj")


def real_config(experts: int) -> dict[str, Any]:
    """The real model's config.json, cut to two layers."""
    config = json.loads((ROOT / "mimo_local" / "real_config.json").read_text())
    config |= {"num_hidden_layers": 2, "n_routed_experts": experts, "vocab_size": 16384}
    config |= {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}
    return dict(config)


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """A checkpoint in one file -> how many weights it has."""
    layout, total = Layout(1), 0
    for name, shape in expected(config).items():
        total += math.prod(shape)
        role = role_of(name, shape)
        if role in ("exact", "embedding", "head") or "o_proj" in name:
            layout.place(name, torch.float32 if ".mlp.gate." in name else torch.bfloat16, shape)
            continue
        layout.place(name, torch.float8_e4m3fn, shape)
        grid = (-(-shape[0] // 128), -(-shape[1] // 128))
        layout.place(name + "_scale_inv", torch.float32, grid)
    (folder / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(1 << 24, generator=g).mul_(100).clamp_(-448, 448)
    sources = {
        dtype: normal.to(dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
    }
    with (folder / "model.safetensors").open("wb") as file:
        file.write(layout.header({}, 4096))
        for placed in layout.placed:
            left = math.prod(placed.shape)
            source = sources[placed.dtype]
            if placed.name.endswith("_scale_inv"):
                source = source.abs().mul(1e-6)
            while left:
                file.write(bytes_of(source[:left]))
                left -= min(left, source.numel())
        file.flush()
        os.fsync(file.fileno())
    return total


def cpu_seconds() -> float:
    """CPU time of this process, all threads, system calls included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rate(work: Callable[[], object], amount: float, repeat: int = 5) -> float:
    """Median amount per second, in 1e9."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / sorted(times)[repeat // 2] / 1e9


def stages(source: Checkpoint, folder: Path, fmt: str) -> dict[str, float]:
    """Each stage alone on one expert matrix, G weights/s; disk rates in GB/s."""
    form, n, scratch = get_format(fmt), ROWS * COLS, Scratch()
    stored = source.load(NAME)
    parts = form.pack(stored)
    data = memoryview(b"".join(bytes_of(p) for p in parts.values()))
    probe = folder / "probe"

    def write(times: int = 1, *, sync: bool = False) -> None:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for _ in range(times):
            os.write(fd, data)
        if sync:
            os.fsync(fd)
        os.close(fd)

    found = {
        "read, cached": rate(lambda: source.load(NAME, scratch=scratch), n),
        "quantise": rate(lambda: form.pack(stored, out=parts), n),
        "crc": rate(lambda: zlib.crc32(data), n),
        "sha256": rate(lambda: hashlib.sha256(data).digest(), n),
        "write, cached": rate(write, n),
    }
    times = (1 << 30) // len(data)
    found["disk write GB/s"] = rate(lambda: write(times, sync=True), times * len(data), 1)
    fd = os.open(probe, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(len(data))
    found["disk read GB/s"] = rate(
        lambda: [os.preadv(fd, [buffer], i * len(data)) for i in range(times)],
        times * len(data),
        1,
    )
    os.close(fd)
    probe.unlink()
    return {name: round(value, 3) for name, value in found.items()}


def convert_once(checkpoint: Path, folder: Path, fmt: str, weights: int) -> dict[str, Any]:
    """One whole conversion: wall and CPU time."""
    pack = folder / "pack"
    shutil.rmtree(pack, ignore_errors=True)
    cpu, start = cpu_seconds(), time.perf_counter()
    convert(checkpoint, pack, Recipe.for_format(fmt))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "g_weights_s": round(weights / seconds / 1e9, 3),
        "g_weights_per_core_second": round(weights / cpu / 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=options.dir))
    report: dict[str, Any] = {"kernels": kernels.describe(), "format": options.format}
    try:
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        weights = write_checkpoint(checkpoint, real_config(options.experts))
        report["g_weights"] = weights / 1e9
        for threads in options.threads:
            torch.set_num_threads(threads)
            if (library := kernels.get()) is not None:
                library.set_threads(threads)
            found = stages(Checkpoint.open(checkpoint), folder, options.format)
            runs = [convert_once(checkpoint, folder, options.format, weights) for _ in range(2)]
            report[f"{threads} threads"] = {"stages": found, "convert": runs}
            print(threads, found, *runs, sep="\n  ", flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
