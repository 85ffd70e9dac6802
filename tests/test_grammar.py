"""Constraints: random models under them write what was promised, thinking first where it may."""

from __future__ import annotations

import contextlib
import json
import random
import time
from typing import Any

import pytest
import torch
from test_tokenizer import make

from mimo_local.errors import UsageError
from mimo_local.grammar import Grammars, calls_grammar, json_grammar
from mimo_local.tokenizer import Tokenizer
from mimo_local.tool_calls import parse

PADDED = 640
"""Rows of the logits: more than the tokenizer has ids, as the real model's."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string"},
                    "times": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"enum": ["kg", 'a "quoted" one', 7]},
                    "point": {"$ref": "#/$defs/point", "type": "object"},
                },
                "required": ["word", "times", "unit", "point"],
                "$defs": {
                    "point": {
                        "type": "object",
                        "properties": {"x": {"type": "boolean"}},
                        "required": ["x"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    assert tokenizer.vocab_size < PADDED
    return Grammars(tokenizer, PADDED)


def write(
    grammars: Grammars,
    tokenizer: Tokenizer,
    lark: str,
    seed: int,
    *,
    wish: str = "",
    most: int = 4000,
    **how: bool,
) -> tuple[str, list[int]]:
    """What a random model writes; it starts with the ids of `wish` where it may."""
    constraint = grammars.compile(lark).constraint(**how)
    chance, ids = random.Random(seed), list[int]()
    wanted = [tokenizer.token_id(wish)] if tokenizer.token_id(wish) else []
    # Characters that end things are liked, or a random text would be endless.
    liked = [i for i in range(tokenizer.vocab_size) if tokenizer.bytes_of(i)[:1] in b'"<}],/>']
    for _ in range(most):
        logits = torch.tensor([chance.gauss(0, 1) for _ in range(PADDED)])
        logits[liked] += 4
        logits[list(tokenizer.stop_ids)] += 4
        if not wanted and chance.random() < 0.1:
            wanted = tokenizer.encode("</parameter>")[::-1]  # nobody writes that by chance
        if wanted:
            logits[wanted.pop()] = 100
        masked = constraint.mask(logits)
        allowed = masked > float("-inf")
        assert allowed.any()
        assert constraint._thinks or not allowed[tokenizer.vocab_size :].any()
        assert torch.equal(masked[allowed], logits[allowed])
        token = int(masked[: tokenizer.vocab_size].argmax())
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
        if constraint.advance(token):
            break
    else:
        raise AssertionError("endless")
    return tokenizer.decode(ids), ids


@pytest.mark.parametrize("seed", range(5))
def test_json_for_a_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    text, _ = write(grammars, tokenizer, json_grammar(SCHEMA), seed)
    found = json.loads(text)
    assert list(found) == ["name", "age", "tags"]
    assert isinstance(found["name"], str) and len(found["name"]) <= 5
    assert 0 <= found["age"] <= 99 and set(found["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("seed", range(3))
def test_any_object(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    text, _ = write(grammars, tokenizer, json_grammar(None), seed)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_calls(grammars: Grammars, tokenizer: Tokenizer, tags: bool, seed: int) -> None:
    lark = calls_grammar(TOOLS, tags=tags, many=False)
    text, _ = write(grammars, tokenizer, lark, seed)
    (call,) = parse(text.removeprefix("<tool_call>").removesuffix("</tool_call>"), TOOLS)
    found = json.loads(call.arguments)
    assert call.name in ("look_up", "stop")
    if call.name == "look_up":
        assert {"word", "times", "unit", "point"} <= set(found)
        assert 1 <= found["times"] <= 9
        assert found["unit"] in ("kg", 'a "quoted" one', 7, "7")
        assert found["point"] in ({"x": True}, {"x": False})


@pytest.mark.parametrize("tags", [True, False])
def test_both_calls_come_up_and_many_may_follow(
    grammars: Grammars, tokenizer: Tokenizer, tags: bool
) -> None:
    lark = calls_grammar(TOOLS[1:], tags=tags, many=True)
    counts = {write(grammars, tokenizer, lark, seed)[0].count("<tool_call>") for seed in range(6)}
    assert min(counts) >= 1 and max(counts) <= 16


def test_calls_or_json_instead(grammars: Grammars, tokenizer: Tokenizer) -> None:
    lark = calls_grammar(TOOLS[1:], tags=True, many=True, instead=SCHEMA)
    allowed = grammars.compile(lark).constraint()._allowed(PADDED)
    begins = {tokenizer.bytes_of(i)[:1] for i in range(tokenizer.vocab_size) if allowed[i]}
    assert begins == {b"<", b"{"}
    text, _ = write(grammars, tokenizer, lark, 1)
    assert text.startswith("<tool_call>\n<function=stop>")


@pytest.mark.parametrize("seed", range(3))
def test_the_constraint_begins_behind_the_thinking(
    grammars: Grammars, tokenizer: Tokenizer, seed: int
) -> None:
    lark = json_grammar(SCHEMA)
    text, ids = write(grammars, tokenizer, lark, seed, wish="<think>", thinking=True)
    thought, close, answer = text.partition("</think>")
    assert thought.startswith("<think>") and close
    assert "age" in json.loads(answer)
    assert not set(ids) & set(tokenizer.stop_ids)
    # It may also leave the thinking out, but only JSON comes then.
    text, _ = write(grammars, tokenizer, lark, seed, wish="lo", thinking=True)
    json.loads(text.rpartition("</think>")[2])
    # Not allowed to think: the tag is no JSON.
    text, _ = write(grammars, tokenizer, lark, seed, wish="<think>")
    json.loads(text)
    # The template has opened the thinking.
    text, _ = write(grammars, tokenizer, lark, seed, thinking=True, opened=True)
    json.loads(text.partition("</think>")[2])


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "frob"}, "frob"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://127.0.0.1/x"}, "not present"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "format": "weird"}, "weird"),
    ],
)
def test_a_schema_that_cannot_be_used_says_why(
    grammars: Grammars, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        grammars.compile(json_grammar(schema))
    assert len(caught.value.message) < 400 and caught.value.hint


def test_a_hostile_schema_ends_soon(grammars: Grammars, tokenizer: Tokenizer) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"k{n}": {"type": "integer"} for n in range(3000)}}
    regex = {"type": "string", "pattern": "^(a|b|ab|ba)*(a{1,999}b{1,999}){1,99}$"}
    for schema in (deep, wide, regex):
        start = time.process_time()
        with contextlib.suppress(UsageError, AssertionError):
            write(grammars, tokenizer, json_grammar(schema), 1, most=50)
        assert time.process_time() - start < 20


def test_an_error_on_the_way_is_an_error_and_no_empty_mask(grammars: Grammars) -> None:
    constraint = grammars.compile(json_grammar(SCHEMA)).constraint()
    with pytest.raises(UsageError, match="schema"):
        constraint.advance(7 if not constraint._allowed(PADDED)[7] else 8)


def test_two_constraints_of_one_grammar_do_not_know_each_other(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    grammar = grammars.compile(json_grammar(None))
    one, two = grammar.constraint(), grammar.constraint()
    (brace,) = tokenizer.encode("{")
    one.advance(brace)
    assert two._allowed(PADDED)[brace] and not one._allowed(PADDED)[brace]
