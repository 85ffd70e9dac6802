"""Facts about NVIDIA cards that need no torch: what the driver says, what the PCI bus shows.

Every question is bounded in time, also where the driver hangs and its tool cannot be killed. Looks
only and judges nothing: `gpu_report` does, for `doctor`. What torch and bitsandbytes make of a card
is found by `gpu_probe`, in a process of its own, which is started here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

PATIENCE: Final = 8.0
"""Seconds for the driver's tool: it takes 0.1 to 2, longer when no program keeps the card on."""
PROBE_PATIENCE: Final = 180.0
"""Seconds for torch, bitsandbytes and a first Triton kernel to load: 10 to 30 on a slow disk."""
NVIDIA: Final = "0x10de"
WSL_TOOL: Final = "/usr/lib/wsl/lib/nvidia-smi"
FIELDS: Final = (
    *("index", "name", "driver_version", "memory.total", "memory.used", "memory.free"),
    *("compute_cap", "pcie.link.gen.current", "pcie.link.gen.max"),
    *("pcie.link.width.current", "pcie.link.width.max"),
)
OLD_FIELDS: Final = FIELDS[:6]
"""What drivers before 510 answer too: they refuse a question with a field they do not know."""

Run: TypeAlias = Callable[[Sequence[str], float], "Said"]
_abandoned: list[subprocess.Popen[bytes]] = []
"""Programs that did not die when they were told to: a driver holds them."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a program printed; `code` None: it did not end in time."""

    code: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Card:
    """One card as its driver describes it; memory in bytes, None or 0 for what it does not say."""

    index: int
    name: str
    driver: str
    total: int
    used: int
    free: int
    capability: tuple[int, int] | None = None
    gen_now: int = 0
    gen_max: int = 0
    lanes_now: int = 0
    lanes_max: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking the driver."""

    kind: Literal["cards", "none", "missing", "hangs", "failed"]
    cards: tuple[Card, ...] = ()
    text: str = ""
    """What it said when it failed."""


@dataclass(frozen=True, slots=True)
class User:
    """A program that has memory of a card; bytes, 0 where the driver does not say."""

    pid: int
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Around:
    """What lies around the card."""

    on_bus: int
    """NVIDIA display devices on the PCI bus."""
    nouveau: bool
    """The other driver holds it."""
    wsl: bool
    container: bool
    locked: tuple[str, ...]
    """Device files that this user may not open."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What torch and bitsandbytes made of the card; `failed`: nothing, and why."""

    failed: str = ""
    torch: str = ""
    cuda: str = ""
    """CUDA version of the torch build, "" for one without."""
    available: bool = False
    why: str = ""
    archs: tuple[str, ...] = ()
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    total: int = 0
    free: int = 0
    checks: dict[str, str] = field(default_factory=dict)
    """What was tried -> "" if it works, else what went wrong."""
    rates: dict[str, float] = field(default_factory=dict)
    """Bytes per second."""


def run(command: Sequence[str], seconds: float) -> Said:
    """Run a program for at most so long; one that hangs in the kernel is left behind.

    OSError if it cannot be started.
    """
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                _abandoned.append(process)
            code = None
        except BaseException:
            process.kill()
            _abandoned.append(process)
            raise
        out.seek(0)
        return Said(code, out.read().decode("utf-8", "replace"))


def ask_driver(run: Run = run) -> Answer:
    """The cards by `nvidia-smi`, or why there are none."""
    tool = shutil.which("nvidia-smi") or (WSL_TOOL if Path(WSL_TOOL).exists() else None)
    if tool is None:
        return Answer("missing")
    said = Said(None, "")
    for names in (FIELDS, OLD_FIELDS):
        query = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            said = run(query, PATIENCE)
        except OSError as error:
            return Answer("failed", text=f"nvidia-smi cannot be started: {error.strerror}")
        if said.code is None:
            return Answer("hangs")
        if said.code == 0:
            cards = parse_cards(said.text)
            return Answer("cards", cards) if cards else Answer("none", text=_first(said.text))
        if "not a valid field" not in said.text:
            break
    if "no devices were found" in said.text.lower():
        return Answer("none", text=_first(said.text))
    return Answer("failed", text=_first(said.text) or f"nvidia-smi ended with code {said.code}")


def parse_cards(text: str) -> tuple[Card, ...]:
    """Cards from `nvidia-smi`'s lines for FIELDS or OLD_FIELDS; other lines are left out."""
    found = []
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) not in (len(FIELDS), len(OLD_FIELDS)) or not fields[0].isdigit():
            continue
        fields += ["" for _ in range(len(FIELDS) - len(fields))]
        total, used, free = (_number(value) << 20 for value in fields[3:6])
        major, dot, minor = fields[6].partition(".")
        capability = (int(major), int(minor)) if dot and (major + minor).isdigit() else None
        found.append(
            Card(
                int(fields[0]), _plain(fields[1]), _plain(fields[2]), total, used, free,
                capability, *map(_number, fields[7:11]),
            )
        )  # fmt: skip
    return tuple(found)


def users(run: Run = run) -> tuple[User, ...]:
    """Programs that compute on the cards, the largest first; () where the driver does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = "--query-compute-apps=pid,process_name,used_memory"
    try:
        said = run([tool, query, "--format=csv,noheader,nounits"], PATIENCE)
    except OSError:
        return ()
    found = []
    for line in said.text.splitlines() if said.code == 0 else ():
        pid, comma, rest = line.partition(",")
        name, _, size = rest.rpartition(",")
        if comma and pid.strip().isdigit():
            # The path of a program names its user; its own name is enough.
            base = _plain(name.strip().replace("\\", "/").rsplit("/", 1)[-1])
            found.append(User(int(pid), base, _number(size.strip()) << 20))
    return tuple(sorted(found, key=lambda user: -user.nbytes))


def around(root: Path = Path("/")) -> Around:
    """What the system shows without the driver's help."""
    on_bus = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        # Class 0x03: display controllers; a card's sound chip is a device of NVIDIA's as well.
        display = _read(device / "class").startswith("0x03")
        on_bus += display and _read(device / "vendor") == NVIDIA
    files = [p for p in (root / "dev").glob("nvidia*") if not p.is_dir()]
    return Around(
        on_bus=on_bus,
        nouveau=any(
            line.startswith("nouveau ") for line in _read(root / "proc/modules").splitlines()
        ),
        wsl="microsoft" in _read(root / "proc/sys/kernel/osrelease").lower(),
        container=any((root / name).exists() for name in (".dockerenv", "run/.containerenv")),
        locked=tuple(sorted(p.name for p in files if not os.access(p, os.R_OK | os.W_OK))),
    )


def probe(index: int = 0, run: Run = run) -> Probe:
    """Try card `index` with torch and bitsandbytes, in another process: 5 to 30 s."""
    command = [sys.executable, "-m", "mimo_local.gpu_probe", str(index)]
    try:
        said = run(command, PROBE_PATIENCE)
    except OSError as error:
        return Probe(failed=f"the trial cannot be started: {error.strerror}")
    if said.code is None:
        return Probe(failed=f"torch did not answer within {PROBE_PATIENCE:.0f} s")
    lines = said.text.strip().splitlines()
    for line in reversed(lines):  # libraries print warnings before and after it
        try:
            return _probed(json.loads(line))
        except (ValueError, TypeError, KeyError):
            continue
    last = _plain(lines[-1]) if lines else f"code {said.code}"
    return Probe(failed=f"the trial broke off: {last}")


def _probed(data: dict[str, Any]) -> Probe:
    major, minor = data["capability"]
    return Probe(
        torch=str(data["torch"]),
        cuda=str(data["cuda"]),
        available=bool(data["available"]),
        why=_plain(data["why"]),
        archs=tuple(map(str, data["archs"])),
        name=_plain(data["name"]),
        capability=(int(major), int(minor)),
        total=int(data["total"]),
        free=int(data["free"]),
        checks={str(name): _plain(text) for name, text in data["checks"].items()},
        rates={str(name): float(rate) for name, rate in data["rates"].items()},
    )


# ---- helpers -------------------------------------------------------------------------------------


def _number(text: str) -> int:
    return int(text) if text.isdigit() and len(text) < 12 else 0


def _plain(text: Any) -> str:
    """One line that a terminal shows as it is."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:300]


def _first(text: str) -> str:
    lines = [line for line in map(_plain, text.splitlines()) if line]
    return lines[0] if lines else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
