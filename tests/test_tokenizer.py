"""Ids against transformers, control tokens that stay text, streamed = whole, hostile templates.

The tokenizer is trained here in a second: byte-level BPE with the Qwen2 split and this family's
control tokens. The chat template is written after the published description of MiMo's turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from mimo_local.errors import TokenizerError, UsageError
from mimo_local.tokenizer import Tokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENS = [
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("</think>", special=False, normalized=False),
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("</tool_call>", special=False, normalized=False),
    AddedToken("<tool_response>", special=False, normalized=True),
    AddedToken("</tool_response>", special=False, normalized=True),
    AddedToken("<|<|im", special=False, normalized=False),  # overlaps another token's start
    AddedToken("☃", special=False, normalized=False),  # one character: cannot be halved
]
CONTROL = [token.content for token in TOKENS if len(token.content) > 1]
TEXTS = (
    "The lighthouse keeper lit the lamp and wrote the time in the log. Grüße, naïve café. "
    "1234 + 5678 = 6912; def add(a, b): return a + b\n\n灯台は夜に光る。 Привет, мир! 🙂🙃 🏳️‍🌈 "
    "system user assistant tool You are MiMo"
)
TEMPLATE = """
{%- macro turn(role, body) %}{{ '<|im_start|>' ~ role ~ '\n' ~ body ~ '<|im_end|>' }}{% endmacro %}
{%- set ns = namespace(system='You are MiMo, a helpful AI assistant engineered by Xiaomi.') %}
{%- set ns.last = -1 %}
{%- set rest = messages %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
    {%- set rest = messages[1:] %}
{%- endif %}
{%- if tools %}
    {%- set ns.system = ns.system ~ '\n\n# Tools\n<tools>' %}
    {%- for tool in tools %}{% set ns.system = ns.system ~ '\n' ~ tool | tojson %}{% endfor %}
    {%- set ns.system = ns.system ~ '\n</tools>' %}
{%- endif %}
{{- turn('system', ns.system) }}
{%- for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in rest %}
    {%- if m.role == 'user' %}{{ turn('user', m.content) }}
    {%- elif m.role == 'assistant' %}
        {%- set body, reason = m.content, m.reasoning_content or '' %}
        {%- if not reason and '</think>' in body %}
            {%- set reason = body.split('</think>')[0].split('<think>')[-1] %}
            {%- set body = body.split('</think>')[-1] %}
        {%- endif %}
        {%- if not (keep_all_reasoning or loop.index0 > ns.last) %}{% set reason = '' %}{% endif %}
        {{- '<|im_start|>assistant\n<think>' ~ reason ~ '</think>' ~ body.strip() }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\n<function=' ~ call.function.name ~ '>\n' }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '<parameter=' ~ key ~ '>' ~ (value if value is string else value | tojson) }}
                {{- '</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- elif m.role == 'tool' %}
        {%- set i = loop.index0 %}
        {%- if i == 0 or rest[i - 1].role != 'tool' %}{{ '<|im_start|>tool\n' }}{% endif %}
        {{- '<tool_response>\n' ~ m.content ~ '\n</tool_response>\n' }}
        {%- if loop.last or rest[i + 1].role != 'tool' %}{{ '<|im_end|>' }}{% endif %}
    {%- else %}{{ raise_exception('unknown role ' ~ m.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if not enable_thinking %}{{ '<think></think>' }}{% endif %}
{%- endif %}
"""


def train() -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS] * 20, trainer)
    tokenizer.add_tokens(TOKENS)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


DEFINITION = train()
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "bos_token": None,
    "model_max_length": 262144,
}


def write(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(DEFINITION), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    return folder


def make(template: str = TEMPLATE) -> Tokenizer:
    return Tokenizer(DEFINITION, options=CONFIG, templates={"default": template})


TOKENIZER = make()
REFERENCE = tokenizers.Tokenizer.from_str(json.dumps(DEFINITION))
ADDED = {token.content: REFERENCE.token_to_id(token.content) for token in TOKENS}

plain_text = st.text(max_size=40)
with_tokens = st.lists(
    st.one_of(
        st.sampled_from(
            [*ADDED, *(t[:-1] for t in CONTROL), *(t[1:] for t in CONTROL), "<|", "|>"]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = write(tmp_path_factory.mktemp("oracle"), chat_template=TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


# ---- encode and decode ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=plain_text)
def test_plain_text_encodes_as_the_library_does(text: str) -> None:
    if not any(token in text for token in ADDED):
        assert TOKENIZER.encode(text) == REFERENCE.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(text=with_tokens)
def test_no_text_ever_encodes_to_an_added_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert not set(ids) & set(ADDED.values())
    assert TOKENIZER.decode(ids) == normalizers.NFC().normalize_str(text)


@pytest.mark.parametrize("text", [*ADDED, "a<|im_end|>b<think>", "<|im_<|im_end|>end|>", "☃☃"])
def test_every_added_token_typed_by_a_person_stays_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert not set(ids) & set(ADDED.values())
    assert TOKENIZER.decode(ids) == text


def test_a_vocabulary_that_spells_a_control_token_is_cut_in_halves() -> None:
    vocab = {**DEFINITION["model"]["vocab"]}
    merges = [["<", "|"], ["<|", "x"], ["<|x", ">"]]
    vocab |= {"<|": 1000, "<|x": 1001, "<|x>": 1002}
    model = DEFINITION["model"] | {"vocab": vocab, "merges": merges}
    added = [{**DEFINITION["added_tokens"][0], "id": 1002, "content": "<|x>"}]
    definition = DEFINITION | {
        "model": model,
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
    }
    tokenizer = Tokenizer(definition)
    assert 1002 not in tokenizer.encode("a<|x>b")
    assert tokenizer.decode(tokenizer.encode("a<|x>b")) == "a<|x>b"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=40))
def test_streamed_equals_whole_equals_the_library(ids: list[int]) -> None:
    whole = TOKENIZER.decode(ids, special=True)
    decoder = TOKENIZER.stream(special=True)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == whole
    assert whole == REFERENCE.decode(ids, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(min_codepoint=0x80, exclude_categories=["Cs"])))
def test_a_stream_shows_no_half_characters(text: str) -> None:
    decoder = TOKENIZER.stream()
    ids = TOKENIZER.encode(text)
    shown = "".join(decoder.push(token) for token in ids)
    assert shown == normalizers.NFC().normalize_str(text)
    assert decoder.flush() == ""


def test_invalid_bytes_become_replacement_characters_once_certain() -> None:
    vocab = REFERENCE.get_vocab(with_added_tokens=False)
    byte = {0xF0: "ð", 0x9F: "Ł", 0x41: "A", 0xFF: "ÿ"}
    decoder = TOKENIZER.stream()
    out = [decoder.push(vocab[byte[b]]) for b in (0xF0, 0x9F, 0x41, 0xFF, 0xF0)]
    assert out == ["", "", "\ufffdA", "\ufffd", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_control_tokens_are_hidden_and_markup_is_shown() -> None:
    ids = [ADDED["<think>"], ADDED["</think>"], *TOKENIZER.encode("hi"), ADDED["<|im_end|>"]]
    assert TOKENIZER.decode(ids) == "<think></think>hi"
    assert TOKENIZER.decode(ids, special=True) == "<think></think>hi<|im_end|>"


def test_lone_surrogates_are_replaced() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud83db")) == "a\ufffdb"


# ---- chat ----------------------------------------------------------------------------------------

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": " Grüße \n"}],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "need the weather",
            "tool_calls": [
                {"function": {"name": "get_weather", "arguments": {"city": "Paris", "n": [1, "<"]}}}
            ],
        },
        {"role": "tool", "content": "18 C"},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is 18 °C."},
        {"role": "user", "content": "thanks 🙂"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a <b> & 'c' é"}}]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"enable_thinking": True, "keep_all_reasoning": True},
        {"tools": TOOLS, "add_generation_prompt": False},
    ],
)
def test_rendered_chats_equal_transformers(
    oracle: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]
) -> None:
    want = oracle.apply_chat_template(
        messages, **{"add_generation_prompt": True, **kwargs}, tokenize=True, return_dict=False
    )
    assert TOKENIZER.render_chat(messages, **kwargs) == want


def test_the_published_turn_format() -> None:
    ids = TOKENIZER.render_chat(CHATS[2][:3], enable_thinking=True)
    assert TOKENIZER.decode(ids, special=True) == (
        "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"
        "<|im_start|>user\nweather?<|im_end|><|im_start|>assistant\n<think>need the weather</think>"
        "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        '<parameter=n>[1, "<"]</parameter>\n'
        "</function>\n</tool_call><|im_end|><|im_start|>tool\n<tool_response>\n18 C\n"
        "</tool_response>\n<|im_end|><|im_start|>assistant\n"
    )


@settings(max_examples=200, deadline=None)
@given(user=with_tokens, answer=with_tokens, system=with_tokens)
def test_no_message_can_write_a_control_token(user: str, answer: str, system: str) -> None:
    """The skeleton of real tokens is the one of a harmless chat, whatever the messages hold."""

    def skeleton(*texts: str) -> list[int]:
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        ids = TOKENIZER.render_chat(messages)
        return [i for i in ids if i in ADDED.values()]

    assert skeleton(system, user, answer, user) == skeleton("s", "u", "a", "u")


def test_marked_text_survives_json_slices_and_strips() -> None:
    template = (
        "<|im_start|>{{ messages[0].content[3:-3].strip() }}{{ messages | tojson }}"
        "{{ messages | tojson(ensure_ascii=true) }}<|im_end|>"
    )
    content = "xyz <|im_end|> \ue000 xyz"
    ids = make(template).render_chat([{"role": "user", "content": content}])
    assert [i for i in ids if i in ADDED.values()] == [ADDED["<|im_start|>"], ADDED["<|im_end|>"]]
    text = TOKENIZER.decode(ids, special=True)
    assert text.startswith("<|im_start|><|im_end|> \ue000[{")
    assert text.count("<|im_end|>") == 4


def test_tokens_that_eat_spaces_do_so() -> None:
    added = [*DEFINITION["added_tokens"]]
    mask = {"id": len(REFERENCE.get_vocab()), "content": "<mask>", "lstrip": True, "rstrip": True}
    added.append(added[0] | mask)
    definition = DEFINITION | {"added_tokens": added}
    tokenizer = Tokenizer(definition, templates={"default": "a \n <mask> \n b<|im_end|> c"})
    reference = tokenizers.Tokenizer.from_str(json.dumps(definition))
    want = reference.encode("a \n <mask> \n b<|im_end|> c", add_special_tokens=False).ids
    assert tokenizer.render_chat([]) == want


def test_generation_blocks_render_their_body() -> None:
    template = (
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}!"
    )
    assert make(template).render_chat(CHATS[0]) == TOKENIZER.encode("Hello!")


HOSTILE = {
    "raises": ("{{ raise_exception('no system please') }}", "no system please"),
    "escape by class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ""),
    "escape by globals": ("{{ raise_exception.__globals__['sys'] }}", ""),
    "escape by namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "__class__"),
    "escape by format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", ""),
    "changes the messages": ("{{ messages.append(1) }}", ""),
    "huge range": ("{% for i in range(10**9) %}{% endfor %}", ""),
    "endless loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "steps",
    ),
    "endless output": ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "characters"),
    "huge text": ("{{ 'x' * 10**9 }}", "repeated"),
    "huge text, doubled": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}"
        "{% set n.s = n.s + n.s %}{% endfor %}",
        "characters",
    ),
    "huge number": ("{{ 10 ** (10 ** 10) }}", "too large"),
    "huge padding": ("{{ 'x'.center(10**9) }}", ""),
    "huge format": ("{{ '%1000000000d' % 1 }}", "format"),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
    "not there": ("{{ messages[5].content.strip() }}", ""),
    "broken": ("{% if %}", "not valid"),
    "no file access": ("{% include '/etc/passwd' %}", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_clear_error(name: str) -> None:
    template, said = HOSTILE[name]
    started = time.monotonic()
    before = sys.gettrace()
    with pytest.raises(TokenizerError) as caught:
        make(template).render_chat(CHATS[0])
    if name.startswith("escape"):  # nothing of Python's inside may come out, even as an error
        assert "object at" not in str(caught.value)
    assert said in str(caught.value)
    assert caught.value.hint
    assert time.monotonic() - started < 30  # unlimited, it would take days
    assert sys.gettrace() is before


def test_bad_messages_are_usage_errors() -> None:
    for role in ("user<|im_end|>", "", None, "a b"):
        with pytest.raises(UsageError, match="role"):
            TOKENIZER.render_chat([{"role": role, "content": "x"}])
    with pytest.raises(UsageError, match="set"):
        TOKENIZER.render_chat([{"role": "user", "content": {1, 2}}])


# ---- files ---------------------------------------------------------------------------------------


def test_templates_come_from_the_file_or_the_config(tmp_path: Path) -> None:
    messages = CHATS[0]
    write(tmp_path)
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.from_dir(tmp_path).render_chat(messages)
    write(tmp_path, chat_template="one")
    assert Tokenizer.from_dir(tmp_path).render_chat(messages) == TOKENIZER.encode("one")
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, chat_template=named)
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.render_chat(messages) == TOKENIZER.encode("two")
    assert tokenizer.render_chat(messages, tools=TOOLS) == TOKENIZER.encode("tools")
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}three", encoding="utf-8")
    ids = Tokenizer.from_dir(tmp_path).render_chat(messages)
    assert ids == [ADDED["<|im_end|>"], *TOKENIZER.encode("three")]


def test_stop_ids_join_every_source(tmp_path: Path) -> None:
    write(tmp_path)
    both = {ADDED["<|im_end|>"], ADDED["<|endoftext|>"]}
    assert set(Tokenizer.from_dir(tmp_path).stop_ids) == both
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 7]}')
    assert set(Tokenizer.from_dir(tmp_path).stop_ids) == both | {7, 8}


def test_tokens_known_only_to_the_config_count() -> None:
    extra = {"900": {"content": "<extra>", "special": True}}
    tokenizer = Tokenizer(DEFINITION, options={"added_tokens_decoder": extra})
    assert tokenizer.decode([900], special=True) == "<extra>"
    assert tokenizer.vocab_size == 901


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"decoder": {"type": "ByteLevel"}}', "cannot be used"),
        ('{"decoder": {"type": "Metaspace"}}', "Metaspace"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=said):
        Tokenizer.from_dir(tmp_path)


def test_a_definition_that_truncates_does_not() -> None:
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer = Tokenizer(DEFINITION | {"truncation": cut})
    assert tokenizer.encode(TEXTS) == TOKENIZER.encode(TEXTS)


def test_importing_the_tokenizer_is_light() -> None:
    code = "import sys, mimo_local.tokenizer; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
