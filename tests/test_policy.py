"""Expert policies against slow models: lists that are sorted and searched from the start."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.experts.oracle import Belady
from mimo_local.experts.policy import AgedFrequency, ExpertPolicy, Key, Lru, PerLayer, PinnedLru

LAYERS = (1, 2, 5)
PINNED = [(1, 0), (2, 1), (5, 4)]
keys = st.tuples(st.sampled_from(LAYERS), st.integers(0, 4))
busies = st.frozensets(keys, max_size=6)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), keys),
        st.tuples(st.just("admits"), keys, busies),
        st.tuples(st.just("insert"), keys, busies),
        st.tuples(st.just("remove"), keys),
        st.tuples(st.just("resize"), st.integers(0, 9), busies),
        st.tuples(st.just("end_of_step")),
    ),
    max_size=80,
)


class Slow:
    """Everything a policy may be asked, by sorting a list of the keys held."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: list[Key] = []  # in order of their last touch or insertion

    def order(self) -> list[Key]:
        return self.held

    def group(self, key: Key) -> list[Key]:
        """Those that compete with `key`, first victim first."""
        return self.order()

    def room(self, key: Key) -> int:
        return self.capacity

    def seen(self, key: Key) -> None:
        if key in self.held:
            self.held.remove(key)
            self.held.append(key)

    def touch(self, key: Key) -> bool:
        self.seen(key)
        return key in self.held

    def victim(self, key: Key, busy: frozenset[Key]) -> Key | None:
        return next((k for k in self.group(key) if k not in busy), None)

    def full(self, key: Key) -> bool:
        return len(self.group(key)) >= self.room(key)

    def admits(self, key: Key, busy: frozenset[Key]) -> bool:
        return self.room(key) > 0

    def insert(self, key: Key, busy: frozenset[Key]) -> Key | None:
        if key in self.held:
            return None
        victim = None
        if self.full(key):
            victim = self.victim(key, busy)
            if victim is None:
                raise ValueError
            self.held.remove(victim)
        self.held.append(key)
        return victim

    def remove(self, key: Key) -> None:
        if key not in self.held:
            raise KeyError
        self.held.remove(key)

    def resize(self, capacity: int, busy: frozenset[Key]) -> list[Key]:
        victims = self.surplus(capacity, busy)
        self.held = [key for key in self.held if key not in victims]
        self.capacity = capacity
        return victims

    def surplus(self, capacity: int, busy: frozenset[Key]) -> list[Key]:
        n = max(0, len(self.held) - capacity)
        victims = [key for key in self.order() if key not in busy][:n]
        if len(victims) < n:
            raise ValueError
        return victims

    def end_of_step(self) -> None:
        pass


class SlowLayers(Slow):
    def order(self) -> list[Key]:
        return self.in_turn(self.held)

    @staticmethod
    def in_turn(keys: list[Key]) -> list[Key]:
        """By rank within their layer, then by layer."""
        return sorted(keys, key=lambda k: (sum(o[0] == k[0] for o in keys[: keys.index(k)]), k[0]))

    def group(self, key: Key) -> list[Key]:
        return [k for k in self.held if k[0] == key[0]]

    def room(self, key: Key) -> int:
        return len(range(LAYERS.index(key[0]), self.capacity, len(LAYERS)))

    def surplus(self, capacity: int, busy: frozenset[Key]) -> list[Key]:
        was, self.capacity = self.capacity, capacity
        victims: list[Key] = []
        try:
            for layer in LAYERS:
                mine = self.group((layer, 0))
                n = max(0, len(mine) - self.room((layer, 0)))
                free = [key for key in mine if key not in busy][:n]
                if len(free) < n:
                    raise ValueError
                victims += free
        finally:
            self.capacity = was
        return self.in_turn(victims)


class SlowPinned(Slow):
    def order(self) -> list[Key]:
        pinned = [key for key in PINNED if key in self.held]
        return [key for key in self.held if key not in PINNED] + pinned[::-1]

    def victim(self, key: Key, busy: frozenset[Key]) -> Key | None:
        return next((k for k in self.order() if k not in busy and k not in PINNED), None)

    def admits(self, key: Key, busy: frozenset[Key]) -> bool:
        return sum(k in PINNED for k in self.held) < self.capacity


class SlowFrequency(Slow):
    """Halves every step, so that all scores are exact sums of powers of two."""

    def __init__(self, capacity: int, margin: float, per_layer: int) -> None:
        super().__init__(capacity)
        self.margin, self.per_layer = margin, per_layer
        self.counts: dict[Key, float] = {}
        self.touched: list[Key] = []
        self.taken: list[int] = []

    def order(self) -> list[Key]:
        return sorted(
            self.held,
            key=lambda k: (self.counts[k], self.touched.index(k) if k in self.touched else -1, k),
        )

    def touch(self, key: Key) -> bool:
        self.counts[key] = self.counts.get(key, 0) + 1
        self.touched = [k for k in self.touched if k != key] + [key]
        return key in self.held

    def admits(self, key: Key, busy: frozenset[Key]) -> bool:
        if self.taken.count(key[0]) >= self.per_layer:
            return False
        if not self.full(key):
            return True
        victim = self.victim(key, busy)
        return victim is not None and self.counts.get(key, 0) > self.margin * self.counts[victim]

    def insert(self, key: Key, busy: frozenset[Key]) -> Key | None:
        new = key not in self.held
        victim = super().insert(key, busy)
        if new:
            self.counts.setdefault(key, 0)
            self.taken.append(key[0])
        return victim

    def end_of_step(self) -> None:
        self.taken = []
        self.counts = {key: count / 2 for key, count in self.counts.items()}


def answer(policy: object, name: str, *args: object) -> object:
    try:
        return getattr(policy, name)(*args)
    except (KeyError, ValueError) as error:
        return type(error)


def hits(policy: ExpertPolicy, wanted: list[Key]) -> int:
    found = 0
    for key in wanted:
        if policy.touch(key):
            found += 1
        elif policy.admits(key):
            policy.insert(key)
    return found


Pair = Callable[[int], tuple[ExpertPolicy, Slow]]
PAIRS: dict[str, Pair] = {
    "lru": lambda n: (Lru(n), Slow(n)),
    "layers": lambda n: (PerLayer(n, LAYERS, Lru), SlowLayers(n)),
    "pinned": lambda n: (PinnedLru(n, PINNED), SlowPinned(n)),
    "frequency": lambda n: (
        AgedFrequency(n, half_life=1, margin=1.5, per_layer=2),
        SlowFrequency(n, 1.5, 2),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None)
@given(capacity=st.integers(0, 8), asked=operations)
def test_a_policy_answers_as_its_slow_model(
    name: str, capacity: int, asked: list[tuple[object, ...]]
) -> None:
    fast, slow = PAIRS[name](capacity)
    for what, *args in asked:
        assert answer(fast, str(what), *args) == answer(slow, str(what), *args), (what, args)
        assert list(fast) == slow.order()
        assert len(fast) == len(slow.held) <= max(fast.capacity, 0)
        assert fast.capacity == slow.capacity
        assert all(key in fast for key in slow.held)


@pytest.mark.parametrize("name", PAIRS)
def test_no_capacity_holds_nothing_and_one_holds_the_last(name: str) -> None:
    fast, _ = PAIRS[name](0)
    assert not fast.touch((1, 3)) and not fast.admits((1, 3))
    with pytest.raises(ValueError, match="no room"):
        fast.insert((1, 3))
    with pytest.raises(ValueError, match="-1"):
        fast.resize(-1)
    assert fast.resize(1) == [] and fast.insert((1, 3)) is None
    assert fast.insert((1, 3)) is None, "it is held"
    with pytest.raises(ValueError, match="no room"):
        fast.insert((1, 4), busy={(1, 3)})
    assert fast.insert((1, 4)) == (1, 3)
    assert list(fast) == [(1, 4)]
    assert fast.resize(0) == [(1, 4)] and len(fast) == 0


def test_what_comes_in_slowly_must_have_been_wanted_more() -> None:
    policy = AgedFrequency(1, half_life=1e9, margin=2, per_layer=1)
    policy.touch((1, 0))
    assert policy.admits((1, 0)) and policy.insert((1, 0)) is None
    for _ in range(2):
        policy.touch((1, 1))
    assert not policy.admits((1, 1)), "the layer has had its upload in this step"
    policy.end_of_step()
    assert not policy.admits((1, 1)), "twice is not more than twice"
    policy.touch((1, 1))
    assert not policy.admits((1, 1), busy={(1, 0)})
    assert policy.admits((1, 1)) and policy.insert((1, 1)) == (1, 0)
    assert policy.score((1, 1)) == pytest.approx(3)
    assert policy.score((9, 9)) == 0


def test_scores_outlive_the_range_of_floats() -> None:
    policy = AgedFrequency(2, half_life=1)
    for step in range(2000):
        policy.touch((1, step % 3))
        if step % 3 and (1, step % 3) not in policy:
            policy.insert((1, step % 3))
        policy.end_of_step()
    policy.touch((1, 1))
    assert 1 <= policy.score((1, 1)) < 2
    assert list(policy) == [(1, 2), (1, 1)]


def test_removing_and_inserting_again_needs_no_more_memory() -> None:
    policy = AgedFrequency(4)
    oracle = Belady(4, [(1, i % 4) for i in range(5000)])
    for i in range(5000):
        for held in (policy, oracle):
            held.touch((1, i % 4))
            held.insert((1, i % 4))
        policy.remove((1, i % 4))
    assert len(policy._heap) <= 100 and len(oracle._heap) <= 100


def test_quotas_pass_time_on_and_keep_a_round_that_recency_would_lose() -> None:
    # 3 layers of 2 wanted experts each, room for 3: recency evicts each just before its turn.
    wanted = [(layer, expert) for _ in range(50) for layer in LAYERS for expert in (0, 1)]
    assert hits(Lru(3), wanted) == 0
    assert hits(PerLayer(3, LAYERS, AgedFrequency), wanted) == 3 * 49
    policy = PerLayer(3, LAYERS, lambda n: AgedFrequency(n, per_layer=1))
    policy.touch((1, 0))
    policy.insert((1, 0))
    policy.touch((1, 1))
    policy.touch((1, 1))
    assert not policy.admits((1, 1))
    policy.end_of_step()
    assert policy.admits((1, 1)) and policy.insert((1, 1)) == (1, 0)


# -- the oracle ------------------------------------------------------------------------------------


def best(wanted: tuple[Key, ...], capacity: int) -> int:
    """Most hits there can be, by trying everything."""
    states: dict[frozenset[Key], int] = {frozenset(): 0}
    for key in wanted:
        after: dict[frozenset[Key], int] = {}
        for held, found in states.items():
            for then, n in reachable(held, key, found, capacity):
                after[then] = max(after.get(then, 0), n)
        states = after
    return max(states.values())


def reachable(
    held: frozenset[Key], key: Key, found: int, capacity: int
) -> Iterator[tuple[frozenset[Key], int]]:
    yield held, found + (key in held)
    if key not in held:
        if len(held) < capacity:
            yield held | {key}, found
        for victim in held:
            yield held - {victim} | {key}, found


@settings(deadline=None)
@given(st.lists(st.tuples(st.just(0), st.integers(0, 4)), max_size=14), st.integers(0, 3))
def test_the_oracle_has_as_many_hits_as_there_can_be(wanted: list[Key], capacity: int) -> None:
    assert hits(Belady(capacity, wanted), wanted) == best(tuple(wanted), capacity)


def test_nobody_beats_the_oracle() -> None:
    rng = random.Random(7)
    wanted = [(rng.choice(LAYERS), min(int(rng.expovariate(0.3)), 15)) for _ in range(3000)]
    for capacity in (0, 1, 5, 20):
        oracle = hits(Belady(capacity, wanted), wanted)
        for policy in (
            Lru(capacity),
            PerLayer(capacity, LAYERS, AgedFrequency),
            PinnedLru(capacity, wanted[: capacity // 2]),
            AgedFrequency(capacity),
        ):
            assert hits(policy, wanted) <= oracle


def test_the_oracle_spares_the_busy_and_refuses_what_was_not_foretold() -> None:
    oracle = Belady(2, [(0, 0), (0, 1), (0, 2), (0, 1), (0, 0)])
    for expert in (0, 1):
        oracle.touch((0, expert))
        oracle.insert((0, expert))
    assert list(oracle) == [(0, 0), (0, 1)]
    oracle.touch((0, 2))
    assert not oracle.admits((0, 2)), "it is never wanted again"
    assert oracle.insert((0, 2), busy=[(0, 0)]) == (0, 1)
    oracle.remove((0, 0))
    with pytest.raises(ValueError, match="foretold"):
        oracle.touch((0, 2))


def test_the_same_questions_have_the_same_answers() -> None:
    rng = random.Random(3)
    wanted = [(rng.choice(LAYERS), rng.randrange(12)) for _ in range(500)]

    def told(policy: ExpertPolicy) -> list[object]:
        out: list[object] = []
        for start in range(0, len(wanted), 4):
            step = wanted[start : start + 4]
            for key in step:
                if not policy.touch(key) and policy.admits(key, step):
                    out.append(policy.insert(key))
            policy.end_of_step()
        return [*out, *policy]

    for make in (lambda: Lru(9), lambda: AgedFrequency(9, half_life=3, per_layer=1)):
        assert told(make()) == told(make())
