"""Facts about this machine: cores, instruction sets, RAM, GPUs, disk, and how fast they answer.

Knows no model and decides nothing: `plan` and `doctor` judge what is found here. In containers
`/proc/meminfo` and `os.cpu_count()` lie, so cgroup limits (v1 and v2) and the CPU affinity are read
too. Never imports torch; asks it about GPUs only when somebody else has already loaded it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_local import kernels

# What the kernels dispatch on or could; names as /proc/cpuinfo spells them.
ISA_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
)
NO_LIMIT = 1 << 60  # cgroup v1 writes a huge number where v2 writes "max"
BLOCK = 4 << 20  # one disk read; from 1 MB up random reads run at the sequential rate
DEPTH = 4  # reads in flight: NVMe needs several to reach its rate, a SATA disk loses nothing


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device; memory in bytes."""

    name: str
    vram_total: int
    vram_free: int
    driver: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that holds `path`; sizes in bytes, `free` is what this user may write."""

    path: Path
    filesystem: str
    device: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Speed:
    """A measured rate in bytes per second; `note` says what makes it less than a clean figure."""

    bytes_per_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine as this process may use it."""

    cpu: str
    cores_physical: int
    cores_logical: int
    cores_usable: int
    """Logical cores left after affinity and cgroup quota, at least 1."""
    cpu_quota: float | None
    """Cores' worth of time the cgroup grants, None without a limit."""
    isa_flags: tuple[str, ...]
    kernels: str
    """`avx512`, `avx_vnni`, `avx2`, `scalar`, or `reference (slow)`: what the products run on."""
    ram_total: int
    """Bytes this process may use: physical memory or the cgroup's limit, the smaller."""
    ram_available: int
    ram_limit: int | None
    """The cgroup's limit in bytes, None without one below the physical memory."""
    gpus: tuple[Gpu, ...]
    disk: Disk

    @property
    def vram(self) -> int:
        """Bytes of the largest GPU (one device is used, not the sum); 0 without one."""
        return max((g.vram_total for g in self.gpus), default=0)


def detect(path: Path | None = None, *, root: Path = Path("/")) -> Hardware:
    """All facts for this process; `path`: whose file system; `root`: where /proc and /sys are."""
    import psutil

    memory = psutil.virtual_memory()
    limit, cgroup_free = cgroup_memory(root)
    limit = limit if limit is not None and limit < memory.total else None
    logical = os.cpu_count() or 1
    name, flags = cpu_info(root)
    return Hardware(
        cpu=name or platform.processor() or platform.machine(),
        cores_physical=psutil.cpu_count(logical=False) or logical,
        cores_logical=logical,
        cores_usable=usable_cores(root),
        cpu_quota=cgroup_cpus(root),
        isa_flags=flags,
        kernels=kernels.describe(),
        ram_total=memory.total if limit is None else limit,
        ram_available=memory.available if limit is None else min(memory.available, cgroup_free),
        ram_limit=limit,
        gpus=gpus(),
        disk=disk(path or Path.home(), root=root),
    )


def cpu_info(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """(model name, the ISA_FLAGS present); ("", ()) where there is no /proc/cpuinfo."""
    name, found = "", set[str]()
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() == "flags" and not found:
            found = set(value.split())
    return name, tuple(flag for flag in ISA_FLAGS if flag in found)


def cgroup_memory(root: Path = Path("/")) -> tuple[int | None, int]:
    """(smallest memory limit of our cgroup and its parents or None, bytes still free under it)."""
    tightest: int | None = None
    free = sys.maxsize
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= NO_LIMIT:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        # Cached file pages count as used but are given back under pressure, as in MemAvailable.
        left = limit - used + _reclaimable(folder / "memory.stat")
        tightest = limit if tightest is None else min(tightest, limit)
        free = min(free, max(0, min(limit, left)))
    return tightest, free


def cgroup_cpus(root: Path = Path("/")) -> float | None:
    """Cores' worth of CPU time the tightest cgroup grants, None without a quota."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        fields = _read(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0].isdigit() and int(fields[1]) > 0:
            quotas.append(int(fields[0]) / int(fields[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def gpus() -> tuple[Gpu, ...]:
    """CUDA devices by `nvidia-smi`, else by torch if it is already loaded; () without one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5
        )
        if done.returncode == 0 and (found := parse_nvidia_smi(done.stdout)):
            return found
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(Gpu(torch.cuda.get_device_name(index), int(total), int(free)))
    return tuple(devices)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Devices from its csv without header and units (MiB); lines without a number are left out."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[1].isdigit() and fields[2].isdigit():
            found.append(Gpu(fields[0], int(fields[1]) << 20, int(fields[2]) << 20, fields[3]))
    return tuple(found)


def disk(path: Path, *, root: Path = Path("/")) -> Disk:
    """The file system that holds `path` (its nearest existing parent if it does not exist yet)."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    kind, device = "unknown", ""
    longest = -1
    resolved = path.resolve()
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # "27 1 254:0 / /mnt rw [optional...] - ext4 /dev/vda rw": optional fields end at the dash.
        left, dash, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if not dash or len(fields) < 5 or len(after) < 2:
            continue
        mount = fields[4].replace("\\040", " ")
        # Later lines shadow earlier ones mounted at the same place.
        if len(mount) >= longest and resolved.is_relative_to(mount):
            longest, kind, device = len(mount), after[0], after[1]
    stat = os.statvfs(path)
    unit = stat.f_frsize
    return Disk(path, kind, device, stat.f_blocks * unit, stat.f_bavail * unit)


def measure_disk(path: Path, seconds: float = 1.0, *, size: int = 256 << 20) -> Speed:
    """Read rate of an own file in folder `path`: 4 MiB blocks, four in flight, no page cache.

    Writes at most `size` bytes (never more than a tenth of what is free) and removes them.
    Raises OSError where the folder cannot be written.
    """
    size = min(size, disk(path).free // 10) // BLOCK * BLOCK
    if size < BLOCK:
        raise OSError(f"less than {10 * BLOCK >> 20} MiB free in {path}")
    handle, name = tempfile.mkstemp(prefix=".mimo-disk-", dir=path)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            block = os.urandom(BLOCK)  # a compressing file system must not shrink it
            for _ in range(size // BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        return _read_rate(Path(name), size, seconds)
    finally:
        Path(name).unlink(missing_ok=True)


def measure_ram(seconds: float = 0.3, *, threads: int | None = None, size: int = 64 << 20) -> Speed:
    """Read rate of memory: `threads` buffers of `size` bytes searched by the C library's memchr."""
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    count = threads or usable_cores()
    buffers = [ctypes.create_string_buffer(size) for _ in range(count)]
    for buffer in buffers:  # untouched pages are all the one zero page, which sits in the cache
        ctypes.memset(buffer, 1, size)

    def scan(worker: int) -> int:
        libc.memchr(buffers[worker], 0, size)  # ctypes releases the lock meanwhile
        return size

    rate = _rate(scan, count, seconds)
    return Speed(rate, f"{count} thread{'s' if count > 1 else ''}")


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_cores(root: Path = Path("/")) -> int:
    """Logical cores left after affinity and cgroup quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_cpus(root)
    return max(1, cores or 1 if quota is None else min(cores or 1, round(quota)))


# -- helpers ---------------------------------------------------------------------------------------


def _read_rate(path: Path, size: int, seconds: float) -> Speed:
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    direct = hasattr(os, "O_DIRECT")
    try:
        fd = os.open(path, flags)
    except OSError:  # tmpfs and some network file systems refuse O_DIRECT
        fd, direct = os.open(path, os.O_RDONLY), False
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        buffers = [mmap.mmap(-1, BLOCK) for _ in range(DEPTH)]  # page-aligned, as O_DIRECT asks
        offsets = itertools.cycle(range(0, size, BLOCK))  # one C call: safe to share

        def read(worker: int) -> int:
            return os.preadv(fd, [buffers[worker]], next(offsets))

        try:
            rate = _rate(read, DEPTH, seconds)
        except OSError:  # opened, but reads are refused (some FUSE file systems)
            if not direct:
                raise
            os.close(fd)
            fd, direct = os.open(path, os.O_RDONLY), False
            rate = _rate(read, DEPTH, seconds)
    finally:
        os.close(fd)
    note = "" if direct else "buffered: no O_DIRECT here, the page cache may flatter"
    return Speed(rate, note)


def _rate(work: Callable[[int], int], workers: int, seconds: float) -> float:
    """Bytes per second of `work(worker) -> bytes`, repeated in `workers` threads for `seconds`."""
    done = [0] * workers
    failed: list[Exception] = []
    start = time.perf_counter()

    def loop(worker: int) -> None:
        try:
            while time.perf_counter() - start < seconds:
                done[worker] += work(worker)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=loop, args=(w,)) for w in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return sum(done) / (time.perf_counter() - start)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of our cgroup for `controller` and all its parents, v2 and v1, that exist."""
    mounts: list[tuple[Sequence[str], str]] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            mounts.append((("sys/fs/cgroup", "sys/fs/cgroup/unified"), path))
        elif controller in names.split(","):
            mounts.append(((f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{names}"), path))
    for places, path in mounts:
        for place in places:
            base = root / place
            # In a container the path may name a folder of the host: what exists of it counts.
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts), -1, -1):
                folder = base.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def _reclaimable(stat: Path) -> int:
    values = dict(line.split()[:2] for line in _read(stat).splitlines() if len(line.split()) >= 2)
    text = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(text) if text.isdigit() else 0


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
