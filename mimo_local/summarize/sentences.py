"""Where sentences end, and the small repairs a written answer needs. Text only.

Knows no model and no document; `chunks` cuts with it, `runner` tidies answers with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = re.compile(r"[\[(][^\[\]()\n]{0,120}[\])]|[.!?]+[\"”’»)]*(?=\s|\[|$)|[。！？]+[」』”]*")
# "p. 8-9:" alone on a line is the heading of a note, copied.
_BARE_PLACE = re.compile(r"(?:\S+ )?(?:p|sec)\. [\w.]+(?:-[\w.]+)?:")
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


def tidy(text: str, *, cut_off: bool = False, task: str = "") -> str:
    """An answer without "Here is the summary:", echoes, repetitions, or a torn end.

    `task`: the instruction; a sentence that only repeats its words is an echo.
    """
    text = _PREAMBLE.sub("", re.sub(r"</?(?:text|notes)\d*>", "", text).strip())
    if cut_off:
        text = _to_last_sentence(text)
    lines = [line for line in text.split("\n") if not _BARE_PLACE.fullmatch(line.strip())]
    return re.sub(r"\n\s*(?:\d+[.)]|[-*•])\s*\Z", "", "\n".join(_once(lines, task))).strip()


def _once(lines: list[str], task: str) -> Iterator[str]:
    """Small models loop and echo: a sentence of 4 words or more is kept once, the task's never."""
    seen: set[str] = set()
    asked = set(re.findall(r"\w+", task.casefold()))
    for line in lines:
        kept = []
        for sentence in split_sentences(line):
            bare = re.sub(r"\[[^\[\]]*\]", "", sentence)
            words = re.findall(r"\w+", bare.casefold())
            key = " ".join(words)
            if len(words) >= 4 and key in seen:
                continue
            # 0.85: echoes drop or change a word; real sentences share about half with the task.
            if len(words) >= 4 and sum(w in asked for w in words) >= 0.85 * len(words):
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
