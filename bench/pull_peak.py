"""What a pull takes of disk and memory: two layers of the real model, all 256 experts.

    python bench/pull_peak.py [--dir DIR] [--experts 256] [--rate-limit SIZE]

Writes an FP8 checkpoint with the real shapes, its tensors in the files the hub keeps them in (9.4
GB with the whole vocabulary), serves it on 127.0.0.1 and runs `mimo pull` on it. Watches the
staging folder every 20 ms and the process's peak memory; compares the pack's checksums with a
conversion of the whole checkpoint. Needs 20 GB in DIR. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))

from hub_server import HubServer  # noqa: E402
from test_pull import real_file  # noqa: E402

from quant.convert import convert  # noqa: E402
from quant.inventory import expected, role_of  # noqa: E402
from quant.tensorfile import Layout, bytes_of  # noqa: E402


def real_config(experts: int) -> dict[str, Any]:
    """The real model's config.json, cut to a dense and a mixture layer."""
    config = json.loads((ROOT / "mimo_local" / "real_config.json").read_text())
    config |= {"num_hidden_layers": 2, "n_routed_experts": experts}
    return dict(config | {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]})


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """The checkpoint in the hub's files -> how many bytes it has."""
    files: dict[str, Layout] = {}
    for name, shape in expected(config).items():
        layout = files.setdefault(real_file(name), Layout(1))
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
    sources = {t: normal.to(t) for t in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)}
    weight_map = {}
    for name, layout in files.items():
        weight_map |= {placed.name: name for placed in layout.placed}
        with (folder / name).open("wb") as file:
            file.write(layout.header({}, 8))
            for placed in layout.placed:
                left, source = math.prod(placed.shape), sources[placed.dtype]
                if placed.name.endswith("_scale_inv"):
                    source = source[:left].abs() * 1e-6
                while left:
                    file.write(bytes_of(source[:left]))
                    left -= min(left, source.numel())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def on_disk(folder: Path) -> int:
    """Bytes a folder takes on the disk now."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).stat().st_blocks * 512
    return total


def checksums(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def watched(url: str, work: Path, rate: str | None) -> dict[str, Any]:
    """Run `mimo pull`; what it took."""
    pack, staging = work / "pack", work / "pack.source"
    command = [sys.executable, "-m", "mimo_local", "pull", "--yes", "--to", str(pack)]
    command += ["--rate-limit", rate] if rate else []
    env = os.environ | {"HF_ENDPOINT": url, "MIMO_HOME": str(work / "home"), "NO_PROXY": "*"}
    begin, peak, memory = time.monotonic(), 0, 0
    process = subprocess.Popen(command, env=env, cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, on_disk(staging))
        with suppress(OSError, IndexError, ValueError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = max(memory, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
        time.sleep(0.02)
    assert process.returncode == 0, "the pull failed"
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "peak_extra_disk_gb": round(peak / 1e9, 3),
        "peak_rss_gb": round(memory / 1e9, 3),
        "left_gb": on_disk(staging) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rate-limit", help="as `mimo pull` takes it")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="pull-peak-", dir=options.dir))
    try:
        (work / "repo").mkdir()
        total = write_checkpoint(work / "repo", real_config(options.experts))
        hub = HubServer(work / "repo")
        files = {path.name: path.stat().st_size for path in (work / "repo").iterdir()}
        report: dict[str, Any] = {"source_gb": round(total / 1e9, 3), "experts": options.experts}
        report["largest_gb"] = round(max(files.values()) / 1e9, 3)
        hub.entries()  # hashed before the clock runs
        report |= watched(hub.url, work, options.rate_limit)
        hub.close()
        pulled = checksums(work / "pack")
        report["pack_gb"] = round(on_disk(work / "pack") / 1e9, 3)
        shutil.rmtree(work / "pack")
        report["identical"] = checksums(convert(work / "repo", work / "alone").path) == pulled
    finally:
        shutil.rmtree(work)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
