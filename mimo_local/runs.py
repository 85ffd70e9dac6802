"""What answers cost here, beside what the plan had predicted: one JSON line per answer.

The file is in the user's data folder, bounded, and holds no text and no path: counts, seconds,
bytes. Written by the engine's thread after the answer is out; a folder that cannot be written means
no record, never a failed answer. `verdicts` compares, `mimo plan --check` and `mimo doctor` show.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from mimo_local.config import ModelConfig
from mimo_local.events import Stats
from mimo_local.experts.meters import Meters
from mimo_local.hardware import peak_rss
from mimo_local.plan import Plan
from mimo_local.plan.here import write_whole
from mimo_local.plan.placement import PROGRAM
from mimo_local.plan.planner import forecast

FILE: Final = "runs.jsonl"
VERSION: Final = 1
LIMIT: Final = 256 << 10
"""Bytes at which the older half of the file is dropped: some 300 answers."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One half of an answer, reading or writing; experts and bytes as the meters counted them."""

    tokens: int
    seconds: float
    wanted: int = 0
    missed: int = 0
    """Of these, not in memory when they were asked for."""
    disk_bytes: int = 0
    wait_s: float = 0.0

    @property
    def hit(self) -> float | None:
        """Share of wanted experts that was in VRAM or RAM; None if nobody counted."""
        return 1 - self.missed / self.wanted if self.wanted else None

    @property
    def tokens_per_s(self) -> float:
        """0.0 for nothing."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Predicted:
    """One way a token could have gone, by the plan: the worst routing or the best."""

    tokens_per_s: float
    hit: float
    disk_bytes: float
    resident_s: float
    expert_s: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One answer."""

    at: str
    """UTC, ISO, to the second."""
    machine: str
    model: str
    pack: str
    kernel: str
    calibrated: bool
    """Whether the prediction used rates measured with this pack on this machine."""
    prefill: Cost
    decode: Cost
    predicted: tuple[Predicted, ...]
    """Decode, from the worst routing to the best."""
    predicted_prefill_s: float
    bound: str
    peak_rss: int
    planned_ram: int


class Recorder:
    """Writes a `Run` for each answer of one loaded model. Three calls by the engine per answer."""

    def __init__(
        self,
        folder: Path,
        *,
        config: ModelConfig,
        plan: Plan,
        meters: Callable[[], Meters],
        machine: str,
        model: str,
        pack: str,
    ) -> None:
        """`folder`: the user's data folder; `meters`: a copy of the store's counters."""
        self.path = folder / FILE
        self._config, self._plan, self._meters = config, plan, meters
        self._names = {"machine": machine, "model": model, "pack": pack}
        self._before = self._between = meters()

    def begin(self) -> None:
        """An answer's prompt is about to be read."""
        self._before = self._between = self._meters()

    def first_token(self) -> None:
        """The prompt has been read."""
        self._between = self._meters()

    def end(self, stats: Stats) -> None:
        """The answer is over; appends its line. Nothing is written for an answer without tokens."""
        if not stats.completion_tokens:
            return
        with contextlib.suppress(OSError):
            append(self.path, self._run(stats, self._meters()))

    def _run(self, stats: Stats, after: Meters) -> Run:
        new = stats.prompt_tokens - stats.cached_tokens
        steps = stats.completion_tokens - 1
        depth = max(1, stats.prompt_tokens + steps // 2)
        found = forecast(self._config, self._plan, tokens=max(1, new), depth=depth)
        ways = tuple(
            Predicted(d.tokens_per_s, d.hit, d.disk_bytes, d.resident_s, d.expert_s, d.wait_s)
            for d in found.decode
        )
        return Run(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            **self._names,
            kernel=stats.kernel,
            calibrated=self._plan.budget.calibration is not None,
            prefill=_cost(new, stats.prefill_s, self._between.since(self._before)),
            decode=_cost(steps, stats.decode_s, after.since(self._between)),
            predicted=ways,
            predicted_prefill_s=found.prefill.seconds,
            bound=found.prefill.bound,
            peak_rss=peak_rss(),
            planned_ram=PROGRAM
            + sum(row.ram for row in self._plan.table if row.name != "left alone"),
        )


def _cost(tokens: int, seconds: float, spent: Meters) -> Cost:
    missed = spent.misses + spent.staged_hits
    return Cost(tokens, seconds, spent.wanted, missed, spent.disk_bytes, spent.wait_s)


# -- the file --------------------------------------------------------------------------------------


def append(path: Path, run: Run) -> None:
    """Add a line; at LIMIT bytes the older half goes. OSError if it cannot be written."""
    line = json.dumps({"v": VERSION, **_rounded(asdict(run))}, separators=(",", ":")) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write in append mode: two engines at once do not mix their lines.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, line.encode())
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    if size > LIMIT:
        kept = path.read_bytes()[-LIMIT // 2 :].partition(b"\n")[2]
        write_whole(path, kept.decode("utf-8", errors="replace"))


def recent(folder: Path, count: int) -> list[Run]:
    """The last `count` runs, oldest first; lines that are damaged or of another version are not."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = (_parsed(line) for line in lines)
    return [run for run in found if run is not None][-count:] if count > 0 else []


def _parsed(line: str) -> Run | None:
    try:
        data = json.loads(line)
        if data.pop("v") != VERSION:
            return None
        prefill, decode = (Cost(**data.pop(name)) for name in ("prefill", "decode"))
        ways = tuple(Predicted(**way) for way in data.pop("predicted"))
        run = Run(prefill=prefill, decode=decode, predicted=ways, **data)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    costs = [getattr(cost, f.name) for cost in (prefill, decode) for f in fields(Cost)]
    speeds = [getattr(way, f.name) for way in ways for f in fields(Predicted)]
    numbers = [*costs, *speeds, run.predicted_prefill_s, run.peak_rss, run.planned_ram]
    sound = all(isinstance(n, (int, float)) and n >= 0 for n in numbers) and bool(ways)
    texts = (run.at, run.machine, run.model, run.pack, run.kernel, run.bound)
    return run if sound and all(isinstance(text, str) for text in texts) else None


def _rounded(value: Any) -> Any:
    """Floats to six digits: a line stays short."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
