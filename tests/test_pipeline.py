"""Reading ahead and writing behind: order, bounded memory, errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest
import torch

from quant.pipeline import BEHIND, Behind, ahead
from quant.tensorfile import Scratch


def number(i: int, scratch: Scratch) -> torch.Tensor:
    if i == 13:
        raise ValueError("13")
    return scratch.take("x", torch.int32, (1000,)).fill_(i)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 12])
def test_results_come_in_order_and_stay_until_the_next_is_asked_for(depth: int, count: int) -> None:
    seen = 0
    for i, x in enumerate(ahead((partial(number, i) for i in range(count)), depth)):
        assert torch.equal(x, torch.full((1000,), i, dtype=torch.int32))
        seen += 1
    assert seen == count


def test_an_error_comes_in_its_place() -> None:
    results = ahead(partial(number, i) for i in range(20))
    for i in range(13):
        assert int(next(results)[0]) == i
    with pytest.raises(ValueError, match="13"):
        next(results)


def test_no_more_is_begun_than_was_asked_for() -> None:
    begun: list[int] = []

    def task(i: int, scratch: Scratch) -> int:
        begun.append(i)
        return i

    before = threading.active_count()
    with closing(ahead((partial(task, i) for i in range(100)), 3)) as results:
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert max(begun) < 5 + 3
    assert threading.active_count() == before


def test_every_kind_sees_every_piece_in_order() -> None:
    seen: list[list[int]] = [[], []]
    behind: Behind[int] = Behind(*(kind.append for kind in seen))
    for i in range(50):
        behind.put(i)
        assert min(map(len, seen)) >= i + 1 - BEHIND
    behind.finish()
    behind.close()
    assert seen == [list(range(50))] * 2


@pytest.mark.parametrize("where", ["put", "finish"])
def test_a_failed_piece_is_told(where: str) -> None:
    def kind(i: int) -> None:
        if i == 3:
            raise OSError("full")

    behind: Behind[int] = Behind(kind)
    for i in range(4):
        behind.put(i)
    later: Callable[[], None] = behind.finish
    if where == "put":
        later = lambda: [behind.put(i) for i in range(4, 10)] and None  # noqa: E731
    with pytest.raises(OSError, match="full"):
        later()
    behind.close()
