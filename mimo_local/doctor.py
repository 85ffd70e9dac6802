"""What `mimo doctor` says: this machine and installation, what is wrong with it, and the fix.

Looks only: writes nothing but the disk test's own temporary file, imports neither torch nor
textual (versions come from the packages' metadata). Knows no terminal codes; the CLI prints.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mimo_local import __version__, gpu_facts, gpu_report, hardware, kernels, runs, verdicts
from mimo_local.config import ModelConfig
from mimo_local.errors import MimoError
from mimo_local.family import named
from mimo_local.plan import here
from mimo_local.plan.planner import plan, span
from mimo_local.session_store import FOLDER, SessionStore
from mimo_local.settings import PACK_MANIFEST, Paths, Settings
from mimo_local.sizes import GB, gb

REQUIRED = (
    *("torch", "numpy", "safetensors", "bitsandbytes", "accelerate", "huggingface-hub"),
    *("tokenizers", "jinja2", "typer", "rich", "textual", "pypdfium2", "selectolax", "psutil"),
    "platformdirs",
)
# Names of file systems that live on another machine: a pack there is read over the network.
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})
REAL_CONFIG = Path(__file__).with_name("real_config.json")
SMALL_RAM = 4 * GB  # the demo model and its document work stay below this
SLOW_DISK = 0.5 * GB  # experts from disk at 4 bit: 5 GB per token


@dataclass(frozen=True, slots=True)
class Problem:
    """`broken`: something the tool needs does not work; `warning`: it works, but worse."""

    level: Literal["broken", "warning"]
    message: str
    fix: str


@dataclass(frozen=True, slots=True)
class Report:
    """Sections of (label, value) lines in the order to show them, then the problems."""

    sections: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Nothing is broken; warnings may be there."""
        return all(problem.level != "broken" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "ok": self.ok,
            "sections": {name: dict(lines) for name, lines in self.sections},
            "problems": [asdict(problem) for problem in self.problems],
        }


class _Notes:
    """Collects sections and problems while looking."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, tuple[tuple[str, str], ...]]] = []
        self.problems: list[Problem] = []

    def section(self, name: str, *lines: tuple[str, str]) -> None:
        self.sections.append((name, lines))

    def broken(self, message: str, fix: str) -> None:
        self.problems.append(Problem("broken", message, fix))

    def warn(self, message: str, fix: str) -> None:
        self.problems.append(Problem("warning", message, fix))


def examine(*, seconds: float = 0.5, env: Mapping[str, str] = os.environ) -> Report:
    """Look at everything; `seconds`: how long the disk and the RAM are read (0: not at all)."""
    notes = _Notes()
    paths = Paths.default(env)
    facts = hardware.detect(paths.data_dir)
    _machine(notes, facts, seconds)
    _gpu(notes, facts)
    _kernels(notes, facts, env)
    _storage(notes, facts, paths, seconds, env)
    _software(notes)
    _models(notes, paths, env)
    _predictions(notes, facts, paths)
    _terminal(notes, env)
    return Report(tuple(notes.sections), tuple(notes.problems))


def _machine(notes: _Notes, facts: hardware.Hardware, seconds: float) -> None:
    cores = f"{facts.cores_physical} physical, {facts.cores_logical} logical"
    if facts.cores_usable < facts.cores_logical:
        cores += f", {facts.cores_usable} usable by this process"
    ram = f"{gb(facts.ram_total)}, {gb(facts.ram_available)} available"
    if facts.ram_limit is not None:
        ram += " (limited by a cgroup)"
    lines = [("CPU", facts.cpu), ("cores", cores), ("RAM", ram)]
    if seconds > 0:
        speed = hardware.measure_ram(min(seconds, 0.3))
        lines.append(("RAM speed", f"{speed.bytes_per_s / GB:.1f} GB/s read, {speed.note}"))
    for gpu in facts.gpus:
        vram = f"{gb(gpu.vram_total)}, {gb(gpu.vram_free)} free"
        lines.append(("GPU", f"{gpu.name}, {vram}, driver {gpu.driver or 'unknown'}"))
    if not facts.gpus:
        lines.append(("GPU", "none found"))
    notes.section("machine", ("system", f"{platform.system()} {platform.machine()}"), *lines)
    if facts.ram_available < SMALL_RAM:
        notes.warn(
            f"{gb(facts.ram_available)} of RAM are available",
            "close other programs; the demo model needs about 2 GB",
        )


def _gpu(notes: _Notes, facts: hardware.Hardware) -> None:
    """The cards, the driver, and what torch and bitsandbytes make of them; nothing without one."""
    answer, around = gpu_facts.ask_driver(), gpu_facts.around()
    if not gpu_report.present(answer, around):
        return
    build, probe = torch_build(), None
    if answer.cards and build.startswith("CUDA"):
        probe = gpu_facts.probe(max(answer.cards, key=lambda card: card.total).index)
    users = gpu_facts.users() if answer.cards else ()
    found = gpu_report.examine(answer, around, build, probe, users)
    planned = [("it would hold", _planned(facts))] if facts.gpus else []
    notes.section("GPU", *found.lines, *planned)
    notes.problems += [Problem(*trouble) for trouble in found.troubles]


def _planned(facts: hardware.Hardware) -> str:
    """What of the whole model a card with this much free memory takes."""
    config = ModelConfig.from_dict(json.loads(REAL_CONFIG.read_text(encoding="utf-8")))
    made = plan(config, None, here.free_now(facts, vram=None))
    there, most = made.device, len(made.layers_on_device)
    parts = [f"{there.layers} of {most} layers"]
    parts += [name for name in ("head", "drafter") if getattr(there, name)]
    parts.append(f"{made.placement.vram_experts} of {made.sizes.experts} experts")
    return f"of MiMo-V2-Flash {', '.join(parts)}; `mimo plan` says how fast that is"


def _kernels(notes: _Notes, facts: hardware.Hardware, env: Mapping[str, str]) -> None:
    flags = ("CPU flags", " ".join(facts.isa_flags) or "none of those the kernels know")
    try:
        native, reason = kernels.get(), kernels.why_unavailable()
    except MimoError as error:  # a wrong MIMO_THREADS or a library that refuses to start
        native, reason = None, f"{error.message}. {error.hint}"
        notes.broken(f"the kernel library does not work: {error.message}", error.hint)
    if native is None:
        notes.section("kernels", flags, ("in use", "reference (slow)"), ("because", reason))
        notes.warn("products run on the slow torch reference", reason)
        return
    lowered = f", MIMO_ISA={env['MIMO_ISA']}" if env.get("MIMO_ISA") else ""
    in_use = f"{native.isa}, {native.threads} threads{lowered}"
    runs = ", ".join(native.isas)
    notes.section("kernels", flags, ("this CPU runs", runs), ("in use", in_use))
    for note in native.notes:
        notes.warn(note, "change or unset the variable")
    if native.isa != native.isas[-1]:
        notes.warn(
            f"the {native.isa} kernels are in use, this CPU has {native.isas[-1]}",
            "unset MIMO_ISA",
        )


def _storage(
    notes: _Notes,
    facts: hardware.Hardware,
    paths: Paths,
    seconds: float,
    env: Mapping[str, str],
) -> None:
    disk = facts.disk
    lines = [
        ("config", str(paths.config_file)),
        ("data", str(paths.data_dir)),
        ("cache", str(paths.cache_dir)),
        ("sessions", _sessions(paths, env)),
        ("file system", f"{disk.filesystem}, {gb(disk.free)} of {gb(disk.total)} free"),
    ]
    for folder in (paths.data_dir, paths.cache_dir):
        there = hardware.disk(folder).path
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            notes.broken(
                f"{folder} cannot be written", f"change the rights of {there} or set MIMO_HOME"
            )
    if seconds > 0:
        try:
            speed = hardware.measure_disk(disk.path, seconds)
        except OSError as error:
            lines.append(("disk speed", f"not measured: {error}"))
        else:
            note = f" ({speed.note})" if speed.note else ""
            lines.append(("disk speed", f"{speed.bytes_per_s / GB:.2f} GB/s read{note}"))
            if speed.bytes_per_s < SLOW_DISK:
                notes.warn(
                    f"the disk reads {speed.bytes_per_s / GB:.2f} GB/s",
                    "keep packs on an NVMe drive: set MIMO_HOME to a folder there",
                )
    if disk.filesystem in NETWORK:
        notes.warn(
            f"packs would be read over the network ({disk.filesystem})",
            "set MIMO_HOME to a folder on a local disk",
        )
    notes.section("storage", *lines)


def _sessions(paths: Paths, env: Mapping[str, str]) -> str:
    limit = None
    with suppress(MimoError):  # told among the models
        limit = Settings.resolve(paths=paths, env=env).sessions_size
    store = SessionStore(paths.cache_dir / FOLDER, limit)
    count = len(store.sessions())
    return f"{count} saved, {gb(store.nbytes)} of at most {gb(store.limit)}"


def _software(notes: _Notes) -> None:
    lines = [("mimo-local", __version__), ("Python", platform.python_version())]
    for name in REQUIRED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append((name, "missing"))
            notes.broken(f"the package `{name}` is not installed", f"`pip install {name}`")
            continue
        lines.append((name, f"{version} ({torch_build()})" if name == "torch" else version))
    notes.section("software", *lines)


def torch_build() -> str:
    """`CUDA 13.0`, `ROCm 7.1` or `CPU only`: torch's version file is read, nothing imported."""
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec is not None else None
    try:
        text = Path(origin or "").with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "build unknown"
    for key, label in (("cuda", "CUDA"), ("hip", "ROCm")):
        if found := re.search(rf"^{key}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.M):
            return f"{label} {found[1]}"
    return "CPU only"


def _models(notes: _Notes, paths: Paths, env: Mapping[str, str]) -> None:
    lines = []
    try:
        settings = Settings.resolve(paths=paths, env=env)
    except MimoError as error:
        notes.broken(f"the settings cannot be read: {error.message}", error.hint)
        settings = Settings()
    if settings.model is not None:
        origin = settings.origin.get("model", "")
        there = settings.model.exists()
        lines.append(("chosen", f"{settings.model} (from {origin})"))
        if not there:
            notes.broken(f"the model {settings.model} does not exist", f"change {origin}")
    packs = sorted(_pack_name(p.parent) for p in paths.packs_dir.glob(f"*/{PACK_MANIFEST}"))
    lines.append(("packs", ", ".join(packs) or f"none in {paths.packs_dir}"))
    found = (p.parent for p in paths.cache_dir.glob(f"demo/*/{PACK_MANIFEST}"))
    demo = sorted(p for p in found if not p.name.startswith("."))  # .build-*: being made
    lines.append(("demo model", str(demo[0]) if demo else "not built: `mimo demo` fetches it"))
    notes.section("models", *lines)


def _pack_name(pack: Path) -> str:
    with suppress(MimoError):
        return named(pack.name, ModelConfig.from_dir(pack))
    return pack.name


def _predictions(notes: _Notes, facts: hardware.Hardware, paths: Paths) -> None:
    """The last answer beside what was predicted for it; nothing on a machine without answers."""
    mine = here.machine_key(facts)
    found = [run for run in runs.recent(paths.data_dir, runs.LIMIT) if run.machine == mine]
    judged = [(run, findings) for run in found if (findings := verdicts.judge(run))]
    if not judged:
        return
    run, findings = judged[-1]
    rates = "calibrated" if run.calibrated else "assumed rates"
    lines = [("last answer", f"{run.at[:16].replace('T', ' ')}, {run.model}, {rates}")]
    for finding in findings:
        predicted = span([finding.low, finding.high])
        lines.append(
            (finding.what, f"{finding.measured:.1f} tokens/s measured, {predicted} predicted")
        )
        if finding.off:
            fix = "see `mimo plan --check`" if run.calibrated else "run `mimo plan --calibrate`"
            notes.warn(finding.sentence(), fix)
    notes.section("predictions", *lines)


def _terminal(notes: _Notes, env: Mapping[str, str]) -> None:
    size = shutil.get_terminal_size()
    encoding = (sys.stdout.encoding or "unknown").lower()
    colour = "off (NO_COLOR)" if env.get("NO_COLOR") else env.get("COLORTERM") or "basic"
    terminal = sys.stdout.isatty()
    notes.section(
        "terminal",
        ("kind", env.get("TERM", "none") if terminal else "output is piped"),
        ("size", f"{size.columns} x {size.lines}"),
        ("colour", colour),
        ("encoding", encoding),
    )
    if encoding.replace("-", "") not in ("utf8", "utf8sig"):
        notes.warn(f"the terminal's encoding is {encoding}", "set LANG=C.UTF-8")
    if terminal and (size.columns < 60 or size.lines < 16):
        notes.warn(
            f"the terminal is {size.columns} x {size.lines}", "the chat window wants 60 x 16"
        )
