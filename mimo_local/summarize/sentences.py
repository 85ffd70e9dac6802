"""Where sentences end, and the small repairs a written answer needs. Text only.

Knows no model and no document; `chunks` cuts with it, `runner` tidies answers with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = re.compile(r"[\[(][^\[\]()\n]{0,120}[\])]|[.!?]+[\"”’»)]*(?=\s|\[|$)|[。！？]+[」』”]*")
_PREAMBLE = re.compile(
    r"\A(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)|the following is|(?:the )?summary"
    r"|(?:the )?key points)\b[^\n.]{0,120}:\s*\n*",
    re.IGNORECASE,
)


def split_sentences(text: str) -> list[str]:
    """Sentences with the blanks behind them; joined they are the text. Marks [p. 3] stay on."""
    out, start, pending = [], 0, -1
    for match in _END.finditer(text):
        mark = text[match.start()] in "[("
        if pending >= 0 and not (mark and not text[pending : match.start()].strip()):
            out.append(text[start:pending])
            start = pending
            pending = -1
        if mark and pending < 0:
            continue
        pending = _past_blanks(text, match.end())
    if start < pending < len(text):
        out.append(text[start:pending])
        start = pending
    if start < len(text):
        out.append(text[start:])
    return out


def _past_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def tidy(text: str, *, cut_off: bool = False) -> str:
    """An answer without "Here is the summary:", echoed fences, repetitions, or a torn end."""
    text = _PREAMBLE.sub("", re.sub(r"</?(?:text|notes)\d*>", "", text).strip())
    if cut_off:
        text = _to_last_sentence(text)
    return "\n".join(_once(text.split("\n"))).strip()


def _once(lines: list[str]) -> Iterator[str]:
    """Small models fall into loops: a sentence of 4 words or more is kept once."""
    seen: set[str] = set()
    for line in lines:
        kept = []
        for sentence in split_sentences(line):
            bare = re.sub(r"\[[^\[\]]*\]", "", sentence)
            words = re.findall(r"\w+", bare.casefold())
            key = " ".join(words)
            if len(words) >= 4 and key in seen:
                continue
            seen.add(key)
            kept.append(sentence)
        if kept or not line.strip():
            yield "".join(kept).rstrip()


def _to_last_sentence(text: str) -> str:
    """Drop an unfinished last sentence if that leaves at least half of the text."""
    sentences = split_sentences(text)
    if len(sentences) > 1 and not re.search(r"[.!?。！？\])\"”’»]\s*$", sentences[-1]):
        kept = "".join(sentences[:-1]).rstrip()
        if len(kept) * 2 >= len(text):
            return kept
    return text
