"""What is seen until the engine answers: the stage, a bar, how much is done and how long it takes.

Estimates the remaining time itself where the loader gives none.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import ProgressBar, Static

from mimo_local.events import Progress
from tui.widgets.figures import amount, duration, percent, plain

# An estimate from less than this is worse than none.
MIN_SECONDS, MIN_SHARE = 1.0, 0.02


class Eta:
    """Seconds left of the stage: the loader's own figure, else a straight line from its start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._start = (0.0, 0)

    def of(self, progress: Progress) -> float | None:
        """Feed every progress event; None while there is nothing honest to say."""
        now = self._clock()
        if progress.stage != self._stage:
            self._stage, self._start = progress.stage, (now, progress.done)
        if progress.eta_s is not None:
            return progress.eta_s
        elapsed, gained = now - self._start[0], progress.done - self._start[1]
        if progress.total <= 0 or elapsed < MIN_SECONDS or gained < MIN_SHARE * progress.total:
            return None
        return elapsed * (progress.total - progress.done) / gained


class LoadPanel(Vertical):
    """Title, stage, bar and figures of the load."""

    def __init__(self) -> None:
        super().__init__()
        self._eta = Eta()

    def compose(self) -> ComposeResult:
        """An endless bar until the loader says how much there is."""
        yield Static("Loading the model", classes="title")
        yield Static("starting the engine", classes="stage", markup=False)
        yield ProgressBar(total=None, show_percentage=False, show_eta=False)
        yield Static("", classes="figures", markup=False)

    def show(self, progress: Progress) -> None:
        """Show one event."""
        eta = self._eta.of(progress)
        figures = amount(progress.done, progress.total, progress.unit)
        if progress.total > 0:
            figures += f" · {percent(progress.done, progress.total)}%"
        if eta is not None:
            figures += f" · {duration(eta)} left"
        self.query_one(".stage", Static).update(plain(progress.stage))
        self.query_one(".figures", Static).update(figures)
        bar = self.query_one(ProgressBar)
        bar.update(total=progress.total or None, progress=progress.done)
