"""Where a sentence comes from when the model does not say: the page whose words it uses.

A small model writes summaries without page marks. `mark_by_words` gives a sentence the mark of the
page that shares its rare words, if one page clearly does; a sentence of the model's own invention
gets none. The result says that its marks were found this way. Knows no model; `job` calls it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mimo_local.summarize.chunks import Block
from mimo_local.summarize.sentences import split_sentences

SHARE = 0.5
"""A page has to hold half of a sentence's weight in a stretch of neighbouring sentences."""
MARGIN = 1.15
"""The best page has to beat the second by 15 %: a sentence that fits two pages fits none."""
STRETCH = 3
"""Sentences looked at together: a summary's sentence often joins two or three."""

MOST_CHARACTERS = 2_000_000
"""Beyond this the table of words would take more than 100 MB; then parts keep their stretches."""

Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Stretch:
    place: Place
    words: frozenset[str]


class Matcher:
    """The words of everything the model read, by page."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        texts: dict[Place, list[str]] = {}
        for block in blocks:
            texts.setdefault((block.document, block.page), []).append(block.text)
        self._stretches: list[_Stretch] = []
        seen: Counter[str] = Counter()
        n_sentences = 0
        for place, parts in texts.items():
            sentences = [_words(s) for s in split_sentences(" ".join(" ".join(parts).split()))]
            n_sentences += len(sentences)
            for sentence in sentences:
                seen.update(sentence)
            for i in range(len(sentences)):
                together = frozenset[str]().union(*sentences[i : i + STRETCH])
                self._stretches.append(_Stretch(place, together))
        # A word in every sentence weighs nothing, a word in one weighs most; an unknown word more.
        self._weights = {w: math.log((n_sentences + 1) / n) for w, n in seen.items()}
        self._unknown = math.log(n_sentences + 1)
        self._where: dict[str, list[int]] = {}
        for i, stretch in enumerate(self._stretches):
            for word in stretch.words:
                self._where.setdefault(word, []).append(i)

    def page_of(self, sentence: str) -> Place | None:
        """The one page this sentence can be from, or None."""
        words = _words(sentence)
        total = sum(self._weights.get(w, self._unknown) for w in words)
        if len(words) < 3 or total == 0:
            return None
        scores: dict[int, float] = {}
        for word in words:
            for i in self._where.get(word, ()):
                scores[i] = scores.get(i, 0.0) + self._weights[word]
        best: dict[Place, float] = {}
        for i, score in scores.items():
            place = self._stretches[i].place
            best[place] = max(best.get(place, 0.0), score)
        ranked = sorted(best.items(), key=lambda item: -item[1])
        if not ranked or ranked[0][1] < SHARE * total:
            return None
        if len(ranked) > 1 and ranked[0][1] < MARGIN * ranked[1][1]:
            return None
        return ranked[0][0]


def mark_by_words(text: str, matcher: Matcher, tag: dict[Place, str]) -> str:
    """The text with a page's mark behind each sentence that can be from that page alone.

    Neighbouring sentences of one page share the mark of the last.
    """
    lines = []
    for line in text.split("\n"):
        sentences = split_sentences(line)
        places = [matcher.page_of(sentence) for sentence in sentences]
        lines.append("".join(_marked(sentences, places, tag)))
    return "\n".join(lines)


def _marked(
    sentences: Sequence[str], places: Sequence[Place | None], tag: dict[Place, str]
) -> Iterable[str]:
    for i, (sentence, place) in enumerate(zip(sentences, places, strict=True)):
        following = places[i + 1] if i + 1 < len(places) else None
        if place is None or place == following:
            yield sentence
            continue
        body = sentence.rstrip()
        end = re.search(r"[.!?。！？]+[\"”’»)]*$", body)
        cut = end.start() if end else len(body)
        yield f"{body[:cut]} {tag[place]}{body[cut:]}{sentence[len(body) :]}"


def _words(text: str) -> frozenset[str]:
    """Words of three letters or more without a plural's s, and every pair of CJK characters."""
    found: set[str] = set()
    for word in re.findall(r"[^\W_]{2,40}", text.casefold()):
        if re.search(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", word):
            found.update(word[i : i + 2] for i in range(len(word) - 1))
        elif len(word) >= 3 or word.isdigit():
            found.add(word[:-1] if len(word) > 3 and word.endswith("s") else word)
    return frozenset(found)
