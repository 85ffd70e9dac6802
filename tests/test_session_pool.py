"""However chats are taken, continued, edited and evicted, answers are those from scratch.

And counted: only new ids are processed. On the fake model, whose next id depends on every id its
cache holds, and on a tiny model with sliding and full layers and an MTP drafter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import tiny
import torch
from fakes import FakeCache, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import MOST, WINDOW, Chats, fake, from_scratch, new_cache, small_model, text

from mimo_local.cache import KVCache
from mimo_local.config import ModelConfig
from mimo_local.draft_control import DraftController
from mimo_local.generate import Drafting, generate
from mimo_local.model import Model
from mimo_local.mtp import Drafter
from mimo_local.sampler import SamplingParams
from mimo_local.session import MAX_SNAPSHOTS, Session, common_prefix
from mimo_local.session_pool import FORK_FROM, LEAST, SessionPool

torch.set_num_threads(1)


# ---- one session ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_common_prefix_is_the_plain_loops(mine: list[int], other: list[int]) -> None:
    n = 0
    while n < min(len(mine), len(other)) and mine[n] == other[n]:
        n += 1
    assert common_prefix(mine, other) == n


def grown(turns: list[int], model: FakeModel) -> Session:
    session = Session(FakeCache)  # type: ignore[arg-type]
    for i, n in enumerate(turns):
        session.cache.extend(text(n, i))  # type: ignore[attr-defined]
        session.ids += text(n, i)
        session.remember()
    return session


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.floats(0, 1))
def test_a_session_says_before_how_far_it_will_go_back(turns: list[int], share: float) -> None:
    session = grown(turns, FakeModel())
    n = int(share * len(session.ids))
    ids = [*session.ids[:n], 99]
    foretold, whole = session.usable_prefix(ids), list(session.ids)
    copy = session.fork(n)
    assert session.ids == whole and session.cache.held == whole  # type: ignore[attr-defined]
    session.rewind(n)
    for each in (session, copy):
        assert each.ids == whole[:foretold] == each.cache.held  # type: ignore[attr-defined]
    copy.cache.extend([1, 2])  # type: ignore[attr-defined]
    assert session.cache.held == whole[:foretold]  # type: ignore[attr-defined]


def test_points_lie_wider_apart_the_older_they_are_and_little_is_read_again() -> None:
    session = grown([50] * 60, FakeModel())
    lengths = [point.length for point in session.points]
    assert len(lengths) == MAX_SNAPSHOTS
    assert lengths[-2:] == [2950, 3000]
    for n in range(200, 3000, 50):
        back = n - session.usable_prefix([*session.ids[:n], 99])
        assert back <= 0.85 * (3000 - n + 100), (n, back)


def test_the_last_ids_before_a_point_cost_nothing_either() -> None:
    session = grown([100, 100, 100], FakeModel())
    assert session.usable_prefix(session.ids[:199]) == 198
    assert session.usable_prefix(session.ids[:190]) == 100


# ---- many sessions -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([0, 3000, 20_000, MOST]), st.integers(1, 6))
def test_any_history_of_chats_answers_as_from_scratch(seed: int, budget: int, most: int) -> None:
    dice, chats = random.Random(seed), fake(budget, most=most)
    known = [text(40)]
    for step in range(14):
        ids = list(dice.choice(known))
        match dice.choice(["go on", "go on", "edit", "again", "new", "branch", "two"]):
            case "go on":
                ids += text(dice.randint(1, 30), step)
            case "edit":
                ids = ids[: dice.randint(1, len(ids))] + text(9, step)
            case "branch":
                ids = ids[: len(ids) // 2] + text(120, step)
            case "new":
                ids = text(dice.randint(1, 200), step + 1000)
            case "two":
                taken = [chats.begin(ids, 5) for _ in range(2)]
                wanted = from_scratch(chats.model, ids, 5)
                for session, steps in dice.sample(taken, 2):
                    assert list(steps) == wanted
                    chats.pool.give_back(session, keep=dice.random() < 0.5)
        n, stop = dice.randint(1, 20), dice.choice([MOST, 1, 3])
        made = chats.ask(ids, n, stop_after=stop)
        assert made == from_scratch(chats.model, ids, n)[:stop]
        known.append(ids + made)
        figures = chats.pool.figures
        assert figures.taken == 0 and figures.idle <= most
        assert figures.nbytes <= budget


def test_a_chat_is_found_again_without_being_named() -> None:
    chats = fake()
    one, two = text(300, 1), text(300, 2)
    one += chats.ask(one)
    two += chats.ask(two)
    chats.ask([*one, 5, 6])
    assert chats.read == 3, "the last id drawn is never processed, and two are new"
    chats.ask([*two, 5])
    assert chats.read == 2
    assert chats.pool.figures.idle == 2


def test_branches_of_one_chat_are_all_kept() -> None:
    chats = fake()
    base = text(400)
    base += chats.ask(base)
    left, right = [*base, *text(100, 1)], [*base, *text(100, 2)]
    left += chats.ask(left)
    right += chats.ask(right)
    assert chats.read == 101
    for branch in (left, right, left):
        chats.ask([*branch, len(branch) % 7])
        assert chats.read <= 2, "neither took the other's place"


def test_a_short_other_end_is_not_worth_a_copy() -> None:
    chats = fake()
    base = text(400)
    chats.ask(base)
    for i in range(4):
        chats.ask([*base, *text(FORK_FROM // 2, i)], 3)
    assert chats.pool.figures.idle == 1


def test_chats_with_one_beginning_do_not_read_it_again() -> None:
    chats = fake()
    system = text(500)
    chats.ask([*system, *text(200, 1)], 1)
    # Nothing was remembered inside that prompt: the second still reads all of it.
    chats.ask(system, 1)
    for i in range(2, 6):
        chats.ask([*system, *text(200, i)], 1)
        assert chats.read == 200
    assert chats.pool.figures.idle == 5


def test_answers_to_one_prompt_share_what_was_read() -> None:
    chats = fake()
    prompt = text(200)
    wanted = from_scratch(chats.model, prompt)
    session, steps = chats.begin(prompt, 6)
    made = [next(steps)]
    session.remember()
    others = [chats.begin(prompt, 6) for _ in range(2)]
    assert chats.read == 1
    fork = chats.pool.fork(session)
    assert fork.ids == prompt
    for other, more in others:
        assert list(more) == wanted
        chats.pool.give_back(other)
    assert made + list(steps) == wanted
    chats.pool.give_back(session)
    chats.pool.give_back(fork)
    assert chats.pool.figures.taken == 0


def test_a_session_that_answers_is_never_evicted_or_taken() -> None:
    chats = fake(budget=20_000)
    prompt = text(1000)
    session, steps = chats.begin(prompt, 50)
    next(steps)
    for i in range(5):
        chats.ask(text(900, i + 1))
    assert len([*steps]) == 49
    assert session.ids[:1000] == prompt
    chats.pool.give_back(session)
    chats.ask([*session.ids, 3])
    assert chats.read == 1


def test_the_longest_unused_goes_first() -> None:
    chats = fake(most=2)
    texts = [text(100, i) for i in range(3)]
    for ids in (texts[0], texts[1], texts[0], texts[2]):
        chats.ask(ids, 1)
    for i, read in ((0, 1), (2, 1), (1, 100)):
        chats.ask(texts[i], 1)
        assert chats.read == read, i


def test_idle_sessions_give_way_before_a_long_prompt_not_after() -> None:
    chats = fake(budget=14_000)
    chats.ask(text(800, 1))
    assert chats.pool.figures.idle == 1
    session = chats.pool.take(text(900, 2), tokens=1000)
    assert chats.pool.figures.idle == 0
    assert not chats.pool.fits(1000) and chats.pool.fits(100)
    chats.pool.give_back(session)
    assert chats.pool.fits(10**9), "alone it may try"


def test_what_is_short_or_known_or_unwanted_is_not_kept() -> None:
    chats = fake()
    chats.ask(text(LEAST - 3), 2)
    assert chats.pool.figures.idle == 0
    prompt = text(100)
    chats.pool.give_back(chats.begin(prompt, 3)[0], keep=False)
    assert chats.pool.figures.idle == 0
    first, second = (chats.begin(prompt, 3) for _ in range(2))
    for session, steps in (first, second):
        list(steps)
        chats.pool.give_back(session)
    assert chats.pool.figures.idle == 1
    chats.pool.close()
    assert chats.pool.figures.nbytes == 0


def test_giving_back_twice_is_a_mistake() -> None:
    pool = fake().pool
    session = pool.take([1, 2])
    pool.give_back(session)
    with pytest.raises(KeyError):
        pool.give_back(session)


# ---- a real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Drafter]:
    return small_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[False, True], ids=["plain", "drafting"])
def chats(small: tuple[Model, Drafter], request: pytest.FixtureRequest) -> Iterator[Chats]:
    model, drafter = small
    drafting = Drafting(drafter, DraftController(3, fixed=3)) if request.param else None
    yield Chats(model, SessionPool(new_cache(small, request.param), budget=MOST), drafting)


def alone(chats: Chats, ids: list[int], n: int = 6) -> list[int]:
    """The same question to a pool that knows nothing."""
    fresh = SessionPool(chats.pool._new_cache, budget=MOST)
    return Chats(chats.model, fresh, chats.drafting).ask(ids, n)


def test_a_long_chats_last_turn_costs_its_new_ids_only(chats: Chats) -> None:
    before = text(4000)
    before += chats.ask(before, 20)
    question = text(60, 1)
    answer = chats.ask([*before, *question], 200)
    assert chats.read == 61, "continued"
    whole = [*before, *question]
    assert chats.ask(whole, 200) == answer
    assert chats.read == 1, "regenerated: its last id's logits are where the answer starts"
    edited = [*before, *text(60, 2)]
    other = chats.ask(edited, 200)
    assert chats.read == 61, "edited"
    assert other == alone(chats, edited, 200) and answer == alone(chats, whole, 200)
    for i, branch in enumerate((whole + answer, edited + other, whole + answer)):
        made = chats.ask([*branch, i], 5)
        assert chats.read <= 2, "switched between branches"
        assert made == alone(chats, [*branch, i], 5)


def test_another_question_about_a_long_text_reads_the_question(chats: Chats) -> None:
    document = text(3000)
    for i, question in enumerate((text(30, 1), text(50, 2), text(400, 3), text(20, 4))):
        ids = [*document, *question]
        made = chats.ask(ids, 12)
        assert made == alone(chats, ids, 12)
        assert chats.read <= (len(ids) if i == 0 else len(question) + 64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([1, 7, 8, 33, 100, 512]))
def test_a_point_within_a_prompt_is_as_if_reading_had_paused_there(seed: int, piece: int) -> None:
    """Rings and full layers, prompts in pieces of any size, one or many, after any beginning."""
    dice = random.Random(seed)
    facts = ModelConfig.from_dict(tiny.config("fsfs", "dddd", window=WINDOW))
    cache, twin = (KVCache(facts, dtype=torch.float32) for _ in range(2))
    start, total = dice.choice([0, 3, 40, 200]), dice.randint(40, 700)
    rows = [
        [torch.randn(start + total, s.kv_heads, d) for d in (s.head_dim, s.v_head_dim)]
        for s in facts.layers
    ]

    def read(into: KVCache, a: int, b: int) -> None:
        for i, (k, v) in enumerate(rows):
            for at in range(a, b, piece):
                end = min(at + piece, b)
                into.append(i, k[at:end], v[at:end], at=at - a)
        into.advance(b - a)

    for each in (cache, twin):
        if start:
            read(each, 0, start)
    points = sorted(dice.sample(range(start + 1, start + total + 1), 3))
    cache.catch([*points, start + total + 5])
    read(cache, start, start + total)
    found = cache.caught()
    assert [point.length for point in found] == points and not cache.caught()
    chosen = dice.choice(found)
    read(twin, start, chosen.length)
    cache.restore(chosen)
    for mine, theirs in zip(cache.layers, twin.layers, strict=True):
        first, kept = mine.rows(chosen.length)
        first_too, kept_too = theirs.rows(chosen.length)
        skip = max(first, first_too)
        assert mine.reaches(chosen.length)
        for name, part in kept.items():
            assert torch.equal(part[skip - first :], kept_too[name][skip - first_too :])


def test_memory_is_counted_as_it_is(chats: Chats) -> None:
    ids = text(2000)
    chats.ask(ids, 2)
    (session,) = chats.pool._idle
    full = session.cache.row_bytes * 2001
    held = session.cache.nbytes
    points = sum(p.nbytes for p in session.points)
    assert chats.pool.nbytes == full + held["swa"] + held.get("draft", 0) + points
    chats.ask([*ids[:40], 1], 2)  # begins anew in the same rows or beside them
    chats.pool._evict(chats.pool._idle[0])
    assert chats.pool.nbytes < 3 * (held["swa"] + held.get("draft", 0) + points) + full // 8


def test_rows_gone_back_from_are_given_back(small: tuple[Model, Drafter]) -> None:
    cache = new_cache(small, False)()
    session = Session(lambda: cache)
    model = small[0]
    session.ids[:] = text(5000)
    list(generate(model, cache, session.ids, SamplingParams(max_tokens=1, temperature=0.0)))
    assert cache.used_bytes > 5000 * cache.row_bytes
    cache.trim()
    assert cache.used_bytes > 5000 * cache.row_bytes
    session.rewind(0)
    session.ids[:] = text(100)
    first = list(generate(model, cache, session.ids, SamplingParams(max_tokens=3, temperature=0.0)))
    assert cache.used_bytes > 5000 * cache.row_bytes, "nobody gave the memory back yet"
    cache.trim()
    assert cache.used_bytes < 1000 * cache.row_bytes + cache.nbytes["swa"]
    assert cache.nbytes["full"] < 1000 * cache.row_bytes
    session.rewind(99)
    session.ids[:] = text(100)
    again = list(generate(model, cache, session.ids, SamplingParams(max_tokens=3, temperature=0.0)))
    assert again == first
