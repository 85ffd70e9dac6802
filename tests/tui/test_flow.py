from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.content import Content

from tui.widgets.flow import LONG_BLOCK, split
from tui.widgets.markup import code_blocks, fit, lay, markdown_parser

PARSER = markdown_parser()
KINDS = """\
# Head

A *b* **c** `d` and a long paragraph that goes on until it has to be wrapped somewhere.

- one
- two
  1. deep
  2. deeper

> said
> so

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

***

end [link](https://example.org)
"""


def bare(code: str, language: str) -> Content:
    return Content(code)


def lines(text: str, width: int = 40) -> list[str]:
    return [line.plain.rstrip() for line in lay(PARSER.parse(text), width, bare)]


# ---- what a block looks like ---------------------------------------------------------------------


def test_every_kind_of_block_is_laid_out() -> None:
    assert lines(KINDS, 30) == [
        "Head",
        "",
        "A b c d and a long paragraph",
        "that goes on until it has to",
        "be wrapped somewhere.",
        "",
        "• one",
        "• two",
        "  1. deep",
        "  2. deeper",
        "",
        "▌ said so",
        "",
        "x = 1",
        "",
        "y = 2",
        "",
        " a │ b",
        "───┼──",
        " 1 │ 2",
        "",
        "─" * 30,
        "",
        "end link",
    ]


def test_items_hang_under_their_text_and_numbers_line_up() -> None:
    text = "\n".join(f"{n}. a word that has to wrap here" for n in (9, 10))
    assert lines(text, 16) == [
        " 9. a word that",
        "    has to wrap",
        "    here",
        "10. a word that",
        "    has to wrap",
        "    here",
    ]


def test_a_table_too_wide_wraps_its_widest_column() -> None:
    text = "| key | words |\n|---|---|\n| a | " + "word " * 12 + "|\n"
    shown = lines(text, 30)
    assert max(map(len, shown)) <= 30
    assert " ".join(shown).count("word") == 13


@pytest.mark.parametrize("width", [8, 13, 40, 200])
@pytest.mark.parametrize("text", [KINDS, "x" * 300, "```\n" + "y" * 300 + "\n```", "漢字" * 60])
def test_nothing_is_wider_than_it_may_be_and_no_letter_is_lost(width: int, text: str) -> None:
    laid = lay(PARSER.parse(text), width, bare)
    if width >= 13:
        assert all(line.cell_length <= width for line in laid)
    shown = "".join(line.plain for line in laid)
    visible = text.replace("https://example.org", "").replace("```python", "")
    for letter in "xy漢":
        assert shown.count(letter) == visible.count(letter)


def test_columns_give_way_from_the_widest() -> None:
    assert fit([5, 100], 40) == [5, 31]
    assert fit([5, 6], 40) == [5, 6]
    assert fit([50, 50, 50], 20) == [8, 8, 8], "never to nothing, however narrow"


def test_code_blocks_are_found_wherever_they_stand() -> None:
    assert code_blocks(KINDS) == ("x = 1\n\ny = 2\n",)
    assert code_blocks("- a\n\n  ```\n  in a list\n  ```\n\n    indented? no\n") == ("in a list\n",)
    assert code_blocks("> ~~~sh\n> ls\n> ~~~\n\n    four spaces\n") == ("ls\n", "four spaces\n")
    assert code_blocks("none `inline`") == ()


# ---- a growing text ------------------------------------------------------------------------------


def grown(pieces: list[str]) -> list[str]:
    """The blocks a text is shown as when it comes in pieces, as `Flow` does it."""
    done: list[str] = []
    tail = ""
    for piece in pieces:
        found = split(tail + piece, PARSER)
        if not found:
            tail += piece
            continue
        done += [p.source for p in found[:-1]]
        tail = found[-1].source
    return [*done, tail]


@given(st.lists(st.integers(1, 9), min_size=len(KINDS), max_size=len(KINDS)))
@settings(max_examples=60, deadline=None)
def test_text_that_came_in_pieces_is_shown_as_the_whole_text(sizes: list[int]) -> None:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(KINDS[at : at + size])
        at += size
    blocks = grown([p for p in pieces if p])
    assert [lines(b) for b in blocks if b.strip()] == [
        lines(p.source) for p in split(KINDS, PARSER)
    ]
    assert "".join(blocks) == KINDS, "no character is lost or doubled"


def test_long_code_is_cut_between_lines_and_stays_code() -> None:
    body = [f"line {n} = {'x' * 30}\n" for n in range(200)]
    text = "intro\n\n```python\n" + "".join(body) + "```\n\nafter\n"
    blocks = grown([text[i : i + 50] for i in range(0, len(text), 50)])
    assert max(map(len, blocks)) < LONG_BLOCK + 200
    assert len(blocks) > 4
    code = [b for b in blocks if b.startswith("```")]
    assert all(b.startswith("```python\n") and b.rstrip().endswith("```") for b in code)
    assert "".join(c for b in code for c in code_blocks(b)) == "".join(body)


def test_a_long_list_is_cut_between_items_and_counts_on() -> None:
    text = "".join(f"{n}. item {n} {'y' * 40}\n" for n in range(1, 120))
    blocks = grown([text[i : i + 50] for i in range(0, len(text), 50)])
    assert len(blocks) > 2
    assert "".join(blocks) == text
    numbers = [line.split(".")[0].strip() for b in blocks for line in lines(b, 100)]
    assert numbers == [str(n) for n in range(1, 120)]


@given(st.text(alphabet="ab\n`~-*1.>|# []:(", max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_is_split_without_loss(text: str) -> None:
    pieces = split(text, PARSER)
    if pieces:
        assert "".join(p.source for p in pieces) == text
    lay(PARSER.parse(text), 20, bare)
