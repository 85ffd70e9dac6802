"""Text to ids and back, and the checkpoint's own chat template in a sandbox.

Text that a person wrote never becomes a control token: added tokens are taken out of the encoder
and put back only where the template itself wrote them. Byte-level BPE only, as the whole model
family is. Knows no torch, no model and no roles; `engine` and `chat` call it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from mimo_local.chat_template import ChatTemplate, halves
from mimo_local.errors import TokenizerError

END_OF_TURN: Final = ("<|im_end|>", "<|endoftext|>")
"""ChatML's two ends. Configs of this family often name only one; both always stop."""
MARKUP: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Read by the layers above, so decoded as text even where a tokenizer calls them special."""


class Tokenizer:
    """One model's vocabulary, stop ids and chat template; immutable, usable from any thread."""

    stop_ids: tuple[int, ...]
    """Ids that end an answer."""
    vocab_size: int
    """Highest id + 1; the model's logits may have more rows, padded to a round number."""

    def __init__(
        self,
        definition: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """`definition`, `options`: tokenizer.json and tokenizer_config.json; templates by name."""
        _require_byte_level(definition)
        options = options or {}
        self._added = _added_tokens(definition, options)
        bare = {**definition, "added_tokens": [], "post_processor": None}
        bare |= {"truncation": None, "padding": None}  # a tokenizer.json may cut silently
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(bare))
        self._ids = {token["content"]: i for i, token in self._added.items()}
        self._bytes = {i: token["content"].encode() for i, token in self._added.items()}
        self._hidden = frozenset(
            i
            for i, token in self._added.items()
            if token.get("special") and token["content"] not in MARKUP
        )
        own = self._encoder.get_vocab_size(with_added_tokens=False)
        self.vocab_size = max(own, *(i + 1 for i in self._added), 0)
        self._names = {
            key: text
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(options.get(key))) is not None
        }
        ends = [*END_OF_TURN, self._names.get("eos_token", "")]
        stops = {*stop_ids, *(self._ids[text] for text in ends if text in self._ids)}
        self.stop_ids = tuple(sorted(stops))
        strips = {
            token["content"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in self._added.values()
        }
        self._chat = ChatTemplate(templates or {}, self._names, strips)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer files of a pack or checkpoint; TokenizerError names the bad file."""
        folder = Path(path)
        definition = _read_json(folder / "tokenizer.json", required=True)
        options = _read_json(folder / "tokenizer_config.json")
        stops: list[int] = []
        for name in ("generation_config.json", "config.json"):
            eos = _read_json(folder / name).get("eos_token_id")
            stops += [eos] if isinstance(eos, int) else eos or []
        try:
            return cls(
                definition,
                options=options,
                templates=_read_templates(folder, options),
                stop_ids=stops,
            )
        except TokenizerError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{folder / 'tokenizer.json'} cannot be used: {error}",
                hint="fetch the tokenizer files of the model again",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text; control tokens in it stay text. Surrogates become U+FFFD."""
        text = _SURROGATE.sub("\ufffd", text)  # not encodable, so no tokenizer takes them
        ids = list(self._encoder.encode(text, add_special_tokens=False).ids)
        if self._added.keys().isdisjoint(ids):
            return ids
        # The vocabulary itself spells an added token: encode its halves apart.
        parts = self._encoder.encode_batch(
            halves(text, self._chat.starts), add_special_tokens=False
        )
        return [i for part in parts for i in part.ids]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; `special` shows control tokens too. Unknown ids give nothing."""
        decoder = self.stream(special=special)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def stream(self, *, special: bool = False) -> StreamDecoder:
        """Decode id by id."""
        return StreamDecoder(self.bytes_of, frozenset() if special else self._hidden)

    def bytes_of(self, token: int) -> bytes:
        """The bytes an id stands for, looked up on first use: all 152k at once take 0.5 s."""
        found = self._bytes.get(token)
        if found is None:
            text = self._encoder.id_to_token(token) if token >= 0 else None
            found = self._bytes[token] = _from_alphabet(text or "")
        return found

    def token_id(self, text: str) -> int | None:
        """Id of an added token such as `<|im_end|>`, or None."""
        return self._ids.get(text)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that are no text of an answer: they end it, or are never shown."""
        return self._hidden | set(self.stop_ids)

    def template_says(self, text: str) -> bool:
        """Whether the chat template contains a text: `tools`, for one that knows of tools."""
        return self._chat.says(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation by the checkpoint's template; `kwargs` go to the template.

        Control tokens inside the messages stay text. TokenizerError: no template, or it fails.
        """
        ids: list[int] = []
        pieces = self._chat.render(messages, add_generation_prompt, kwargs)
        for piece, is_token in pieces:
            ids += [self._ids[piece]] if is_token else self.encode(piece)
        return ids


class StreamDecoder:
    """Ids to text, one at a time; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, bytes_of: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._bytes_of, self._hidden = bytes_of, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text this id completes; empty inside a character and for control tokens."""
        if token in self._hidden:
            return ""
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        """End of the stream: an unfinished character becomes U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes as characters: those that print stay, others start at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET: Final = _byte_alphabet()


def _from_alphabet(token: str) -> bytes:
    """The bytes a vocabulary entry spells; one not written in the alphabet means itself."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _added_tokens(
    definition: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[int, Mapping[str, Any]]:
    """Id -> added token, of tokenizer.json and, where it lacks some, of tokenizer_config.json."""
    more = {int(i): token for i, token in options.get("added_tokens_decoder", {}).items()}
    own = {token["id"]: token for token in definition.get("added_tokens") or []}
    return {i: token for i, token in (more | own).items() if token["content"]}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _require_byte_level(definition: Mapping[str, Any]) -> None:
    decoder = definition.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        raise TokenizerError(
            f"tokenizer.json decodes with {decoder.get('type')!r}, not with ByteLevel",
            hint="the MiMo family uses byte-level BPE: check that the files belong together",
        )


def _read_templates(folder: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: chat_template.jinja, else the one or the list in the tokenizer config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    template = options.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    return {entry["name"]: entry["template"] for entry in template or []}


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except FileNotFoundError as error:
        if not required:
            return {}
        raise TokenizerError(
            f"{path} is missing", hint="put the model's tokenizer files into its folder"
        ) from error
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{path} cannot be read: {error}", hint="fetch the tokenizer files of the model again"
        ) from error
