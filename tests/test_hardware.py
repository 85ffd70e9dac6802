"""hardware: /proc and cgroups are read from made-up trees; rates are positive, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_local import hardware, kernels

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_detect_describes_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "describe", lambda: "avx2", raising=False)
    found = hardware.detect(tmp_path)
    assert 1 <= found.cores_usable <= found.cores_logical
    assert 1 <= found.cores_physical <= found.cores_logical
    assert 0 < found.ram_available <= found.ram_total
    assert found.kernels == "avx2"
    assert 0 <= found.disk.free <= found.disk.total
    assert found.vram == max((g.vram_total for g in found.gpus), default=0)


def test_detect_believes_the_cgroup_and_not_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "describe", lambda: "avx2", raising=False)
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": f"{64 << 20}\n",
            "sys/fs/cgroup/job/memory.current": f"{16 << 20}\n",
            "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
        },
    )
    found = hardware.detect(root=root)
    assert found.ram_total == found.ram_limit == 64 << 20
    assert found.ram_available == 48 << 20
    assert found.cpu_quota == 0.5
    assert found.cores_usable == 1, "half a core is still one thread"


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({}, None, sys.maxsize),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, None, sys.maxsize),
        (  # v2: the parent is tighter, cached files are given back
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            4 * GIB,
            2 * GIB,
        ),
        (  # v1 in a container: the path is the host's, only the mount itself exists
            {
                "proc/self/cgroup": "7:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            2 * GIB,
            GIB,
        ),
        (  # v1 without a limit: a huge number
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
            sys.maxsize,
        ),
    ],
)
def test_cgroup_memory(tmp_path: Path, files: dict[str, str], limit: int | None, free: int) -> None:
    assert hardware.cgroup_memory(tree(tmp_path, files)) == (limit, free)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cgroup_cpus(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    assert hardware.cgroup_cpus(tree(tmp_path, files)) == cores


@given(st.text(max_size=80))
def test_garbage_in_proc_is_no_fact_and_no_crash(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = ["proc/self/cgroup", "proc/cpuinfo", "proc/self/mountinfo"]
        tree(root, dict.fromkeys([*files, "sys/fs/cgroup/memory.max"], ""))
        for name in [*files, "sys/fs/cgroup/cpu.max"]:
            (root / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        hardware.cpu_info(root)
        assert hardware.usable_cores(root) >= 1
        assert hardware.cgroup_memory(root)[1] >= 0
        assert hardware.disk(root, root=root).total > 0


def test_cpu_info_keeps_only_flags_that_matter(tmp_path: Path) -> None:
    text = (
        "model name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse2 avx2 fma amx_int8\n\nmodel name: B\n"
    )
    root = tree(tmp_path, {"proc/cpuinfo": text})
    assert hardware.cpu_info(root) == ("Some CPU @ 3 GHz", ("avx2", "fma", "amx_int8"))


def test_disk_names_the_innermost_mount(tmp_path: Path) -> None:
    inner = tmp_path / "data"
    inner.mkdir()
    lines = [
        "1 0 1:1 / / rw - ext4 /dev/root rw",
        f"2 1 1:2 / {tmp_path} rw shared:3 master:1 - xfs /dev/sdb1 rw",
        "3 1 1:3 / /elsewhere rw - tmpfs none rw",
        "broken line",
    ]
    root = tree(tmp_path / "fake", {"proc/self/mountinfo": "\n".join(lines)})
    found = hardware.disk(inner / "not" / "there" / "yet", root=root)
    assert (found.filesystem, found.device, found.path) == ("xfs", "/dev/sdb1", inner)
    assert hardware.disk(Path("/"), root=root).filesystem == "ext4"


def test_nvidia_smi_lines_become_gpus() -> None:
    text = "NVIDIA GeForce RTX 4090, 24564, 23000, 575.51\nBroken, [N/A], [N/A], 575.51\n\n"
    assert hardware.parse_nvidia_smi(text) == (
        hardware.Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 23000 << 20, "575.51"),
    )


def test_gpus_are_asked_of_nvidia_smi_first_and_of_a_loaded_torch_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def smi(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["timeout"] <= 10, "a hanging driver must not hang the tool"
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", smi)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert hardware.gpus() == ()
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        mem_get_info=lambda index: (3 * GIB, 8 * GIB),
        get_device_name=lambda index: "Some GPU",
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    assert hardware.gpus() == (hardware.Gpu("Some GPU", 8 * GIB, 3 * GIB),)


def test_measuring_the_disk_gives_a_rate_and_leaves_nothing(tmp_path: Path) -> None:
    speed = hardware.measure_disk(tmp_path, seconds=0.05, size=16 << 20)
    assert speed.bytes_per_s > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_reads_is_measured_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **kwargs: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    speed = hardware.measure_disk(tmp_path, seconds=0.02, size=8 << 20)
    assert speed.bytes_per_s > 0
    assert "buffered" in speed.note


def test_a_full_disk_is_an_error_not_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = hardware.Disk(tmp_path, "ext4", "", 100 << 20, 1 << 20)
    monkeypatch.setattr(hardware, "disk", lambda path: full)
    with pytest.raises(OSError, match="free"):
        hardware.measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ram_answers_at_more_than_a_disk_would() -> None:
    assert hardware.measure_ram(0.03, threads=1, size=8 << 20).bytes_per_s > 100e6
