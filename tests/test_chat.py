"""Presets, rendering, the splitter (streamed = whole, tags never leak), and asking."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

from mimo_local.chat import (
    PRESETS,
    Chat,
    Message,
    Piece,
    Splitter,
    ToolCall,
    ask,
    mimo_system,
    preset,
)  # fmt: skip
from mimo_local.errors import MimoError, UsageError
from mimo_local.events import Done, Failed, Prefill
from mimo_local.sampler import SamplingParams
from mimo_local.settings import describe


def split(parts: Sequence[str], *, opened: bool = False) -> tuple[str, str]:
    """(thinking, answer) of a stream given in parts."""
    splitter = Splitter(opened=opened)
    pieces = [piece for part in parts for piece in splitter.push(part)] + splitter.flush()
    assert all(piece.text for piece in pieces)
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, key=["thinking", "answer"].index)
    texts = {"thinking": "", "answer": ""}
    for piece in pieces:
        texts[piece.kind] += piece.text
    return texts["thinking"], texts["answer"]


# ---- presets -------------------------------------------------------------------------------------


def test_presets_are_the_published_ones() -> None:
    assert {
        name: (p.temperature, p.top_p, p.max_tokens, p.repetition_penalty)
        for name, p in PRESETS.items()
    } == {
        "summarize": (0.5, 0.85, 1024, 1.1),
        "code": (0.6, 0.9, 2048, 1.2),
        "math": (0.4, 0.8, 512, 1.05),
        "chat": (0.7, 0.9, 512, 1.1),
        "agent": (0.3, 0.95, 2048, 1.0),
        "default": (0.8, 0.95, 1024, 1.0),
    }
    assert all(p.name == name and p.description for name, p in PRESETS.items())


def test_docs_and_help_name_the_presets() -> None:
    docs = Path(__file__).parent.parent / "docs" / "settings.md"
    section = docs.read_text(encoding="utf-8").split("## Presets")[1].split("\n## ")[0]
    rows = [[c.strip(" `") for c in line.split("|")[1:-1]] for line in section.splitlines()]
    table = {row[0]: [float(c) for c in row[1:]] for row in rows[4:] if len(row) == 5}
    assert table == {
        name: [p.temperature, p.top_p, p.max_tokens, p.repetition_penalty]
        for name, p in PRESETS.items()
    }
    assert set(describe("preset").split(": ")[1].split(", ")) == set(PRESETS)


def test_a_preset_gives_way_to_what_the_user_set() -> None:
    params = preset("code").params(temperature=0.0, top_k=5, seed=None)
    assert params == SamplingParams(0.0, 0.9, 5, 0.0, 1.2, None, 2048)
    with pytest.raises(UsageError, match="haiku") as caught:
        preset("haiku")
    assert "summarize" in caught.value.hint


# ---- rendering -----------------------------------------------------------------------------------


class Recorder(FakeTokenizer):
    """Keeps what the template was given; may pose as MiMo's own tokenizer."""

    def __init__(self, ids: Mapping[str, int] | None = None) -> None:
        self.ids = ids or {}
        self.seen: dict[str, Any] = {}

    def token_id(self, text: str) -> int | None:
        return self.ids.get(text)

    def render_chat(
        self, messages: Any, *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> Any:
        self.seen = {"messages": messages, "prompt": add_generation_prompt, **kwargs}
        return super().render_chat(messages, **kwargs)


MIMO = {"<|im_end|>": 151645, "<think>": 151667}


def test_the_template_gets_turns_reasoning_and_both_switches() -> None:
    tokenizer = Recorder()
    turns = [Message("user", "a"), Message("assistant", "b", "why"), Message("user", "c")]
    Chat(turns, thinking=True).render(tokenizer)
    assert tokenizer.seen == {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "why"},
            {"role": "user", "content": "c"},
        ],
        "prompt": True,
        "enable_thinking": True,
        "keep_all_reasoning": False,
    }


@pytest.mark.parametrize(
    ("ids", "system", "said"),
    [
        ({}, "", None),
        ({}, "Be brief.", "Be brief."),
        (MIMO, "Be brief.", "Be brief."),
        (MIMO, "", mimo_system(date(2026, 3, 1))),
    ],
)
def test_the_recommended_system_prompt_is_for_mimo_and_gives_way(
    ids: dict[str, int], system: str, said: str | None
) -> None:
    tokenizer = Recorder(ids)
    chat = Chat([Message("user", "hi")], system=system, began=date(2026, 3, 1))
    chat.render(tokenizer)
    first = tokenizer.seen["messages"][0]
    assert (first["content"] if first["role"] == "system" else None) == said
    own = [Message("system", "mine"), Message("user", "hi")]
    Chat(own, system=system).render(tokenizer)
    assert [m["content"] for m in tokenizer.seen["messages"]] == ["mine", "hi"]


def test_the_recommended_system_prompt_names_date_and_weekday() -> None:
    text = mimo_system(date(2026, 3, 1))
    assert "You are MiMo, an AI assistant developed by Xiaomi." in text
    assert "March 1, 2026 Sunday" in text
    assert "December 2024" in text


# ---- splitter ------------------------------------------------------------------------------------

SAMPLES = {
    "hello": ("", "hello"),
    "<think>why</think>so": ("why", "so"),
    "\n <think>\n\nwhy not\n</think>\n\nso\n": ("why not", "so\n"),
    "<think></think>so": ("", "so"),
    "<think>\n\n</think>\n\nso": ("", "so"),
    "<think>never closed": ("never closed", ""),
    "<think>half a tag </thin": ("half a tag </thin", ""),
    "a <think>b</think> c": ("", "a <think>b</think> c"),
    "so</think>it": ("", "so</think>it"),
    "<think>a < b </ c</think>d</think>": ("a < b </ c", "d</think>"),
    "<thinking>x": ("", "<thinking>x"),
    "<thi": ("", "<thi"),
    "  \n": ("", "  \n"),
    "  indented": ("", "  indented"),
    "": ("", ""),
    "<think>x</think>": ("x", ""),
    "<think>a\n\nb</think>  c  d": ("a\n\nb", "c  d"),
}


@pytest.mark.parametrize("text", SAMPLES)
def test_whole_and_letter_by_letter_split_the_same(text: str) -> None:
    assert split([text]) == SAMPLES[text]
    assert split(list(text)) == SAMPLES[text]


@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "th", "ink>", "/", " ", "\n", "x", "yz"]),
        max_size=14,
    ).map("".join),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    opened=st.booleans(),
)
def test_any_cut_of_a_stream_splits_as_the_whole(text: str, cuts: list[int], opened: bool) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    thinking, answer = split(parts, opened=opened)
    assert (thinking, answer) == split([text], opened=opened)
    if opened or text.lstrip().startswith("<think>"):
        assert "</think>" not in thinking
    else:
        assert (thinking, answer) == ("", text)


def test_a_prompt_that_opened_the_thinking() -> None:
    assert split(["\nwhy</think>", "\n\nso"], opened=True) == ("why", "so")


def test_text_comes_as_soon_as_it_is_certain() -> None:
    splitter = Splitter()
    assert splitter.push("<think>wh") == [Piece("thinking", "wh")]
    assert splitter.push("y ") == [Piece("thinking", "y")]
    assert splitter.push("not") == [Piece("thinking", " not")]
    assert splitter.push("</thi") == []
    assert splitter.push("nk>") == []
    assert splitter.push("\n") == []
    assert splitter.push("so") == [Piece("answer", "so")]
    assert splitter.push(" <think") == [Piece("answer", " <think")]


# ---- asking --------------------------------------------------------------------------------------


def question(text: str = "hi", **kwargs: Any) -> Chat:
    return Chat([Message("user", text)], **kwargs)


def test_an_answer_is_streamed_split_and_kept() -> None:
    engine: Any = FakeEngine(["<thi", "nk>why</think>", "so ", "it is"])
    chat = question(thinking=True, preset="math")
    reply = ask(engine, engine.new_session(), chat)
    events = list(reply)
    assert [type(e) for e in events[:3]] == [Prefill] * 3
    assert events[3:-1] == [
        Piece("thinking", "why"),
        Piece("answer", "so "),
        Piece("answer", "it is"),
    ]
    assert isinstance(events[-1], Done)
    assert (reply.text, reply.reasoning) == ("so it is", "why")
    assert chat.messages[1:] == [Message("assistant", "so it is", "why")]
    request = engine.requests[0]
    assert request.prompt == "<user>hi\n<assistant>"
    assert request.params == preset("math").params()


def test_params_and_stop_texts_are_passed_on() -> None:
    engine: Any = FakeEngine()
    params = SamplingParams(seed=4)
    list(ask(engine, engine.new_session(), question(), params, stop=["x"]))
    assert (engine.requests[0].params, engine.requests[0].stop) == (params, ("x",))


def test_a_cancelled_answer_is_kept() -> None:
    engine: Any = FakeEngine()
    engine.queue("half", " an", hold=True)
    chat = question()
    reply = ask(engine, engine.new_session(), chat)
    for event in reply:
        if event == Piece("answer", " an"):
            reply.cancel()
    assert isinstance(event, Done)
    assert event.reason == "cancelled"
    assert chat.messages[-1] == Message("assistant", "half an")


def test_a_failed_answer_is_not_kept() -> None:
    engine: Any = FakeEngine()
    engine.queue("half", error=MimoError("broken", hint="mend it"))
    chat = question()
    last = list(ask(engine, engine.new_session(), chat))[-1]
    assert isinstance(last, Failed)
    assert chat.messages == [Message("user", "hi")]


def test_a_prompt_that_opens_the_thinking_is_noticed() -> None:
    engine: Any = FakeEngine(["why</think>so"])

    def render_chat(messages: Any, **kwargs: Any) -> list[int]:
        return [ord(c) for c in "<assistant><think>\n"]

    engine.tokenizer.render_chat = render_chat
    reply = ask(engine, engine.new_session(), question())
    list(reply)
    assert (reply.reasoning, reply.text) == ("why", "so")


def test_what_cannot_be_answered_is_refused() -> None:
    engine: Any = FakeEngine()
    session = engine.new_session()
    for chat in (Chat(), Chat([Message("user", "a"), Message("assistant", "b")])):
        with pytest.raises(UsageError, match="nothing to answer"):
            ask(engine, session, chat)
    with pytest.raises(UsageError, match="haiku"):
        ask(engine, session, question(preset="haiku"))
    engine.tokenizer = None
    with pytest.raises(UsageError, match="tokenizer"):
        ask(engine, session, question())


def test_importing_chat_is_light() -> None:
    code = (
        "import sys, mimo_local.chat; "
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- tools ---------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'


def test_calls_are_told_and_kept() -> None:
    engine = FakeEngine(["I look. ", CALL[:20], CALL[20:]])
    chat = Chat([Message("user", "hi")], tools=(TOOL,))
    told = [event for event in ask(engine, None, chat) if isinstance(event, (Piece, ToolCall))]
    call = told[-1]
    assert isinstance(call, ToolCall) and (call.name, call.arguments) == ("look", '{"at": "it"}')
    assert chat.messages[-1] == Message("assistant", "I look.", tool_calls=(call,))
    chat.messages.append(Message("tool", "it is red", tool_call_id=call.id))
    engine.queue("Red.")
    list(ask(engine, None, chat))
    assert chat.messages[-1] == Message("assistant", "Red.")


def test_without_tools_a_call_is_just_text() -> None:
    chat = Chat([Message("user", "hi")])
    list(ask(FakeEngine([CALL]), None, chat))
    assert chat.messages[-1] == Message("assistant", CALL)


class Plain(Recorder):
    """Its template knows nothing of tools."""

    def template_says(self, text: str) -> bool:
        return False


def test_a_template_without_tools_gets_them_as_text() -> None:
    tokenizer = Plain()
    calls = (ToolCall("1", "look", '{"at": "it"}'), ToolCall("2", "look", "{}"))
    turns = [
        Message("user", "hi"),
        Message("assistant", "Yes.", tool_calls=calls),
        Message("tool", "red", tool_call_id="1"),
    ]
    Chat(list(turns), system="Be brief.", tools=(TOOL,)).render(tokenizer)
    system, user, assistant, tool = tokenizer.seen["messages"]
    assert "tools" not in tokenizer.seen
    assert system["content"].startswith("Be brief.\n\n") and '"look"' in system["content"]
    assert (user["content"], tool["content"]) == ("hi", "red")
    assert assistant["content"].startswith("Yes.\n<tool_call>") and "tool_calls" not in assistant
    assert assistant["content"].count("<tool_call>") == 2
    Chat(list(turns), tools=(TOOL,)).render(tokenizer)
    assert [m["role"] for m in tokenizer.seen["messages"]][:2] == ["system", "user"]
    own = Message("system", "Mine.")
    Chat([own, *turns], tools=(TOOL,)).render(tokenizer)
    assert tokenizer.seen["messages"][0]["content"].startswith("Mine.\n\n")
    assert len(tokenizer.seen["messages"]) == 4
    # Earlier calls are told though there are no tools any more.
    Chat(list(turns)).render(tokenizer)
    assert "<tool_call>" in tokenizer.seen["messages"][1]["content"]
    assert tokenizer.seen["messages"][0]["role"] == "user"
