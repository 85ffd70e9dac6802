from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.commands import ALIASES, COMMANDS, BadCommand, Command, parse, suggest, unescape

PRESETS = ("chat", "code", "math")


@pytest.mark.parametrize("spec", COMMANDS, ids=lambda s: s.name)
def test_every_command_of_the_table_is_understood_alone(spec) -> None:
    expected = "toggle" if spec.name == "think" else ""
    assert parse(f"/{spec.name}", PRESETS) == Command(spec.name, expected)
    assert parse(f"/{spec.name.upper()}  ", PRESETS) == Command(spec.name, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/preset code", Command("preset", "code")),
        ("/preset CODE", Command("preset", "code")),
        ("/system You are\na pirate.  ", Command("system", "You are\na pirate.")),
        ("/system -", Command("system", "-")),
        ("/think ON", Command("think", "on")),
        ("/think no", Command("think", "off")),
        ("/?", Command("help")),
        ("/quit", Command("exit")),
    ],
)
def test_arguments_are_checked_and_stripped(text: str, expected: Command) -> None:
    assert parse(text, PRESETS) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/presets", "`/preset`"),
        ("/foo", "`/help`"),
        ("/preset poetry", "chat, code, math"),
        ("/think maybe", "on|off"),
        ("/clear all", "alone"),
    ],
)
def test_a_mistake_names_the_way_out(text: str, says: str) -> None:
    bad = parse(text, PRESETS)
    assert isinstance(bad, BadCommand)
    assert says in bad.hint


@pytest.mark.parametrize(
    "text", ["/etc/fstab is broken", "//clear", " /clear", "a /clear", "/ clear", "/1", "", "hello"]
)
def test_prompts_stay_prompts(text: str) -> None:
    assert parse(text, PRESETS) is None


def test_a_double_slash_sends_one() -> None:
    assert unescape("//clear") == "/clear"
    assert unescape("/etc/fstab") == "/etc/fstab"


@given(st.text())
def test_parsing_never_raises_and_prompts_pass_unchanged(text: str) -> None:
    parse(text, PRESETS)
    suggest(text, PRESETS)
    if not text.startswith("/"):
        assert parse(text, PRESETS) is None
        assert unescape(text) == text


@given(st.sampled_from([c.name for c in COMMANDS]), st.integers(1, 8))
def test_every_prefix_of_a_command_suggests_it(name: str, n: int) -> None:
    assert f"/{name}" in [s.insert.strip() for s in suggest("/" + name[:n], PRESETS)]


@given(st.text(alphabet="abcdehlmnoprstxy", max_size=5))
def test_a_taken_suggestion_is_a_command(prefix: str) -> None:
    for suggestion in suggest(f"/{prefix}", PRESETS):
        assert isinstance(parse(suggestion.insert, PRESETS), Command)


def test_arguments_are_suggested_too() -> None:
    assert [s.insert for s in suggest("/preset c", PRESETS)] == ["/preset chat", "/preset code"]
    assert [s.insert for s in suggest("/think ", PRESETS)] == ["/think on", "/think off"]
    assert suggest("/system be brief", PRESETS) == ()
    assert suggest("hello /he", PRESETS) == ()


def test_aliases_point_at_commands() -> None:
    assert set(ALIASES.values()) <= {c.name for c in COMMANDS}
