"""How many tokens a text has for a model that is somewhere else.

Asks the server's `/tokenize` (vLLM, SGLang, llama-server, `mimo serve`) where there is one, else
estimates, rather too many than too few. Called by `backend`; chat and summarize use it in place of
a tokenizer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PER_MESSAGE = 8
"""Tokens of a template around one message: role and marks."""
REMEMBERED = 4096
"""Counts kept: a summary asks for the same text several times."""
Ask = Callable[[dict[str, Any]], Any]


def estimate(text: str) -> int:
    """Tokens without a tokenizer: 3.5 ASCII characters each, else nearly one a character.

    MiMo's own vocabulary gives 4.2 to 4.6 characters of English a token, 3 to 3.5 of code, and
    1.3 to 1.6 of Chinese: this is above all of them but dense code.
    """
    plain = sum(map(str.isascii, text))
    return math.ceil(plain / 3.5 + (len(text) - plain) * 0.9)


class RemoteTokenizer:
    """Counts only: the ids are the server's where it tells them, else zeros."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, ask: Ask | None) -> None:
        """`ask`: sends a request to `/tokenize`, None where there is none."""
        self._ask = ask
        self._counts: OrderedDict[str, list[int]] = OrderedDict()

    @property
    def exact(self) -> bool:
        """Whether the server counts."""
        return self._ask is not None

    def encode(self, text: str) -> list[int]:
        """As many ids as the text has tokens."""
        if not text:
            return []
        if self._ask is None:
            return [0] * estimate(text)
        found = self._counts.get(text)
        if found is None:
            # llama-server calls it `content`; everyone else lets it pass.
            ids = ids_of(self._ask({"prompt": text, "content": text, "add_special_tokens": False}))
            found = [0] * estimate(text) if ids is None else ids
            self._counts[text] = found
            if len(self._counts) > REMEMBERED:
                self._counts.popitem(last=False)
        else:
            self._counts.move_to_end(text)
        return found

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **_: Any,
    ) -> list[int]:
        """As many ids as the conversation has tokens: its texts, and some for the template."""
        found: list[int] = []
        for message in messages:
            found += self.encode(str(message.get("content") or ""))
            found += [0] * PER_MESSAGE
        return found + [0] * (PER_MESSAGE if add_generation_prompt else 0)


def ids_of(answer: Any) -> list[int] | None:
    """The ids in an answer of `/tokenize`, in any of its shapes; None if there are none."""
    if not isinstance(answer, dict):
        return None
    tokens, count = answer.get("tokens"), answer.get("count")
    if isinstance(tokens, list) and tokens and all(isinstance(t, int) for t in tokens):
        return tokens
    return [0] * count if isinstance(count, int) and 0 < count < 1 << 28 else None
