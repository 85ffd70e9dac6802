"""Calls of functions as models write them, inside `<tool_call>`: text to calls and back.

Two forms: the MiMo family's `<function=NAME><parameter=P>VALUE</parameter></function>`, and JSON
with name and arguments as Qwen and Hermes templates want it. Knows no stream and no template;
`answer_parts` and `chat` call it.
"""

from __future__ import annotations

import html
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_FUNCTION: Final = re.compile(r"\s*<function=([^<>\n]+)>(.*?)(?:</function>|$)", re.S)
_PARAMETER: Final = re.compile(r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>", re.S)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the model wants called. `arguments`: a JSON object as text."""

    id: str
    name: str
    arguments: str


def parse(body: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[ToolCall]:
    """The calls in the text between `<tool_call>` and its end; none if it is not well formed.

    `tools`: their schemas say which type a value written as text has.
    """
    try:
        found = _json(body) if body.lstrip()[:1] in ("{", "[") else _tags(body, tools)
        texts = [(name, json.dumps(given, ensure_ascii=False)) for name, given in found]
    except (ValueError, RecursionError):  # also what is nested too deep to be read
        return []
    return [ToolCall(f"call_{secrets.token_hex(12)}", name, text) for name, text in texts]


def _tags(body: str, tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    calls, at = [], 0
    while body[at:].strip():
        function = _FUNCTION.match(body, at)
        if function is None:
            raise ValueError("something beside a function")
        given: dict[str, Any] = {}
        name, inner, place = function[1].strip(), function[2], 0
        schemas = _properties(name, tools)
        # A value may spell </function>: the parameters decide where the function ends.
        start = function.start(2)
        while (parameter := _PARAMETER.match(body, start + place)) is not None:
            key = parameter[1].strip()
            given[key] = convert(html.unescape(parameter[2]), schemas.get(key))
            place = parameter.end() - start
        rest = re.compile(r"\s*(</function>|$)").match(body, start + place)
        if rest is None or not name:
            raise ValueError(f"something beside parameters: {inner[:20]}")
        calls.append((name, given))
        at = rest.end()
    if not calls:
        raise ValueError("nothing")
    return calls


def _json(body: str) -> list[tuple[str, dict[str, Any]]]:
    found = json.loads(body, parse_constant=_refuse)
    calls = []
    for call in found if isinstance(found, list) else [found]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            raise ValueError("no name")
        given = call.get("arguments", call.get("parameters"))
        given = json.loads(given, parse_constant=_refuse) if isinstance(given, str) else given
        if not isinstance(given or {}, dict):
            raise ValueError("arguments are no object")
        calls.append((call["name"], given or {}))
    if not calls:
        raise ValueError("nothing")
    return calls


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _properties(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The schemas of a function's parameters, as far as they are usable."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            found = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return found if isinstance(found, Mapping) else {}
    return {}


def convert(text: str, schema: Any) -> Any:
    """A value written as text, by its declared type; what does not fit stays text, null is None."""
    if text.strip() == "null":
        return None
    declared = schema.get("type") if isinstance(schema, Mapping) else None
    for kind in declared if isinstance(declared, list) else [declared]:
        try:
            return _typed(text.strip(), kind) if kind != "string" else text
        except (ValueError, RecursionError, TypeError):
            continue
    return text


def _typed(text: str, kind: Any) -> Any:
    if kind == "boolean" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "integer":
        return int(text)
    if kind == "number":
        number = float(text)
        if not math.isfinite(number):
            raise ValueError("no number JSON knows")
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else number
    if kind in ("object", "array"):
        value = json.loads(text, parse_constant=_refuse)
        if isinstance(value, dict if kind == "object" else list):
            return value
    raise ValueError(f"not of type {kind}")


# ---- for templates that have no place for tools --------------------------------------------------


def description(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a system prompt says about tools where the model's template says nothing."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You can call these functions, given as JSON schemas:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call one, answer with nothing but its name and arguments as JSON, like this:\n"
        '<tool_call>\n{"name": "the function", "arguments": {"a parameter": "its value"}}\n'
        "</tool_call>"
    )


def as_text(calls: Sequence[ToolCall]) -> str:
    """Calls the way `description` asks for them, for the same templates."""
    return "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n'
        "</tool_call>"
        for call in calls
    )
