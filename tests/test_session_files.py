"""Saved sessions go on as if they had stayed, or are refused and read again; never a wrong row."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import MOST, Chats, new_cache, small_model, text

from mimo_local import session_files, session_manifest, session_pool, session_rows, session_store
from mimo_local.draft_control import DraftController
from mimo_local.errors import PackError
from mimo_local.generate import Drafting
from mimo_local.kernels import get
from mimo_local.model import Model
from mimo_local.mtp import Drafter
from mimo_local.session import Session
from mimo_local.session_files import BLOCK, SessionFiles
from mimo_local.session_pool import SAVE_FROM, SessionPool
from mimo_local.session_store import ORPHAN_AGE, SessionStore, weights_key

torch.set_num_threads(1)
NEVER = lambda: False  # noqa: E731


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Drafter]:
    return small_model(tmp_path_factory.mktemp("tiny"))


class Desk:
    """Starts the program anew on one folder."""

    def __init__(
        self,
        small: tuple[Model, Drafter],
        folder: Path,
        drafts: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.small, self.folder, self.drafts, self.dtype = small, folder, drafts, dtype
        self.limit = MOST

    def start(self, *, weights: str = "w", budget: int = MOST, **kwargs: Any) -> Chats:
        make = new_cache(self.small, self.drafts, self.dtype)
        store = SessionStore(self.folder, self.limit)
        files = SessionFiles(store, make, model="tiny", weights=weights, **kwargs)
        drafting = None
        if self.drafts:
            drafting = Drafting(self.small[1], DraftController(3, fixed=3))
        return Chats(self.small[0], SessionPool(make, budget=budget, files=files), drafting)

    def names(self, suffix: str = "") -> set[str]:
        return {p.name for p in self.folder.iterdir() if p.name.endswith(suffix)} - {".lock"}

    def alone(self, ids: list[int], n: int = 6) -> list[int]:
        make = new_cache(self.small, self.drafts, self.dtype)
        return Chats(self.small[0], SessionPool(make, budget=MOST), self.start().drafting).ask(
            ids, n
        )


@pytest.fixture
def desk(small: tuple[Model, Drafter], tmp_path: Path) -> Desk:
    return Desk(small, tmp_path / "cache" / "sessions", drafts=False)


@pytest.fixture(
    params=[(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.int8)],
    ids=["plain", "drafting", "int8"],
)
def either(small: tuple[Model, Drafter], tmp_path: Path, request: pytest.FixtureRequest) -> Desk:
    return Desk(small, tmp_path / "sessions", *request.param)


def only(chats: Chats) -> Session:
    (session,) = chats.pool._idle
    return session


def rows_of(session: Session) -> dict[str, torch.Tensor]:
    found = {}
    for i, layer in enumerate(session.cache.layers):
        for name, part in layer.rows(session.cache.length)[1].items():
            found[f"{i}.{name}"] = part[-12:] if layer.kind == "swa" else part
    return found


def assert_same_rows(one: Session, other: Session) -> None:
    assert one.ids == other.ids
    mine, theirs = rows_of(one), rows_of(other)
    assert mine.keys() == theirs.keys()
    for name, part in mine.items():
        assert torch.equal(part, theirs[name]), name


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [300, BLOCK, 2 * BLOCK + 700])
def test_a_saved_session_goes_on_bit_for_bit(either: Desk, n: int) -> None:
    ids = text(n)
    stayed = either.start()
    ids += stayed.ask(ids, 20)
    assert stayed.pool.rest(NEVER) and stayed.pool.saves == 1
    resumed = either.start()
    more = [*ids, *text(40, 1)]
    here, there = only(stayed), resumed.pool.take(more)
    assert_same_rows(here, there)
    assert [p.length for p in here.points] == [p.length for p in there.points]
    resumed.pool.give_back(there)
    made = [chats.ask(more, 60) for chats in (stayed, resumed)]
    assert made[0] == made[1] and stayed.read == resumed.read == 41
    assert_same_rows(only(stayed), only(resumed))
    if either.drafts:
        figures = [c.drafting.controller.report() for c in (stayed, resumed) if c.drafting]
        assert figures[0].drafted == figures[1].drafted > 0
        assert figures[0].accepted == figures[1].accepted


def test_after_a_restart_the_last_turn_can_be_continued_edited_and_regenerated(
    either: Desk,
) -> None:
    before = text(3000)
    chats = either.start()
    before += chats.ask(before, 20)
    whole = [*before, *text(50, 1)]
    answer = chats.ask(whole, 40)
    chats.pool.close()
    cases = ((whole + answer + [1], 2), (whole, 1), ([*before, *text(50, 2)], 51))
    for ids, read in cases:
        chats = either.start()
        made = chats.ask(ids, 8)
        assert chats.read == read and chats.pool.loads == 1
        assert made == either.alone(ids, 8)


def test_a_branch_shares_its_beginning_on_disk(desk: Desk) -> None:
    chats = desk.start()
    base = text(BLOCK + 1000)
    base += chats.ask(base, 4)
    left, right = [*base, *text(300, 1)], [*base, *text(300, 2)]
    chats.ask(left, 4)
    chats.pool.rest(NEVER)
    one = desk.start().pool.files
    assert one is not None
    alone = one.store.nbytes
    chats.ask(right, 4)
    assert chats.pool.rest(NEVER)
    assert len(one.store.sessions()) == 2
    assert one.store.nbytes < 1.3 * alone
    for ids in (left, right):
        again = desk.start()
        assert again.ask([*ids, 3], 4) == desk.alone([*ids, 3], 4)
        assert again.pool.loads == 1 and again.read < 10
    # Removing one leaves the other whole.
    first, second = one.store.sessions()
    one.store.remove(first.id)
    for piece in second.pieces:
        os.close(one.store.open(piece))
    one.store.remove(second.id)
    assert desk.names() == set()


def test_a_beginning_that_is_on_disk_is_read_from_there_for_another_chat(desk: Desk) -> None:
    chats = desk.start()
    system = text(2000)
    chats.ask(system, 1)
    chats.ask([*system, *text(3000, 1)], 4)
    chats.pool.close()
    again = desk.start()
    ids = [*system, *text(30, 2)]
    assert again.ask(ids, 6) == desk.alone(ids, 6)
    assert again.read == 30
    # It is a chat of its own now, and the other one is still there.
    again.ask([*ids, *text(SAVE_FROM, 3)], 4)
    again.pool.close()
    last = desk.start()
    last.ask([*system, *text(3000, 1), 5], 1)
    assert last.read <= 6


def test_a_save_writes_what_is_new_and_pieces_stay_few(desk: Desk) -> None:
    chats = desk.start()
    ids = text(3 * BLOCK - 2000)
    written = []
    ids += chats.ask(ids, 2)
    chats.pool.rest(NEVER)
    for turn in range(20):
        before = desk.names(".rows")
        ids += text(SAVE_FROM, turn)
        ids += chats.ask(ids, 2)
        assert chats.pool.rest(NEVER)
        new = desk.names(".rows") - before
        written.append(sum((desk.folder / name).stat().st_size for name in new))
    session = only(chats)
    one = SAVE_FROM * session.cache.row_bytes
    assert sorted(written)[10] < 1.1 * one, "the middle one"
    assert max(written) <= (BLOCK + SAVE_FROM) * session.cache.row_bytes
    assert sum(written) < 7 * 20 * one
    assert len(desk.names(".rows")) <= len(ids) / BLOCK + 2 + session_files.FEW
    assert len(desk.names(".session")) == 1
    again = desk.start()
    again.ask([*ids, 1], 1)
    assert again.read == 2


def test_little_that_is_new_is_not_saved(desk: Desk) -> None:
    chats = desk.start()
    ids = text(400)
    ids += chats.ask(ids, 2)
    chats.ask(text(100, 5), 2)
    assert chats.pool.rest(NEVER) and chats.pool.saves == 1
    for _ in range(3):
        ids += [1]
        ids += chats.ask(ids, 2)
        assert not chats.pool.rest(NEVER)
    assert chats.pool.saves == 1
    assert len(desk.names(".session")) == 1


def test_what_gives_way_in_memory_is_found_on_disk(desk: Desk) -> None:
    chats = desk.start()
    chats.ask(text(1000, 1), 2)
    chats.pool.budget = chats.pool.nbytes * 3 // 2
    for seed in (2, 3, 1, 2, 3):
        made = chats.ask(text(1000, seed), 2)
        assert made == desk.alone(text(1000, seed), 2)
        assert chats.pool.figures.idle == 1
    assert chats.pool.loads == 3 and chats.read == 1


def test_nothing_is_written_while_somebody_answers(desk: Desk) -> None:
    chats = desk.start()
    chats.ask(text(1000, 1), 2)
    chats.pool.budget = chats.pool.nbytes * 3 // 2
    session, steps = chats.begin(text(700, 2), 4)
    next(steps)
    chats.ask(text(900, 3), 2)  # takes the first one's place
    assert chats.pool.saves == 1, "the first one, when it gave way to the second"
    names = desk.names()
    chats.ask(text(900, 4), 2)
    assert chats.pool.saves == 1 and desk.names() == names
    list(steps)
    chats.pool.give_back(session)


def test_whoever_ends_the_program_waits_for_some_seconds_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_pool, "CLOSE_S", 0.0)
    chats = desk.start()
    chats.ask(text(1000), 2)
    chats.pool.close()
    assert chats.pool.saves == 0 and not desk.folder.exists()


def test_random_histories_over_restarts_answer_as_from_scratch(either: Desk) -> None:
    for seed in range(4):
        dice = random.Random(seed)
        shutil.rmtree(either.folder, ignore_errors=True)
        either.limit = dice.choice([MOST, 1_500_000])
        chats, known = either.start(), [text(500, seed)]
        for step in range(16):
            ids = list(dice.choice(known[-4:]))
            match dice.choice(["go on", "edit", "again", "new", "restart", "crash", "stop"]):
                case "go on":
                    ids += text(dice.randint(1, 400), step)
                case "edit":
                    ids = ids[: dice.randint(1, len(ids))] + text(80, step)
                case "new":
                    ids = text(dice.randint(1, 900), step + 1000)
                case "restart":
                    chats.pool.close()
                    chats = either.start(budget=dice.choice([MOST, 1_000_000]))
                case "crash":
                    chats = either.start()
                case "stop":
                    left = iter(range(dice.randint(0, 8)))
                    chats.pool.rest(lambda left=left: next(left, None) is None)  # type: ignore[misc]
            n = dice.randint(1, 30)
            made = chats.ask(ids, n)
            assert made == either.alone(ids, n), (seed, step)
            known.append(ids + made)
            if dice.random() < 0.5:
                chats.pool.rest(NEVER)
        store = SessionStore(either.folder, either.limit)
        assert store.nbytes <= either.limit


# ---- being stopped -------------------------------------------------------------------------------


def test_a_stopped_save_leaves_nothing_half_and_goes_on_where_it_was(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_rows, "CHUNK", 1 << 16)
    chats = desk.start()
    ids = text(3 * BLOCK)
    ids += chats.ask(ids, 2)
    asked: list[int] = []
    for stop_at in range(1, 1000):
        count = 0

        def busy(stop_at: int = stop_at) -> bool:
            nonlocal count
            count += 1
            return count > stop_at

        done = chats.pool.rest(busy)
        asked.append(count)
        assert not list(desk.folder.glob("*.part"))
        if done:
            break
        assert not desk.names(".session")
        assert count == stop_at + 1, "asked once more after it said stop"
    sizes = sum(p.stat().st_size for p in desk.folder.iterdir())
    assert len(asked) > 5
    assert len(desk.names(".rows")) == 4
    session = only(chats)
    assert sizes < len(ids) * session.cache.row_bytes + 5 * session.points[0].nbytes + 200_000
    again = desk.start()
    again.ask([*ids, 1], 1)
    assert again.read == 2


def test_a_branch_taken_between_two_tries_is_what_is_saved(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of the first try hold rows of the old branch past the fork."""
    monkeypatch.setattr(session_rows, "CHUNK", 1 << 14)
    chats = desk.start()
    base = text(1000)
    base += chats.ask(base, 2)
    old = [*base, *text(300, 1)]
    chats.ask(old, 2)
    for stop_at in (3, 5, 9, 14, 30):
        left = iter(range(stop_at))
        chats.pool.rest(lambda left=left: next(left, None) is None)  # type: ignore[misc]
        new = [*base, *text(300, stop_at)]
        new += chats.ask(new, 20)
        chats.pool.rest(lambda: True)
    chats.pool.close()
    again = desk.start()
    made = again.ask([*new, 7], 20)
    assert again.read == 2 and made == desk.alone([*new, 7], 20)


def test_killed_at_any_write_the_folder_is_good(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write, sync and rename in turn is the last thing that happens."""
    chats = desk.start()
    ids = text(900)
    ids += chats.ask(ids, 2)
    chats.pool.close()
    more = [*ids, *text(300, 1)]
    template = desk.folder.with_name("template")
    shutil.copytree(desk.folder, template)

    class Killed(BaseException):
        pass

    for last in range(100):
        shutil.rmtree(desk.folder)
        shutil.copytree(template, desk.folder)
        chats = desk.start()
        chats.ask(more, 2)
        left = iter(range(last))
        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "write"), (os, "fsync"), (os, "fdatasync"),
                (Path, "replace"), (Path, "unlink"),
            ):  # fmt: skip
                real = getattr(owner, name)

                def call(*args: Any, real: Any = real, left: Any = left, **kwargs: Any) -> Any:
                    if next(left, None) is None:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(owner, name, call)
            try:
                chats.pool.rest(NEVER)
            except Killed:
                killed = True
            else:
                killed = False
        again = desk.start()
        made = again.ask([*more, 3], 4)
        assert again.read in (1, 302), "the new save or the old one"
        assert again.pool.loads == 1
        assert made == desk.alone([*more, 3], 4)
        again.pool.close()
        if not killed:
            break
    assert 10 < last < 99


# ---- refused -------------------------------------------------------------------------------------


@pytest.fixture
def saved(desk: Desk) -> Iterator[tuple[Desk, list[int]]]:
    chats = desk.start()
    ids = text(700)
    ids += chats.ask(ids, 2)
    chats.pool.close()
    yield desk, [*ids, 9]


def goes_on_without(desk: Desk, ids: list[int], **kwargs: Any) -> Chats:
    chats = desk.start(**kwargs)
    assert chats.ask(ids, 5) == desk.alone(ids, 5)
    assert chats.read == len(ids) and chats.pool.loads == 0
    return chats


def test_any_damaged_byte_is_noticed_and_the_text_read_again(
    saved: tuple[Desk, list[int]],
) -> None:
    desk, ids = saved
    template = desk.folder.with_name("template")
    shutil.copytree(desk.folder, template)
    dice = random.Random(1)
    for name in sorted(desk.names()):
        size = (template / name).stat().st_size
        damage: list[Callable[[bytearray], bytes]] = [
            lambda data: data[:-1], lambda data: b"", lambda data: bytes(data) + b"x",
        ]  # fmt: skip
        for position in {0, size - 1, *dice.sample(range(size), 6)}:

            def flip(data: bytearray, position: int = position) -> bytes:
                data[position] ^= 1 << dice.randrange(8)
                return bytes(data)

            damage.append(flip)
        for change in damage:
            shutil.rmtree(desk.folder)
            shutil.copytree(template, desk.folder)
            (desk.folder / name).write_bytes(change(bytearray((template / name).read_bytes())))
            chats = desk.start()
            made = chats.ask(ids, 2)
            # An earlier restart point may do where another file is damaged; never a wrong row.
            assert made == desk.alone(ids, 2)
            assert chats.read in (2, len(ids)) and chats.pool.figures.trouble == ""
        (desk.folder / name).unlink(missing_ok=True)
        goes_on_without(desk, ids) if name.endswith(".rows") else desk.start().ask(ids, 1)


def test_a_damaged_one_is_removed_when_it_is_found_out(saved: tuple[Desk, list[int]]) -> None:
    desk, ids = saved
    (rows,) = desk.names(".rows")
    with (desk.folder / rows).open("r+b") as file:
        file.seek(99)
        file.write(b"?!")
    goes_on_without(desk, ids)
    assert desk.names() == set()


@pytest.mark.parametrize("what", ["weights", "drafting", "dtype", "int8", "version"])
def test_another_models_or_versions_is_left_alone(
    saved: tuple[Desk, list[int]], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, ids = saved
    names = desk.names()
    if what == "weights":
        goes_on_without(desk, ids, weights="others")
    elif what == "drafting":
        other = Desk(desk.small, desk.folder, drafts=True)
        goes_on_without(other, ids)
    elif what in ("dtype", "int8"):
        cache = desk.small[0].new_cache(dtype=torch.int8 if what == "int8" else torch.float32)
        files = SessionFiles(SessionStore(desk.folder), lambda: cache, model="tiny", weights="w")
        assert files.find(ids) is None
    else:
        monkeypatch.setattr(session_manifest, "VERSION", 2)
        chats = goes_on_without(desk, ids)
        files = chats.pool.files  # type: ignore[assignment]
        assert files.store.unreadable == 1 and not files.store.sessions()
        os.utime(desk.folder / next(iter(desk.names(".rows"))), (1, 1))
        files.store.tidy()
    assert desk.names() == names


@pytest.mark.parametrize(
    "lie",
    [
        {"ids": []}, {"ids": [-1]}, {"ids": "no"}, {"rows": []}, {"points": []}, {"rows": None},
        {"rows.first": 5}, {"rows.last": 1 << 50}, {"rows.nbytes": 1}, {"rows.crcs": []},
        {"rows.name": "../secret.rows"}, {"rows.name": "x.point"}, {"points.last": 1 << 40},
        {"points.starts": {}}, {"points.starts": {"1": 1 << 40, "3": 0}}, {"points.nbytes": 7},
        {"points.starts": {"1": 0, "3": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_claims_under_a_right_checksum_are_refused(
    saved: tuple[Desk, list[int]], lie: dict[str, Any]
) -> None:
    desk, ids = saved
    (name,) = desk.names(".session")
    body = json.loads((desk.folder / name).read_bytes().partition(b"\n")[2])
    for key, value in lie.items():
        part, _, inner = key.partition(".")
        if inner:
            for piece in body[part]:
                piece[inner] = value
        else:
            body[part] = value
    data = json.dumps(body).encode()
    head = f"{session_manifest.MAGIC} {zlib.crc32(data):08x}\n".encode()
    (desk.folder / name).write_bytes(head + data)
    goes_on_without(desk, ids)


def test_a_missing_kernel_library_reads_and_writes_the_same(
    saved: tuple[Desk, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if get() is None:
        pytest.skip("there are no kernels")
    desk, ids = saved
    monkeypatch.setattr(session_rows.kernels, "get", lambda: None)
    chats = desk.start()
    chats.pool.take(ids)
    assert chats.pool.loads == 1


def test_weights_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    one = weights_key(tmp_path)
    assert weights_key(tmp_path) == one
    (tmp_path / "a.safetensors").write_bytes(b"12")
    two = weights_key(tmp_path)
    (tmp_path / "pack.json").write_text("{}")
    assert len({one, two, weights_key(tmp_path)}) == 3


# ---- the disk, other people ----------------------------------------------------------------------


def test_files_are_for_their_owner_only(saved: tuple[Desk, list[int]]) -> None:
    desk, _ = saved
    assert stat.S_IMODE(desk.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in desk.folder.iterdir()} == {0o600}
    desk.folder.chmod(0o755)
    chats = desk.start()
    chats.ask(text(400, 3), 1)
    chats.pool.close()
    assert stat.S_IMODE(desk.folder.stat().st_mode) == 0o700


def test_a_full_disk_is_told_and_leaves_no_torso(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = desk.start()
    ids = text(600)
    ids += chats.ask(ids, 2)
    real, room = os.write, [30_000]

    def write(fd: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = min(len(data), room[0])
        room[0] -= n
        return real(fd, data[:n])

    monkeypatch.setattr(os, "write", write)
    assert not chats.pool.rest(NEVER)
    assert "full" in chats.pool.figures.trouble and str(desk.folder) in chats.pool.figures.trouble
    assert not list(desk.folder.glob("*.part")) and not desk.names(".session")
    monkeypatch.undo()
    assert not chats.pool.rest(NEVER), "not again at once"
    assert chats.ask([*ids, 1], 2) == desk.alone([*ids, 1], 2)
    files = chats.pool.files
    assert files is not None
    files._mute_until = 0
    assert chats.pool.rest(NEVER) and chats.pool.figures.trouble == ""


def test_too_little_free_disk_is_seen_before_anything_is_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = desk.start()
    chats.ask(text(600), 2)
    monkeypatch.setattr(SessionStore, "_free", lambda self: 1_000_000_000)
    assert not chats.pool.rest(NEVER)
    assert "free" in chats.pool.figures.trouble
    assert not desk.folder.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(desk: Desk) -> None:
    desk.folder.parent.mkdir()
    desk.folder.parent.chmod(0o500)
    chats = desk.start()
    chats.ask(text(600), 2)
    assert not chats.pool.rest(NEVER)
    assert "Permission" in chats.pool.figures.trouble


def test_a_folder_that_cannot_be_made_is_told_and_hurts_nobody(desk: Desk) -> None:
    desk.folder.parent.write_text("a file where the folder should be")
    chats = desk.start()
    ids = text(600)
    ids += chats.ask(ids, 2)
    assert not chats.pool.rest(NEVER)
    assert str(desk.folder) in chats.pool.figures.trouble
    assert chats.ask([*ids, 1], 2) == desk.alone([*ids, 1], 2)


def test_the_limit_holds_and_the_longest_unused_goes_first(desk: Desk) -> None:
    chats = desk.start()
    for seed in range(3):
        chats.ask(text(800, seed), 1)
        chats.pool.rest(NEVER)
    files = chats.pool.files
    assert files is not None
    for age, saved in enumerate(files.store.sessions()):
        os.utime(desk.folder / f"{saved.id}.session", (age + 1, age + 1))
    oldest, middle, newest = files.store.sessions()
    files.store.touch(oldest)
    desk.limit = files.store.nbytes * 2 // 3 + 1000
    SessionStore(desk.folder, desk.limit).tidy()
    assert {s.id for s in files.store.sessions()} == {oldest.id, newest.id}
    assert files.store.nbytes <= desk.limit
    assert not any((desk.folder / p.name).exists() for p in middle.pieces)
    # One that is larger than all there may be is not saved at all.
    small = Desk(desk.small, desk.folder, drafts=False)
    small.limit = 10_000
    chats = small.start()
    chats.ask(text(900, 7), 1)
    names = desk.names()
    assert not chats.pool.rest(NEVER)
    assert "sessions_size" in str(chats.pool.files and chats.pool.files.trouble) or names
    assert desk.names() == names


def test_one_that_is_too_large_keeps_no_other_from_being_saved(desk: Desk) -> None:
    desk.limit = 700_000
    chats = desk.start()
    small, large = text(400, 1), text(6000, 2)
    chats.ask(small, 1)
    chats.ask(large, 1)
    assert chats.pool.rest(NEVER) and not chats.pool.rest(NEVER)
    (saved,) = SessionStore(desk.folder, desk.limit).sessions()
    assert saved.ids == small


def test_two_programs_on_one_folder(desk: Desk) -> None:
    one, two = desk.start(), desk.start()
    base = text(900)
    base += one.ask(base, 2)
    one.pool.rest(NEVER)
    left, right = [*base, *text(300, 1)], [*base, *text(300, 2)]
    two.ask(right, 2)
    assert two.read == 301 and two.pool.loads == 1
    one.ask(left, 2)
    one.pool.rest(NEVER)
    two.pool.rest(NEVER)  # in place of what both came from
    for ids in (left, right):
        last = desk.start()
        made = last.ask([*ids, 4], 3)
        assert made == desk.alone([*ids, 4], 3)
    # All of it is removed under their feet: they go on and save again.
    SessionStore(desk.folder).remove_all()
    assert desk.names() == set()
    for chats, ids in ((one, left), (two, right)):
        ids += text(300, 3)
        made = chats.ask(ids, 3)
        assert made == desk.alone(ids, 3)
        assert not chats.pool.rest(NEVER)
        chats.pool.files._mute_until = 0  # type: ignore[union-attr]
        assert chats.pool.rest(NEVER)
    last = desk.start()
    last.ask([*left, 1], 1)
    assert last.read < 10


def test_a_lock_that_is_held_is_waited_for_and_then_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_store, "LOCK_WAIT", 0.05)
    chats = desk.start()
    chats.ask(text(600), 2)
    store = SessionStore(desk.folder)
    with store._locked():
        assert not chats.pool.rest(NEVER)
    assert ".lock" in chats.pool.figures.trouble
    chats.pool.files._mute_until = 0  # type: ignore[union-attr]
    assert chats.pool.rest(NEVER)


def test_what_nobody_names_goes_after_an_hour(saved: tuple[Desk, list[int]]) -> None:
    desk, _ = saved
    names = desk.names()
    for name in ("a.rows", "b.point", "c.rows.part", "d.manifest", "notes.txt"):
        (desk.folder / name).write_bytes(b"x" * 10)
    store = SessionStore(desk.folder, MOST)
    store.tidy()
    assert len(desk.names()) == len(names) + 5
    for name in desk.names() - names:
        os.utime(desk.folder / name, (0, session_store.time.time() - ORPHAN_AGE - 5))
    store.tidy()
    assert desk.names() == names | {"notes.txt"}, "what is not ours is nobody's to delete"


def test_a_loaded_session_is_refused_when_its_piece_is_gone_before_the_commit(
    saved: tuple[Desk, list[int]],
) -> None:
    desk, _ = saved
    store = SessionStore(desk.folder, MOST)
    (session,) = store.sessions()
    (desk.folder / session.rows[0].name).unlink()
    with pytest.raises(PackError) as error:
        store.commit(replace(session, id="other"))
    assert error.value.hint
    assert len(desk.names(".session")) == 1


def test_the_store_needs_no_torch(saved: tuple[Desk, list[int]]) -> None:
    desk, _ = saved
    code = (
        "import sys; from pathlib import Path\n"
        "from mimo_local.session_store import SessionStore\n"
        "store = SessionStore(Path(sys.argv[1]))\n"
        "print(len(store.sessions()), 'torch' in sys.modules)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, desk.folder], capture_output=True, text=True, cwd=root
    )
    assert done.stdout == "1 False\n", done.stderr


def test_a_line_for_people_is_kept(desk: Desk) -> None:
    chats = desk.start(describe=lambda ids: f"  {len(ids)}\n words \x1b[31m " + "x" * 200)
    ids = text(400)
    ids += chats.ask(ids, 1)
    chats.pool.rest(NEVER)
    (saved,) = SessionStore(desk.folder).sessions()
    assert saved.title.startswith("400 words") and len(saved.title) <= 80
    assert saved.model == "tiny"
