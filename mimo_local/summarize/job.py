"""One summary in the making: what fits goes in one pass, the rest is mapped and merged.

`Job` decides sizes, builds prompts, and puts the result together; `Runner` talks to the engine,
`Sources` knows pages, `pack` cuts. Called by `summarize` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mimo_local.chat import preset
from mimo_local.documents import Document
from mimo_local.errors import ContextOverflowError, DocumentError, MimoError
from mimo_local.sampler import SamplingParams
from mimo_local.summarize import prompts
from mimo_local.summarize.chunks import Block, blocks_of, pack
from mimo_local.summarize.citations import Checked
from mimo_local.summarize.matching import MOST_CHARACTERS, Matcher, mark_by_words
from mimo_local.summarize.prompts import Messages
from mimo_local.summarize.runner import EngineLike, Meter, OnEvent, Runner, Written
from mimo_local.summarize.sources import Sources, places
from mimo_local.summarize.store import Store
from mimo_local.summarize.types import Figures, Mode, Options, Part, Summary

SLACK = 16
"""Tokens left free in every prompt: joining pieces can cost one more here and there."""
PART_TOKENS = (1500, 32768)
"""Least and most tokens of a part, a quarter of the context between them: a 135 M model keeps
hold of 2000 tokens, and no model of 60 000 as well as of twice 30 000."""
NARROW = 1024
"""Hidden size below which a model gets the plain wording: the 135 M demo (576) takes page marks for
words of the text and writes on about `[p. 2]`."""
ROUNDS = 8
"""Rounds of merging; each at least halves the notes, so 8 are enough for 256 parts a prompt."""


@dataclass(frozen=True, slots=True)
class Note:
    """What the model wrote about these blocks."""

    blocks: tuple[Block, ...]
    text: str


class Job:
    """One summary: `run` once."""

    def __init__(
        self,
        engine: EngineLike,
        documents: Sequence[Document],
        options: Options,
        work_dir: Path | None,
        on_event: OnEvent | None,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self.started = time.monotonic()
        self.options = options
        self.sources = Sources(documents, options.pages)
        self.words = prompts.words_of(options.length)
        self.context = engine.context_limit
        self.marked = _hidden_size(engine) >= NARROW
        params = _params(options)
        self.answer = _answer_tokens(options, params.max_tokens, self.words, self.context)
        self.store = Store(work_dir)
        self.meter = Meter(on_event)
        self.runner = Runner(engine, params, self.store, self.meter, cancel)
        self.removed = 0
        self.warnings = [w for d in self.sources.documents for w in d.warnings]

    def run(self) -> Summary:
        """One pass if prompt and answer fit the context, else map and merge."""
        documents = self.sources.documents
        blocks = blocks_of(documents, self._count, self.context)
        if not blocks:
            raise DocumentError(
                f"there is no text in {', '.join(d.name for d in documents)}",
                hint="scans need OCR first, for example `ocrmypdf in.pdf out.pdf`",
            )
        if sum(b.tokens for b in blocks) + self.answer < self.context:
            messages = self._whole(blocks)
            size = len(self.runner.ids(messages))
            if size + self.answer <= self.context:
                return self._one_pass(blocks, messages, size)
        limit = self._part_limit()
        blocks = blocks_of(documents, self._count, max(16, limit // 8))
        return self._map_and_merge(blocks, limit)

    def _one_pass(self, blocks: list[Block], messages: Messages, size: int) -> Summary:
        self.meter.expect(size, min(self.answer, 2 * self.words))
        written = self.runner.write(
            messages, self.answer, reading="reading", writing="summarizing", keep=False
        )
        checked = self._checked(written, blocks)
        part = Part(
            where=self.sources.where(blocks),
            title=self.sources.title(blocks),
            tokens=size,
            notes="",
            cited=bool(checked.citations) and not checked.matched,
        )
        return self._summary(checked, "one pass", (part,), blocks)

    def _map_and_merge(self, blocks: list[Block], limit: int) -> Summary:
        most = self._note_tokens(limit)
        groups, asks, sizes = self._divided(blocks, limit, most)
        for size in sizes:
            self.meter.expect(size, most // 2)
        self.meter.expect(len(groups) * most // 2, 2 * self.words)
        kept = sum(self.runner.is_kept(messages, most) for messages in asks)
        if kept:
            self.meter.tell(f"going on: {kept} of {len(asks)} parts are finished already")
        parts: list[Part] = []
        notes: list[Note] = []
        for i, (group, messages, size) in enumerate(zip(groups, asks, sizes, strict=True)):
            stage = f"part {i + 1} of {len(groups)}"
            written = self.runner.write(
                messages,
                most,
                reading=f"reading {stage}",
                writing=f"writing notes on {stage}",
                keep=True,
            )
            checked = self._checked(written, group)
            note = Note(tuple(group), self._sourced(checked, group))
            where = self.sources.where(group)
            cited = bool(checked.citations) and not checked.matched
            title = self.sources.title(group)
            parts.append(Part(where, title, size, note.text, cited, written.reused))
            if note.text:
                notes.append(note)
            else:
                self.warnings.append(f"the model wrote nothing on {where}")
        if not notes:
            raise _silent()
        heard = [block for note in notes for block in note.blocks]
        return self._summary(self._merged(notes, limit), "map and merge", tuple(parts), heard)

    def _divided(
        self, blocks: list[Block], limit: int, most: int
    ) -> tuple[list[list[Block]], list[Messages], list[int]]:
        """Parts, their prompts and the true sizes of these; smaller parts if one is too big."""
        tag = self._count(self.sources.longest_mark()) + 4
        while True:
            groups = pack(blocks, limit, tag_tokens=tag)
            asks = [self._part(group, i, len(groups)) for i, group in enumerate(groups)]
            sizes = [len(self.runner.ids(messages)) for messages in asks]
            if max(sizes) + most <= self.context:
                return groups, asks, sizes
            limit = limit * 7 // 8

    def _merged(self, notes: list[Note], limit: int) -> Checked:
        """Notes to the summary; where they do not fit together, in rounds of shorter notes."""
        everything = [block for note in notes for block in note.blocks]
        most = self._note_tokens(limit) * 3 // 2
        for level in range(1, ROUNDS + 1):
            fits = len(self.runner.ids(self._merge(notes, self.words))) + self.answer
            total = sum(self._count(note.text) for note in notes)
            if len(notes) == 1 or (fits <= self.context and total <= 2 * limit):
                break
            groups = self._grouped(notes, limit)
            shorter = []
            for i, group in enumerate(groups):
                stage = f"notes {i + 1} of {len(groups)}, round {level}"
                written = self.runner.write(
                    self._merge(group, None),
                    most,
                    reading=f"reading {stage}",
                    writing=f"merging {stage}",
                    keep=True,
                )
                blocks = [block for note in group for block in note.blocks]
                text = self._sourced(self._checked(written, blocks), blocks)
                shorter.append(Note(tuple(blocks), text or group[0].text))
            notes = shorter
        written = self.runner.write(
            self._merge(notes, self.words),
            self.answer,
            reading="reading the notes",
            writing="summarizing",
            keep=False,
        )
        return self._checked(written, everything)

    def _grouped(self, notes: list[Note], limit: int) -> list[list[Note]]:
        """Neighbouring notes, two or more a prompt, sizes as even as can be."""
        sizes = [self._count(note.text) + SLACK for note in notes]
        share = sum(sizes) / -(-sum(sizes) // limit)
        groups: list[list[Note]] = [[]]
        held = 0
        for i, (note, size) in enumerate(zip(notes, sizes, strict=True)):
            full = len(groups[-1]) >= 2 and held + size > min(limit, share * 1.1)
            if full and i < len(notes) - 1:  # a last note alone would gain nothing
                groups.append([])
                held = 0
            groups[-1].append(note)
            held += size
        return groups

    # -- sizes

    def _count(self, text: str) -> int:
        return len(self.runner.engine.tokenizer.encode(text))

    def _note_tokens(self, limit: int) -> int:
        """Longest note on a part of `limit` tokens: 64 tokens for each sentence it may have."""
        return max(32, min(64 * _sentences(limit)[1], self.context // 8))

    def _part_limit(self) -> int:
        """Tokens of text one part may have; ContextOverflowError if the context is too small."""
        least, most = PART_TOKENS
        wanted = min(max(self.context // 4, least), most)
        mark = self.sources.longest_mark()
        empty = prompts.part_messages(
            f"part 1000 of 1000 of {self.sources.name} ({mark}{mark})",
            "",
            sentences=_sentences(wanted),
            mark=mark,
            lang=self.options.lang,
            focus=self.options.focus,
        )
        overhead = len(self.runner.ids(empty)) + self._note_tokens(wanted) + SLACK
        room = self.context - overhead
        if room < 64 or self.answer > self.context // 2:
            raise ContextOverflowError(
                f"a context of {self.context} tokens is too small to summarize in: "
                f"instructions and notes take {overhead}, the summary {self.answer}",
                hint="give more context with --context, or a smaller --max-tokens",
            )
        return min(wanted, room)

    # -- prompts

    def _whole(self, blocks: list[Block]) -> Messages:
        return prompts.whole_messages(
            self.sources.name,
            self.sources.text(blocks, marked=self.marked),
            words=self.words,
            mark=self._mark(blocks),
            lang=self.options.lang,
            focus=self.options.focus,
        )

    def _part(self, group: list[Block], i: int, n: int) -> Messages:
        several = len({block.document for block in group}) > 1
        where = self.sources.name if several else self.sources.where(group)
        return prompts.part_messages(
            f"part {i + 1} of {n} of {self.sources.name} ({where})",
            self.sources.text(group, marked=self.marked),
            sentences=_sentences(sum(block.tokens for block in group)),
            mark=self._mark(group),
            lang=self.options.lang,
            focus=self.options.focus,
        )

    def _merge(self, notes: Sequence[Note], words: int | None) -> Messages:
        blocks = [block for note in notes for block in note.blocks]
        if self.marked:
            texts = [f"{self.sources.where(note.blocks)}:\n{note.text}" for note in notes]
        else:  # no page is given, so every mark goes
            texts = [self.sources.anchors.check(note.text, ()).text for note in notes]
        return prompts.merge_messages(
            self.sources.name,
            texts,
            words=words,
            mark=self._mark(blocks),
            lang=self.options.lang,
            focus=self.options.focus,
        )

    def _mark(self, blocks: Sequence[Block]) -> str:
        return self.sources.mark(blocks) if self.marked else ""

    # -- the result

    def _checked(self, written: Written, blocks: Sequence[Block]) -> Checked:
        given = places(blocks)
        checked = self.sources.anchors.check(written.text, given)
        self.removed += checked.removed
        if not checked.citations and sum(len(b.text) for b in blocks) <= MOST_CHARACTERS:
            tags = {place: self.sources.anchors.tag(*place) for place in given}
            matched = mark_by_words(checked.text, Matcher(blocks), tags)
            checked = replace(self.sources.anchors.check(matched, given), matched=True)
        if written.reason == "length" and not written.reused:
            self.warnings.append("an answer reached its longest length and was cut at a sentence")
        elif written.reason == "context":
            self.warnings.append("an answer was cut because the context was full")
        return checked

    def _sourced(self, checked: Checked, blocks: Sequence[Block]) -> str:
        """Notes with a source: if the model named no page, the stretch it had before it."""
        if not checked.text or checked.citations:
            return checked.text
        return f"{checked.text} [{', '.join(self.sources.wheres(blocks))}]"

    def _summary(
        self, checked: Checked, mode: Mode, parts: tuple[Part, ...], heard: Sequence[Block]
    ) -> Summary:
        if not checked.text:
            raise _silent()
        return Summary(
            text=checked.text,
            citations=checked.citations,
            coverage=self.sources.coverage(heard),
            parts=parts,
            mode=mode,
            documents=tuple(d.name for d in self.sources.documents),
            pages=self.sources.n_pages,
            unit=self.sources.unit,
            model=self.runner.engine.name,
            warnings=tuple(self._all_warnings(checked, heard)),
            stats=self._figures(),
            sources=self.sources.explained(),
        )

    def _all_warnings(self, checked: Checked, heard: Sequence[Block]) -> list[str]:
        warnings = list(dict.fromkeys(self.warnings))
        if checked.citations and checked.matched:
            warnings.append("the model named no pages: marks are where the words of a sentence are")
        elif not checked.citations:
            warnings.append(
                f"the model named no pages: all of this is from {self.sources.where(heard)}"
            )
        if self.removed:
            plural = "s" if self.removed > 1 else ""
            warnings.append(f"{self.removed} page mark{plural} removed: no such page was read")
        if self.sources.anchors.own_labels:
            warnings.append("pages are called what the document calls them, not counted from 1")
        if self.store.problem:
            warnings.append(self.store.problem)
        return warnings

    def _figures(self) -> Figures:
        stats = self.runner.stats
        return Figures(
            prompt_tokens=sum(s.prompt_tokens for s in stats),
            completion_tokens=sum(s.completion_tokens for s in stats),
            prefill_s=sum(s.prefill_s for s in stats),
            decode_s=sum(s.decode_s for s in stats),
            seconds=time.monotonic() - self.started,
            requests=len(stats),
            reused_parts=self.runner.reused,
            removed_citations=self.removed,
        )


def _hidden_size(engine: EngineLike) -> int:
    """The model's width; a remote endpoint tells none and counts as large."""
    return int(getattr(getattr(engine, "config", None), "hidden_size", NARROW))


def _sentences(tokens: int) -> tuple[int, int]:
    """How many sentences of notes a part of so many tokens gets."""
    if tokens <= 3000:
        return 3, 5
    return (6, 10) if tokens <= 10_000 else (12, 20)


def _answer_tokens(options: Options, most: int, words: int, context: int) -> int:
    """Longest summary in tokens: what was asked for, else by its words within the preset's most."""
    if options.max_tokens is not None:
        return options.max_tokens
    # 2.5 tokens a word leave room for marks, and for languages that need more than English.
    wanted = int(words * 2.5) + 96
    if words <= prompts.LENGTHS["long"]:
        wanted = min(wanted, most)
    return max(32, min(wanted, context // 4))


def _params(options: Options) -> SamplingParams:
    """The preset's sampling parameters with what the options set themselves."""
    return preset(options.preset).params(
        temperature=options.temperature,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _silent() -> MimoError:
    return MimoError(
        "the model wrote nothing", hint="try another --seed, or a higher --temperature"
    )
