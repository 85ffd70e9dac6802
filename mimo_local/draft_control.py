"""How many drafts the next pass verifies: as many as pay, by what passes have cost so far.

A draft costs its MTP layer's time and makes the pass that verifies it longer: more rows want more
experts, which may be on disk. It is worth the time a token takes if it is accepted. So a draft is
verified if (probability that it and those before it are accepted) x (time of a token now) is more
than the row adds; and it is made if that can be expected. Everything is measured while running: the
time of a pass by its number of rows, of a draft by its step, acceptance by the probability that the
MTP layer gave it. What is not known is tried within a budget of time. Pure arithmetic but for a
clock. One per engine; `generate` asks and reports.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Final

from mimo_local.events import DraftFigures

PROBING: Final = 0.01
"""Share of the time that may be lost on trying what is not known."""
LOAN: Final = 1.5
"""Passes that may be lost before anything has been earned: trying costs that, once."""
WARM: Final = 4
"""Passes without drafts at the beginning: caches of all kinds are cold."""
FRESH: Final = 256
"""Tokens after which a time that was not measured again is not believed any more."""
REST: Final = 24
"""Tokens between two trials at least."""
TRIAL: Final = 2
"""Passes of a trial."""
DOUBT: Final = 0.25
"""Standard errors of a difference of times that are added to it."""
SURE: Final = 4
"""Passes after which a time is believed more than the one of a draft less."""
WINDOW: Final = 24
"""Measurements an average goes over, about."""
TRUST: Final = 5
"""Drafts that the probability which an MTP layer gives counts for."""
EDGES: Final = (0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95)
"""Between these probabilities of a draft acceptance is counted together."""


class Mean:
    """An average over about the last WINDOW values, and how far they spread."""

    def __init__(self) -> None:
        self.n = 0
        """Values seen, up to WINDOW."""
        self.mean = self._square = 0.0
        self.seen_at = 0
        """Token count at the last value."""

    def add(self, value: float, now: int) -> None:
        """One more value, after `now` tokens."""
        if now - self.seen_at > FRESH:
            self.n = 0
        self.n = min(self.n + 1, WINDOW)
        if self.n > 3:  # one hiccup of the machine is no measurement
            value = min(value, self.mean + 4 * max(self._square, 1e-12) ** 0.5 + 0.25 * self.mean)
        off = value - self.mean
        self.mean += off / self.n
        self._square += (off * (value - self.mean) - self._square) / self.n
        self.seen_at = now

    @property
    def spread(self) -> float:
        """Standard deviation of a value over the mean."""
        return self._square**0.5 / self.mean if self.mean else 0.0

    def doubt(self) -> None:
        """Let what comes next count as much as all there was."""
        self.n = min(self.n, 2)


class Acceptance:
    """Whether drafts were accepted, by step and by the probability they came with."""

    def __init__(self, steps: int) -> None:
        # The prior believes the MTP layers: they are trained to be right about themselves.
        self._counts = [[[0.0, 0.0] for _ in range(len(EDGES) + 1)] for _ in range(steps)]
        self._lately = 1.0

    def begin(self) -> None:
        """Another sequence: how it differs from others is not known."""
        self._lately = 1.0

    def chance(self, step: int, p: float) -> float:
        """That a draft is accepted if all before it are."""
        accepted, made = self._counts[step][bisect_right(EDGES, p)]
        return min(1.0, (accepted + TRUST * p) / (made + TRUST) * self._lately)

    def add(self, step: int, p: float, *, accepted: bool) -> None:
        """A draft was judged."""
        expected = self.chance(step, p)
        # Sequences differ: what this one had lately, over what was expected of it.
        self._lately *= 1 + 0.03 * (accepted - expected)
        self._lately = min(max(self._lately, 0.5), 1.5)
        counts = self._counts[step][bisect_right(EDGES, p)]
        counts[0] = 0.97 * counts[0] + accepted
        counts[1] = 0.97 * counts[1] + 1


class DraftController:
    """Asked before each draft and after it, told how the pass went: see `generate`.

    For a sequence begin_sequence and end_sequence; for each pass begin, then more and keep for
    each draft, verify, verified, and judge for each id that is drawn.
    """

    def __init__(
        self,
        most: int,
        *,
        fixed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`most`: MTP layers; `fixed`: always so many drafts, for measuring."""
        self.most, self.fixed = most, fixed
        self.figures = DraftFigures.none(most)
        self._clock = clock
        self._pass_s = [Mean() for _ in range(most + 1)]
        """Seconds of the model's pass, by the drafts it verifies."""
        self._draft_s = [Mean() for _ in range(most)]
        self._rough = [False] * most
        """Whether all that is known of a step's draft is one that had to catch up."""
        self._acceptance = Acceptance(most)
        self._chances = [deque[float](maxlen=32) for _ in range(most)]
        """Chances of the last drafts, by step."""
        self._spent, self._won = 0.0, 0.0
        """Seconds and tokens, fading."""
        self._tokens = 0
        self._credit: float | None = None
        """Seconds that may be lost on trials; None before anything is known."""
        self._trials: list[int] = []
        """What the next passes have to verify, to learn what it costs."""
        self._tried_at = -REST
        self._condition: Hashable = None
        # Of the pass under way:
        self._room, self._forced = 0, 0
        self._drafts: list[float] = []
        self._made = self._made_before = 0
        """Drafts made, dropped ones too, in this pass and in the one before."""
        self._chain, self._drafting_s, self._took = 1.0, 0.0, 0.0
        self._mark: float | None = None
        self._accepted = self._judged = 0

    # ---- asked by the loop -----------------------------------------------------------------------

    def begin_sequence(self, condition: Hashable = None) -> None:
        """Another answer begins. `condition`: what the tiers hold; if it changes, times are old."""
        self.figures = DraftFigures.none(self.most)
        self._acceptance.begin()
        self._drafts.clear()
        self._mark, self._took = None, 0.0
        if condition != self._condition:
            self._condition = condition
            for mean in self._pass_s:
                mean.doubt()

    def end_sequence(self) -> None:
        """The answer is over, perhaps in the middle of a pass."""
        self._observe()

    def begin(self, room: int) -> None:
        """A pass begins that may verify up to `room` drafts."""
        self._observe()
        self._room = min(room, self.most if self.fixed is None else self.fixed)
        self._forced = -1 if self.fixed is None else self._room
        if self.fixed is None:
            if not self._trials and self._room:
                self._trials = self._trial()
            if self._trials:
                self._forced = min(self._trials.pop(), self._room)
        self._drafts.clear()
        self._made_before, self._made = self._made, 0
        self._chain, self._drafting_s = 1.0, 0.0
        self._mark = self._clock()

    def more(self) -> bool:
        """Whether to make another draft."""
        step = len(self._drafts)
        if step >= self._room or self._chain <= 0:
            return False
        return step < self._forced if self._forced >= 0 else self._promise(step, self._chain) > 0

    def keep(self, p: float) -> bool:
        """Whether to verify the draft just made, which came with this probability.

        False: it is dropped, and there are no more.
        """
        step = len(self._drafts)
        self._made += 1
        took = self._lap()
        self._drafting_s += took
        self._learn_draft(step, took)
        chance = self._acceptance.chance(step, p)
        self._chances[step].append(chance)
        chain = self._chain * chance
        if self._forced < 0:
            won = chain * self.token_s - self._added(step) + self._later(step + 1, chain)
            if won <= 0:
                self._chain = 0.0
                return False
        self._chain = chain
        self._drafts.append(p)
        return True

    def _learn_draft(self, step: int, took: float) -> None:
        """A draft after a pass without one catches up with the rows between: not its usual time."""
        known = self._draft_s[step]
        late = step >= self._made_before
        if late and known.n:
            return
        if known.n and self._rough[step]:
            known.n = 0
        self._rough[step] = late
        known.add(took, self._tokens)

    def verify(self) -> None:
        """The model's pass begins."""
        self._mark = self._clock()

    def verified(self) -> None:
        """The model's pass is over; that of the prompt does not count."""
        self._accepted = self._judged = 0
        self._took = 0.0 if self._mark is None else self._lap()

    def judge(self, *, right: bool) -> None:
        """An id was drawn: whether the next draft, if there is one, is that."""
        self._accepted += right
        self._judged = min(self._judged + 1, len(self._drafts))

    def _observe(self) -> None:
        """Learn from the pass before, if there was one."""
        if not self._took:
            return
        n, tokens = len(self._drafts), self._accepted + 1
        for step, p in enumerate(self._drafts[: self._judged]):
            self._acceptance.add(step, p, accepted=step < self._accepted)
        seconds = self._took + self._drafting_s
        if self._credit is None:
            if self._pass_s[0].n >= WARM:
                self._credit = LOAN * self._base
        else:
            if self._forced >= 0:
                self._credit -= max(0.0, seconds - tokens * self.token_s)
            most = LOAN * self._base
            self._credit = min(max(self._credit, -2 * most) + PROBING * seconds, most)
        self._pass_s[n].add(self._took, self._tokens)
        self._tokens += tokens
        self._spent = 0.97 * self._spent + seconds
        self._won = 0.97 * self._won + tokens
        self.figures = self.figures.plus(n, self._judged, self._accepted, seconds)
        self._took = 0.0

    def report(self) -> DraftFigures:
        """This answer's figures, and why it drafts as deep as it does."""
        return replace(self.figures, plain_s=self._base, note=self._why())

    def _why(self) -> str:
        """One line for people."""
        if self.fixed is not None:
            return f"always {self.fixed}"
        one, base = self._pass_s[1], self._base
        if not one.n:
            return "too short an answer to try it" if self._pass_s[0].n else ""
        longer = ((one.mean + self._draft_s[0].mean) / base - 1) if base else 0.0
        chances = self._chances[0]
        right = sum(chances) / len(chances) if chances else 0.0
        return (
            f"a draft makes a pass {max(0.0, longer):.0%} longer and is right {right:.0%} "
            f"of the time: {'it pays' if right > longer else 'it does not pay'}"
        )

    # ---- what it knows ---------------------------------------------------------------------------

    @property
    def token_s(self) -> float:
        """Seconds a token takes as things are: never more than without drafts."""
        lately = self._spent / self._won if self._won else 0.0
        return min(lately, self._base) if self._pass_s[0].n else lately

    @property
    def _base(self) -> float:
        return self._pass_s[0].mean

    def _added(self, step: int) -> float:
        """Seconds that verifying draft `step` adds to a pass, with a doubt where it is not sure."""
        before, after = self._pass_s[step], self._pass_s[step + 1]
        # More rows share more experts, so each adds less than the one before.
        hope = self._added(step - 1) if step else float("inf")
        if not (before.n and after.n):
            return hope
        noise = self._pass_s[0].spread
        doubt = noise * math.hypot(before.mean / before.n**0.5, after.mean / after.n**0.5)
        added = max(0.0, after.mean - before.mean) + DOUBT * doubt
        sure = after.n >= SURE and self._tokens - after.seen_at < FRESH
        return added if sure else min(added, hope)

    def _promise(self, step: int, chain: float) -> float:
        """Seconds won by making draft `step`, as far as drafts like the last ones tell."""
        lately, added = self._lately(step), self._added(step)
        if not lately or added == float("inf"):
            return -1.0
        worth = chain * self.token_s
        # What may follow it is the same for all, roughly.
        later = self._later(step + 1, chain * sum(lately) / len(lately))
        won = sum(max(0.0, chance * worth - added + later) for chance in lately) / len(lately)
        return won - self._draft_s[min(step, self._drafted)].mean

    def _later(self, step: int, chain: float) -> float:
        """Seconds won by the best number of drafts from `step` on; 0: by none.

        One more may cost much and the next one little: it is the sum that counts.
        """
        best = total = 0.0
        for k in range(step, self._room):
            lately = self._lately(k)
            chain *= sum(lately) / len(lately) if lately else 0.0
            draft_s = self._draft_s[min(k, self._drafted)].mean
            total += chain * self.token_s - self._added(k) - draft_s
            best = max(best, total)
        return best

    def _lately(self, step: int) -> deque[float]:
        """Chances of the last drafts of a step, or of the nearest one before it."""
        known = (c for c in reversed(self._chances[: step + 1]) if c)
        return next(known, self._chances[0])

    @property
    def _drafted(self) -> int:
        """The deepest step whose time is known."""
        return max(k for k, mean in enumerate(self._draft_s) if mean.n or not k)

    def _trial(self) -> list[int]:
        """Passes to spend on what is not known or may have changed, if that can be afforded."""
        if self._credit is None or self._tokens - self._tried_at < REST:
            return []
        lone, one = self._pass_s[0], self._pass_s[1]
        drafted = self._tokens - max(mean.seen_at for mean in self._pass_s[1:])
        if one.n and self._tokens - lone.seen_at > FRESH * 3 // 4 > drafted:
            self._tried_at = self._tokens
            return [0] * TRIAL
        if one.n and drafted <= FRESH // 4:
            return []
        # An old time may be wrong by any factor: if it is right, the credit shows it afterwards.
        longest = 2 * self._base
        loss = (min(one.mean, longest) if one.n else longest) - 1.5 * self.token_s
        if TRIAL * max(loss, 0.0) > self._credit:
            return []
        self._tried_at = self._tokens
        return [1] * TRIAL

    def _lap(self) -> float:
        before, now = self._mark, self._clock()
        self._mark = now
        return 0.0 if before is None else now - before
