from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_local.events import DraftFigures, Stats
from tui.messages import Machine, Pace
from tui.widgets.figures import amount, answer_foot, count, duration, percent, plain, rate
from tui.widgets.meters import meter_parts


@given(st.text())
def test_plain_text_carries_no_control_characters(text: str) -> None:
    shown = plain(text)
    assert not [c for c in shown if c not in "\t\n" and (c < " " or "\x7f" <= c < "\xa0")]


@given(st.text(st.characters(exclude_categories=["Cc"])))
def test_plain_leaves_printable_text_alone(text: str) -> None:
    assert plain(text) == text


def test_an_escape_sequence_becomes_visible() -> None:
    assert plain("a\x1b]52;c;AAAA\x07b\r\nc") == "a␛]52;c;AAAA␇b\nc"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_counts_amounts() -> None:
    assert [rate(r) for r in (0.42, 5.06, 1234.5)] == ["0.42 tok/s", "5.1 tok/s", "1234 tok/s"]
    assert [count(n, "token") for n in (0, 1, 1234)] == ["0 tokens", "1 token", "1,234 tokens"]
    assert amount(1_200_000_000, 3_400_000_000, "bytes") == "1.2 / 3.4 GB"
    assert amount(512, 0, "bytes") == "512 B"
    assert amount(12, 30, "layers") == "12 / 30 layers"


@given(st.integers(0, 10**6), st.integers(-1, 10**6))
def test_percent_is_a_share(part: int, whole: int) -> None:
    assert 0 <= percent(part, whole) <= 100
    if whole > 0 and part < whole:
        assert percent(part, whole) < 100


def test_the_line_under_an_answer_says_how_it_ended() -> None:
    stats = Stats(completion_tokens=11, prefill_s=1.0, decode_s=2.0)
    assert answer_foot("stop", stats, Pace()) == "11 tokens · 5.0 tok/s · 3.0 s"
    assert answer_foot("cancelled", Stats(), Pace(tokens=3)) == "stopped · 3 tokens"
    assert "--max-tokens" in answer_foot("length", stats, Pace())
    assert "/clear" in answer_foot("context", stats, Pace())


MACHINE = Machine(1_300_000_000, 7_900_000_000, 16_800_000_000, 3_000_000_000, 8_000_000_000)


def test_the_meters_name_what_there_is_the_most_important_first() -> None:
    drafts = DraftFigures(by_drafts=(1, 9), judged=(9,), accepted=(6,))
    assert meter_parts(MACHINE, drafts, 850_000_000.0) == [
        "mimo 1.3 GB",
        "RAM 7.9 / 16.8 GB",
        "VRAM 3.0 / 8.0 GB",
        "disk 850.0 MB/s",
        "drafts 66% right",
    ]
    assert meter_parts(Machine(0, 0, 0), DraftFigures.none(1), 0.0) == []
    assert meter_parts(None, None, 0.0) == []
