"""Calls out of a stream: both forms, types, thinking, hostile text; streamed = whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimo_local.answer_parts import Part, Piece, Splitter
from mimo_local.tool_calls import ToolCall, as_text, convert, description, parse

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "share": {"type": "number"},
                    "now": {"type": "boolean"},
                    "tags": {"type": "array"},
                    "more": {"type": "object"},
                    "either": {"type": ["integer", "string"]},
                },
            },
        },
    },
)
Seen = tuple[str, ...]
WEATHER = "<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n"
CALL = f"<tool_call>\n{WEATHER}</tool_call>"
CALLED: Seen = ("call", "get_weather", '{"city": "Paris"}')
JSON_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def seen(parts: Sequence[Part]) -> list[Seen]:
    """Parts without ids, neighbours of one kind joined."""
    out: list[Seen] = []
    for part in parts:
        if isinstance(part, ToolCall):
            assert part.id.startswith("call_")
            out.append(("call", part.name, part.arguments))
        elif out and out[-1][0] == part.kind:
            out[-1] = (part.kind, out[-1][1] + part.text)
        else:
            out.append((part.kind, part.text))
    return out


def split(chunks: Sequence[str], tools: Any = TOOLS, *, opened: bool = False) -> list[Seen]:
    splitter = Splitter(opened=opened, tools=tools)
    return seen([part for chunk in chunks for part in splitter.push(chunk)] + splitter.flush())


CASES: dict[str, list[Seen]] = {
    CALL: [CALLED],
    JSON_CALL: [CALLED],
    f"Let me look.\n{CALL}": [("answer", "Let me look."), CALLED],
    f"{CALL}{CALL}": [CALLED, CALLED],
    f"{CALL}\n{JSON_CALL}\n": [CALLED, CALLED],
    f"<tool_call>{WEATHER}{WEATHER}</tool_call>": [CALLED, CALLED],
    f"<think>need it</think>{CALL}": [("thinking", "need it"), CALLED],
    # Written while thinking: recovered, and the thinking goes on.
    f"<think>need it {CALL} so</think>Done": [
        ("thinking", "need it"), CALLED, ("thinking", "so"), ("answer", "Done"),
    ],
    f"<think>x{CALL}": [("thinking", "x"), CALLED],
    f"<think>x<tool_call>{WEATHER}</think>Done": [("thinking", "x"), CALLED, ("answer", "Done")],
    # No call at all.
    "a < b and <tool_box>": [("answer", "a < b and <tool_box>")],
    "write <tool_call> around it": [("answer", "write <tool_call> around it")],
    "<think>the <tool_call> form</think>Yes": [
        ("thinking", "the <tool_call> form"), ("answer", "Yes"),
    ],
    "<tool_call>{broken}</tool_call> then": [("answer", "<tool_call>{broken}</tool_call> then")],
    "<tool_call>\n<function=f>oops</tool_call>": [
        ("answer", "<tool_call>\n<function=f>oops</tool_call>"),
    ],
    # The end cut something off: no part of it is text.
    "ok <tool_call": [("answer", "ok ")],
    "ok <tool_call>": [("answer", "ok")],
    "ok <tool_call>\n<function=get_weather>\n<parameter=city>Par": [("answer", "ok")],
    '<tool_call>{"name": "get_weather", "argu': [],
    # ... but a call that lacks only its last tag is one.
    f"<tool_call>\n{WEATHER}": [CALLED],
    # Tags inside values.
    "<tool_call><function=f><parameter=a>x </tool_call> </think> y</parameter></function>"
    "</tool_call>": [("call", "f", '{"a": "x </tool_call> </think> y"}')],
    '<tool_call>{"name": "f", "arguments": {"a": "\\" </tool_call>"}}</tool_call>z': [
        ("call", "f", '{"a": "\\" </tool_call>"}'), ("answer", "z"),
    ],
    "<tool_call><function=f><parameter=a>if a: </function> b</parameter></function></tool_call>": [
        ("call", "f", '{"a": "if a: </function> b"}'),
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_whole_and_letter_by_letter(text: str) -> None:
    assert split([text]) == CASES[text]
    assert split(list(text)) == CASES[text]


WORDS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<"),
        *("<parameter=a>", "</parameter>", '{"name": "f", "arguments": {}}', '"', "\\", "a", " "),
        *(CALL, JSON_CALL, "<tool", "</thi", "{", "[", "é", "\n"),
    ]
)


@given(st.lists(WORDS, max_size=12).map("".join), st.data(), st.booleans())
@example("<tool_call><tool_call>{", None, False)
def test_any_chunking_gives_the_same_parts(text: str, data: Any, opened: bool) -> None:
    whole = split([text], opened=opened)
    assert split(list(text), opened=opened) == whole
    if data is not None and text:
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5).map(sorted))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert split(chunks, opened=opened) == whole
    for part in whole:
        if part[0] == "call":
            assert isinstance(json.loads(part[2]), dict)


def test_without_tools_a_call_is_text() -> None:
    assert split([CALL], ()) == [("answer", CALL)]


def test_what_was_cut_off_is_kept_aside() -> None:
    splitter = Splitter(tools=TOOLS)
    assert splitter.push('<tool_call>{"na') == splitter.flush() == []
    assert splitter.unfinished == '<tool_call>{"na'


def test_a_long_call_does_not_take_quadratic_looking() -> None:
    value = 'line "x" </tool_cal\n' * 2000
    text = f"<tool_call><function=f><parameter=a>{value}</parameter></function></tool_call>"
    splitter, parts = Splitter(tools=TOOLS), list[Part]()
    for n in range(0, len(text), 7):
        parts += splitter.push(text[n : n + 7])
    assert seen(parts) == [("call", "f", json.dumps({"a": value}))]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", " as it is\n", " as it is\n"),
        ("city", "a &lt;b&gt; &amp; c", "a <b> & c"),
        ("city", "null", None),
        ("days", "3", 3),
        ("days", "\n3\n", 3),
        ("days", "three", "three"),
        ("days", "9" * 5000, "9" * 5000),  # more digits than Python turns into a number
        ("share", "2.5", 2.5),
        ("share", "2", 2),
        ("share", "1e999", "1e999"),
        ("share", "nan", "nan"),
        ("now", "True", True),
        ("now", "yes", "yes"),
        ("tags", '["a", 1]', ["a", 1]),
        ("tags", '{"a": 1}', '{"a": 1}'),
        ("tags", "[" * 100_000, "[" * 100_000),
        ("tags", "[NaN]", "[NaN]"),
        ("more", '{"a": {"b": null}}', {"a": {"b": None}}),
        ("either", "7", 7),
        ("either", "x", "x"),
        ("unheard_of", "7", "7"),
    ],
)
def test_values_get_their_declared_type(name: str, text: str, value: Any) -> None:
    (call,) = parse(f"<function=get_weather><parameter={name}>{text}</parameter></function>", TOOLS)
    assert json.loads(call.arguments) == {name: value}


@pytest.mark.parametrize(
    "tools",
    [[{}], [{"function": 3}], [{"function": {"name": "f", "parameters": []}}]]
    + [[{"function": {"name": "f", "parameters": {"properties": {"a": bad}}}}]
       for bad in (3, {"type": 7}, {"type": {}}, {"type": [[], "integer"]})],
)  # fmt: skip
def test_schemas_nobody_expects(tools: Any) -> None:
    (call,) = parse("<function=f><parameter=a>1</parameter></function>", tools)
    assert json.loads(call.arguments)["a"] in (1, "1")


@pytest.mark.parametrize(
    "body",
    [
        *("", "{}", "[]", '{"name": 3}', '{"name": "f", "arguments": [1]}', "[" * 100_000),
        *('{"name": "f", "arguments": "no json"}', '{"name": "f", "arguments": {"a": NaN}}'),
        *("<function=>x</function>", "<function=f><parameter=a>1</function>"),
    ],
)
def test_what_is_no_call(body: str) -> None:
    assert parse(body) == []


def test_json_calls_of_other_shapes() -> None:
    inner = '{"name": "f", "arguments": "{\\"a\\": 1}"}'
    both = parse(f'[{inner}, {{"name": "g", "parameters": {{"b": 2}}}}, {{"name": "h"}}]')
    assert [(call.name, json.loads(call.arguments)) for call in both] == [
        ("f", {"a": 1}), ("g", {"b": 2}), ("h", {}),
    ]  # fmt: skip
    assert len({call.id for call in both}) == 3


def test_calls_written_as_text_are_read_back() -> None:
    calls = parse(WEATHER * 2, TOOLS)
    assert split([as_text(calls)]) == [CALLED, CALLED]
    assert '"get_weather"' in description(TOOLS)
    assert convert("x", None) == "x"
    assert Piece("answer", "x") == Piece("answer", "x")
