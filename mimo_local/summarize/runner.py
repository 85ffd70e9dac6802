"""One request to the engine after another: progress, cancel, reuse of what is already written.

`Runner.write` turns messages into tidy text through the engine's public face only; `Meter` makes
progress with a time to go out of its events. Knows no pages. Called by `summarize`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mimo_local.answer_parts import Splitter, answer_text
from mimo_local.errors import CancelledError, ContextOverflowError
from mimo_local.events import Done, Event, Failed, FinishReason, Prefill, Progress, Stats, Token
from mimo_local.sampler import SamplingParams
from mimo_local.summarize.prompts import PROMPT_VERSION, Messages
from mimo_local.summarize.sentences import tidy
from mimo_local.summarize.store import Store

OnEvent = Callable[[Progress], None]
TICK_S = 0.1
"""At most ten progress events a second, however fast tokens come."""


class TokenizerLike(Protocol):
    """What is used of `mimo_local.tokenizer.Tokenizer`."""

    def encode(self, text: str) -> list[int]: ...  # noqa: D102

    def render_chat(  # noqa: D102
        self, messages: Sequence[Any], *, add_generation_prompt: bool = ..., **kwargs: Any
    ) -> list[int]: ...


class StreamLike(Protocol):
    """What is used of `mimo_local.engine.Stream`."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None: ...  # noqa: D102


class EngineLike(Protocol):
    """What is used of `mimo_local.engine.Engine`, and of `Remote` but for how it is asked."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def description(self) -> str: ...  # noqa: D102
    @property
    def tokenizer(self) -> Any: ...  # noqa: D102
    @property
    def context_limit(self) -> int: ...  # noqa: D102
    def submit(  # noqa: D102
        self, session: Any, ids: Sequence[int], params: SamplingParams, *, stop: Sequence[str] = ()
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Written:
    """What one request gave."""

    text: str
    reason: FinishReason
    stats: Stats
    reused: bool = False


class Meter:
    """Counts tokens of the whole job and predicts its end from the speeds measured so far."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event = on_event or (lambda _: None)
        self._done = 0
        self._ahead: list[tuple[int, int]] = []
        """Prompt and answer tokens of each request still to come."""
        self._prompt, self._prompt_s = 0, 0.0
        self._answer, self._answer_s = 0, 0.0
        self._told, self._topic = 0.0, ""

    def expect(self, prompt: int, answer: int, times: int = 1) -> None:
        """Say what is to come."""
        self._ahead += [(prompt, answer)] * times

    def begin(self) -> tuple[int, int]:
        """The next request starts; its expected sizes."""
        return self._ahead.pop(0) if self._ahead else (0, 0)

    def tell(self, stage: str, now: int = 0, left: tuple[int, int] = (0, 0)) -> None:
        """Progress: `now` tokens into a request that has `left` (prompt, answer) tokens to go."""
        moment, topic = time.monotonic(), stage.split(",")[0]
        if now and topic == self._topic and moment - self._told < TICK_S:
            return
        self._told, self._topic = moment, topic
        prompt = left[0] + sum(p for p, _ in self._ahead)
        answer = left[1] + sum(a for _, a in self._ahead)
        eta = None
        if self._prompt_s > 0 and self._answer_s > 0:
            eta = prompt * self._prompt_s / self._prompt + answer * self._answer_s / self._answer
        done = self._done + now
        self._on_event(Progress(stage, done, done + prompt + answer, "tokens", eta))

    def finish(self, stats: Stats) -> None:
        """A request is over: learn its speeds."""
        new = stats.prompt_tokens - stats.cached_tokens
        if new > 0 and stats.prefill_s > 0:
            self._prompt, self._prompt_s = self._prompt + new, self._prompt_s + stats.prefill_s
        if stats.completion_tokens > 0 and stats.decode_s > 0:
            self._answer += stats.completion_tokens
            self._answer_s += stats.decode_s
        self._done += stats.prompt_tokens + stats.completion_tokens


class Runner:
    """Asks the engine, request by request, and keeps what it wrote."""

    def __init__(
        self,
        engine: EngineLike,
        params: SamplingParams,
        store: Store,
        meter: Meter,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self.engine, self.params, self.store, self.meter = engine, params, store, meter
        self._cancel = cancel or (lambda: False)
        self.stats: list[Stats] = []
        self.reused = 0

    def ids(self, messages: Messages) -> list[int]:
        """The prompt as the model gets it, thinking off."""
        tokenizer: TokenizerLike = self.engine.tokenizer
        return list(
            tokenizer.render_chat(messages, add_generation_prompt=True, enable_thinking=False)
        )

    def key(self, messages: Messages, max_tokens: int) -> str:
        """The name under which an answer to this is kept."""
        p = replace(self.params, max_tokens=max_tokens)
        settings = [p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty, p.seed]
        model = [self.engine.name, self.engine.description]
        return Store.key(PROMPT_VERSION, model, settings, max_tokens, messages)

    def is_kept(self, messages: Messages, max_tokens: int) -> bool:
        """Whether an earlier run has written this."""
        return self.store.get(self.key(messages, max_tokens)) is not None

    def write(
        self, messages: Messages, max_tokens: int, *, reading: str, writing: str, keep: bool
    ) -> Written:
        """The answer, tidied. `keep`: reuse an earlier one, and store this one for later.

        ContextOverflowError, CancelledError, or what the engine failed with.
        """
        key = self.key(messages, max_tokens)
        prompt, answer = self.meter.begin()
        found = self.store.get(key) if keep else None
        if found is not None and isinstance(found.get("text"), str):
            self.reused += 1
            self.meter.finish(Stats(prompt_tokens=prompt, completion_tokens=answer))
            return Written(found["text"], "stop", Stats(), reused=True)
        ids = self.ids(messages)
        limit = self.engine.context_limit
        if len(ids) + max_tokens > limit:
            raise ContextOverflowError(
                f"{len(ids)} tokens of prompt and {max_tokens} of answer, the context is {limit}",
                hint="give more context with --context, or a smaller --max-tokens",
            )
        task = messages[-1]["content"].rsplit("\n\n", 1)[-1]
        prompt_of = (messages, ids)
        written = self._ask(prompt_of, max_tokens, answer, reading, writing, task)
        if not written.text and self.params.temperature > 0:
            # A small model sometimes ends at once; one other draw is worth its price.
            written = self._ask(prompt_of, max_tokens, answer, reading, writing, task, shift=1)
        if keep and written.text:
            self.store.put(key, {"text": written.text})
        return written

    def _ask(
        self, prompt: tuple[Messages, list[int]], max_tokens: int, expected: int,
        reading: str, writing: str, task: str, *, shift: int = 0,
    ) -> Written:  # fmt: skip
        from mimo_local.remote import Remote

        self._check_cancel()
        messages, ids = prompt
        seed = self.params.seed
        params = replace(
            self.params, max_tokens=max_tokens, seed=None if seed is None else seed + shift
        )
        if isinstance(self.engine, Remote):
            stream = self.engine.submit_messages(messages, params)
        else:
            stream = self.engine.submit(None, ids, params)
        splitter, text, done, tokens = Splitter(), "", None, 0
        self.meter.tell(reading, 0, (len(ids), expected))
        started = time.monotonic()
        try:
            for event in stream:
                if isinstance(event, Prefill):
                    started = time.monotonic()
                    rate = f", {event.tokens_per_s:.0f} tokens/s" if event.tokens_per_s else ""
                    self.meter.tell(
                        reading + rate, event.done, (event.total - event.done, expected)
                    )
                elif isinstance(event, Token):
                    tokens += 1
                    text += answer_text(splitter.push(event.text))
                    rate = f", {tokens / max(time.monotonic() - started, 1e-3):.1f} tokens/s"
                    left = max(0, expected - tokens)
                    self.meter.tell(writing + rate, len(ids) + tokens, (0, left))
                elif isinstance(event, Done):
                    done = event
                elif isinstance(event, Failed):
                    raise event.error
                self._check_cancel()
        finally:
            if done is None:
                stream.cancel()
        text += answer_text(splitter.flush())
        if done is None or done.reason == "cancelled":
            raise self._stopped()
        self.stats.append(done.stats)
        self.meter.finish(done.stats)
        cut_off = done.reason in ("length", "context")
        return Written(tidy(text, cut_off=cut_off, task=task), done.reason, done.stats)

    def _check_cancel(self) -> None:
        if self._cancel():
            raise self._stopped()

    def _stopped(self) -> CancelledError:
        return CancelledError(
            "stopped before the summary was complete",
            hint="finished parts are kept: the same command goes on from there",
        )
