"""The controller in every regime: what passes and drafts cost, how often they are right, the noise.

Time is simulated: a clock that moves by what a pass of so many drafts takes. Everything is seeded.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from mimo_local.draft_control import DraftController, Mean

STEPS = 3


@dataclass
class Machine:
    """Passes and drafts that take their time."""

    passes: tuple[float, ...]
    """Time of a pass with 0, 1, 2, 3 drafts."""
    draft: float
    right: tuple[float, ...]
    """Chance of each step's draft, if those before it are right."""
    noise: float = 0.0
    says: float | None = None
    """What the drafter says its chances are; None: the truth."""
    seed: int = 0
    now: float = 0.0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def clock(self) -> float:
        return self.now

    def answer(self, controller: DraftController, tokens: int) -> float:
        """Tokens per second of one answer."""
        made, start = 0, self.now
        controller.begin_sequence()
        controller.verified()
        controller.judge(right=False)
        while made < tokens:
            right = list[bool]()
            controller.begin(min(STEPS, tokens - made - 1))
            while controller.more():
                self.now += self.draft * self.random.uniform(0.9, 1.1)
                chance = self.right[len(right)] + 0.1 * self.random.uniform(-1, 1)
                chance = min(max(chance, 0.001), 0.999)
                hit = self.random.random() < chance
                if not controller.keep(chance if self.says is None else self.says):
                    break
                right.append(hit)
            controller.verify()
            took = self.passes[len(right)] * max(0.3, self.random.gauss(1, self.noise))
            self.now += took
            controller.verified()
            accepted = (*right, False).index(False)
            for i in range(accepted + 1):
                controller.judge(right=i < accepted)
            made += accepted + 1
        controller.end_sequence()
        return made / (self.now - start)


REGIMES: dict[str, tuple[tuple[float, ...], float, tuple[float, ...]]] = {
    "a small model, half right": ((4.9, 5.6, 6.4, 7.2), 0.8, (0.45, 0.43, 0.45)),
    "experts at hand, none shared": ((10, 16, 22, 27.5), 0.7, (0.78, 0.78, 0.78)),
    "experts at hand, many shared": ((10, 13.5, 16.5, 19), 0.7, (0.78, 0.78, 0.78)),
    "experts at hand, some shared": ((10, 14.5, 18.5, 22), 0.7, (0.7, 0.7, 0.7)),
    "experts in slow memory": ((100, 150, 195, 235), 3, (0.78, 0.78, 0.78)),
    "experts on disk": ((100, 185, 262, 335), 3, (0.78, 0.78, 0.78)),
    "experts on disk, seldom right": ((100, 185, 262, 335), 3, (0.3, 0.3, 0.3)),
    "as good as without": ((100, 175, 246, 310), 3, (0.78, 0.78, 0.78)),
    "drafts for nothing": ((100, 105, 110, 115), 1, (0.8, 0.8, 0.8)),
    "never right": ((100, 105, 110, 115), 1, (0.05, 0.05, 0.05)),
    "a second row costs three": ((10, 30, 50, 70), 1, (0.1, 0.1, 0.1)),
}
SEEDS = range(12)


def speed(name: str, noise: float, make: Callable[[Machine], DraftController], n: int) -> float:
    """Mean tokens per second of one answer of n tokens, the controller knowing nothing before."""
    rates = []
    for seed in SEEDS:
        machine = Machine(*REGIMES[name], noise=noise, seed=seed)
        rates.append(machine.answer(make(machine), n))
    return statistics.fmean(rates)


@pytest.mark.parametrize("noise", [0.03, 0.15])
@pytest.mark.parametrize("name", REGIMES)
def test_it_never_loses_and_comes_near_the_best_depth(name: str, noise: float) -> None:
    fixed = [
        speed(name, noise, lambda m, d=depth: DraftController(STEPS, fixed=d, clock=m.clock), 400)
        for depth in range(STEPS + 1)
    ]
    found = speed(name, noise, lambda m: DraftController(STEPS, clock=m.clock), 400)
    assert found >= 0.98 * fixed[0]
    assert found >= 0.95 * max(fixed)


@pytest.mark.parametrize("name", ["experts on disk, seldom right", "a second row costs three"])
def test_drafts_that_say_they_are_right_and_are_not_are_found_out(name: str) -> None:
    passes, draft, right = REGIMES[name]
    rates = []
    for seed in SEEDS:
        machine = Machine(passes, draft, right, says=0.9, seed=seed, noise=0.05)
        rates.append(machine.answer(DraftController(STEPS, clock=machine.clock), 600))
    assert statistics.fmean(rates) >= 0.975 / passes[0]


def test_it_notices_when_the_machine_changes() -> None:
    """Experts come into memory in the middle, and are thrown out again."""
    good, bad = REGIMES["experts at hand, many shared"], REGIMES["experts on disk, seldom right"]
    machine = Machine(*bad, noise=0.05, seed=3)
    controller = DraftController(STEPS, clock=machine.clock)
    machine.answer(controller, 600)
    machine.passes, machine.draft, machine.right = good
    machine.answer(controller, 600)
    late = machine.answer(controller, 400)
    assert late >= 1.2 / good[0][0]
    machine.passes, machine.draft, machine.right = bad
    machine.answer(controller, 300)
    assert machine.answer(controller, 400) >= 0.97 / bad[0][0]


def test_a_sequence_whose_drafts_are_worse_is_told_from_the_others() -> None:
    machine = Machine(*REGIMES["experts at hand, many shared"], noise=0.02, seed=5, says=0.78)
    controller = DraftController(STEPS, clock=machine.clock)
    machine.answer(controller, 500)
    machine.right = (0.1, 0.1, 0.1)
    machine.answer(controller, 400)
    assert controller.report().tokens_per_pass < 1.1
    assert machine.answer(controller, 400) >= 0.96 / 10


def test_a_fixed_depth_is_what_it_says() -> None:
    for depth in range(STEPS + 1):
        machine = Machine((1, 1, 1, 1), 0.1, (0.5, 0.5, 0.5), seed=depth)
        controller = DraftController(STEPS, fixed=depth, clock=machine.clock)
        machine.answer(controller, 200)
        report = controller.report()
        assert report.by_drafts[depth] >= report.passes - 3  # the last tokens leave no room
        assert report.note == f"always {depth}"


def test_the_report_counts_tokens_and_says_why() -> None:
    machine = Machine(*REGIMES["drafts for nothing"], seed=1)
    controller = DraftController(STEPS, clock=machine.clock)
    machine.answer(controller, 400)
    report = controller.report()
    assert 400 <= report.passes + sum(report.accepted) <= 403
    assert report.seconds == pytest.approx(machine.now, rel=1e-6)
    assert report.plain_s == pytest.approx(100, rel=0.01)
    assert "it pays" in report.note
    machine = Machine(*REGIMES["a second row costs three"], seed=1)
    controller = DraftController(STEPS, clock=machine.clock)
    machine.answer(controller, 100)
    assert "it does not pay" in controller.report().note
    assert DraftController(STEPS).report().note == ""


def test_the_first_draft_after_a_pause_is_not_what_drafts_take() -> None:
    """It catches up with the rows it missed: twenty times as long, and soon over."""
    machine = Machine(*REGIMES["experts at hand, many shared"], seed=1)
    machine.passes, paused = (10, 13.5, 16.5, 19), [True]

    class Late(DraftController):
        def begin(self, room: int) -> None:
            super().begin(room)
            paused.append(not self._made_before)

        def keep(self, p: float) -> bool:
            if paused[-1]:
                machine.now += 14
            return super().keep(p)

    assert machine.answer(Late(STEPS, clock=machine.clock), 400) >= 1.2 / 10


def test_one_hiccup_is_no_measurement() -> None:
    mean = Mean()
    for i in range(20):
        mean.add(1.0, i)
    mean.add(1000.0, 20)
    assert mean.mean < 1.1
