"""`Remote`: asks a server, and gives a local engine's events back.

One daemon thread runs an event loop with the connections; a request is a task on it, so that a
cancel closes its connection at once, before the first byte as well. What is sent, how, and what
comes back is the affair of `requests`, `connection`, `answers` and `sse`. Called by chat,
summarize, cli and tui.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mimo_local.errors import MimoError, RemoteError, UsageError
from mimo_local.events import Done, Event, Failed, Prefill, Progress
from mimo_local.remote import failures, requests
from mimo_local.remote.answers import Reading
from mimo_local.remote.connection import PAUSES_S, Connection, Refused, Server
from mimo_local.remote.counting import RemoteTokenizer, estimate, ids_of
from mimo_local.remote.sse import EventStream
from mimo_local.stream import Stream

if TYPE_CHECKING:
    import httpx2

    from mimo_local.sampler import SamplingParams
    from mimo_local.settings import Settings

T = TypeVar("T")
KEY: Final = "MIMO_REMOTE_KEY"
CONTEXT: Final = 32_768
"""Assumed where neither server nor settings say it."""


class Remote:
    """A model somewhere else. Close it, or use it as a context manager."""

    kernel = ""

    def __init__(self, server: Server) -> None:
        """Without a model yet: `open` is the way to a usable one."""
        self.url = server.address
        self.name, self.context_limit = "", CONTEXT
        self.description = ""
        self.tokenizer = RemoteTokenizer(None)
        self._server = server
        self._counting = f"{requests.root(server.address)}/tokenize"
        self._notes: deque[str] = deque(maxlen=50)
        self._without: frozenset[str] = frozenset()
        self._running: set[_Running] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._http = Connection(server)
        self._thread = threading.Thread(target=self._run, name="mimo-remote", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        settings: Settings,
        on_event: Callable[[Progress], None] | None = None,
        *,
        env: Mapping[str, str] = os.environ,
        pauses: tuple[float, ...] = PAUSES_S,
    ) -> Remote:
        """Connect to `settings.remote`, find its model, its context and its way to count."""
        if not settings.remote:
            raise UsageError("no server is named", hint="--remote http://10.0.0.5:8000")
        remote = cls(Server(settings.remote, env.get(KEY, "").strip(), pauses))
        try:
            if on_event is not None:
                on_event(Progress(f"asking {remote.url}", 0, 0, "models"))
            remote._wait(remote._introduce(settings))
        except BaseException:
            remote.close()
            raise
        return remote

    @property
    def privacy(self) -> str:
        """What the user must know before the first word."""
        return f"what you write and attach is sent to {self.url}"

    @property
    def counts_exactly(self) -> bool:
        """Whether the server counts tokens; else they are estimated."""
        return self.tokenizer.exact

    def take_notes(self) -> list[str]:
        """What the user should hear since the last call: odd ends, fields the server refused."""
        found = []
        while self._notes:
            found.append(self._notes.popleft())
        return found

    def new_session(self) -> None:
        """The server keeps its own cache."""

    def submit(self, *_: object, **__: object) -> Stream:
        """Ids mean nothing to a server: UsageError."""
        raise UsageError("a remote model takes messages, not token ids", hint="use submit_messages")

    def submit_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        stop: Sequence[str] = (),
    ) -> Stream:
        """Ask for the answer to `messages`, in OpenAI's form; the events of a local engine.

        Several run at once. Errors come as `Failed`; UsageError only when it is closed.
        """
        asked = _Asked(list(messages), params, thinking, tuple(tools), tuple(stop))
        reading = Reading(
            thinking=thinking,
            prompt_tokens=asked.size,
            context_limit=self.context_limit,
            where=self.url,
            note=self._notes.append,
        )
        running = _Running(reading)
        running.stream = Stream(params.seed or 0, lambda _: self._soon(running.cancel))
        with self._lock:  # what comes before `close` is ended by it
            if self._closed:
                raise UsageError("the connection is closed", hint="open it again")
            self._soon(lambda: self._begin(asked, running))
        return running.stream

    def drafts_now(self) -> None:
        """Nobody knows how the server drafts."""

    def experts_now(self) -> None:
        """Nothing is known of a server's experts."""

    def close(self) -> None:
        """Cancel everything, close the connections and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wait(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- any thread ------------------------------------------------------------------------------

    def _soon(self, call: Callable[[], object]) -> None:
        """On the loop's thread; too late is no error."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C
            future.cancel()
            raise

    def _count(self, request: dict[str, Any]) -> Any:
        """Ask `/tokenize`, from any thread; what fails is an estimate then, said once."""
        try:
            return self._wait(self._http.small("POST", self._counting, request))
        except MimoError as error:
            note = f"tokens are estimated for now: {error.message}"
            if note not in self._notes:
                self._notes.append(note)
            return None

    # ---- the loop's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _end(self) -> None:
        for running in tuple(self._running):
            running.cancel()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)  # connections half made
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()
        await self._loop.shutdown_asyncgens()

    def _begin(self, asked: _Asked, running: _Running) -> None:
        if running.ended:
            return
        running.task = self._loop.create_task(self._answer(asked, running))
        self._running.add(running)
        running.task.add_done_callback(lambda _: self._running.discard(running))

    async def _introduce(self, settings: Settings) -> None:
        """Learn what there is: the model, its context, whether tokens are counted."""
        try:
            listed = await self._http.small("GET", f"{self._server.base}/models")
        except UsageError:
            if not settings.remote_model:
                raise
            listed = {}  # a gateway without a list, but the model is named
        self.name, told = requests.choose(listed, settings.remote_model, self.url)
        self._http.model = self.name
        self.context_limit = min(settings.context or told or CONTEXT, told or 1 << 62)
        try:
            probe = {"model": self.name, "prompt": "a b", "content": "a b"}
            found = await self._http.small("POST", self._counting, probe, tries=0)
        except MimoError:
            found = None
        if ids_of(found) is not None:
            self.tokenizer = RemoteTokenizer(
                lambda request: self._count({"model": self.name, **request})
            )
        assumed = "" if told or settings.context else " (assumed: set `context`)"
        counted = "counted by the server" if self.counts_exactly else "estimated"
        self.description = (
            f"{self.name} at {self.url} (remote): context {self.context_limit:,} tokens{assumed}, "
            f"tokens {counted}"
        )
        open_line = self.url.startswith("http:") and not requests.is_loopback(self.url)
        if self._server.key and open_line:
            self._notes.append(f"the key is sent to {self.url} without encryption")

    async def _answer(self, asked: _Asked, running: _Running) -> None:
        try:
            async for event in self._events(asked, running):
                running.put(event)
            for last in running.reading.done():
                running.put(last)
        except asyncio.CancelledError:
            running.cancelled()
        except Exception as error:
            # Whatever happened, the request must end: someone waits for it.
            begun = running.reading.begun
            running.put(Failed(failures.of_exception(error, self.url, begun=begun)))

    async def _events(self, asked: _Asked, running: _Running) -> AsyncIterator[Event]:
        url = f"{self._server.base}/chat/completions"
        yield Prefill(0, max(1, asked.size))
        while True:
            body = asked.body(self.name, self._without)
            try:
                sent = self._http.sent("POST", url, body, None, on_phase=running.phase)
                async with sent as response:
                    async for event in self._read(response, running.reading):
                        yield event
                return
            except Refused as refused:
                # Asked again without what it does not know; said, because it changes the answer.
                self._without |= refused.fields
                names = ", ".join(sorted(refused.fields))
                self._notes.append(f"{self.url} does not know {names}: asked without")

    async def _read(self, response: httpx2.Response, reading: Reading) -> AsyncIterator[Event]:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":  # it does not stream
            body = failures.parsed(await response.aread())
            if isinstance(body, dict) and (body.get("choices") or body.get("error")):
                for event in reading.chunk(body):
                    yield event
                reading.finished = True
                return
        if kind != "text/event-stream":
            raise RemoteError(
                f"{self.url} sent {kind or 'something unnamed'} instead of an answer",
                hint="the address must be that of an OpenAI-compatible server",
            )
        stream = EventStream()
        async for received in response.aiter_bytes():
            try:
                sent = stream.push(received)
            except ValueError as error:
                raise RemoteError(
                    f"{self.url} sent {error}", hint="is it an OpenAI-compatible server?"
                ) from error
            for one in sent:
                read = reading.comment if one.kind == "comment" else reading.data
                for event in read(one.text):
                    yield event
        if not reading.finished:
            raise RemoteError(
                f"{self.url} broke off the answer", hint="ask again; the server's log says more"
            )


@dataclass(frozen=True, slots=True)
class _Asked:
    messages: list[Mapping[str, Any]]
    params: SamplingParams
    thinking: bool
    tools: tuple[Mapping[str, Any], ...]
    stop: tuple[str, ...]

    @property
    def size(self) -> int:
        """About how many tokens the prompt has, until the server says it."""
        return sum(estimate(str(message.get("content") or "")) for message in self.messages)

    def body(self, model: str, without: frozenset[str]) -> dict[str, Any]:
        return requests.body(
            model,
            self.messages,
            self.params,
            thinking=self.thinking,
            tools=self.tools,
            stop=self.stop,
            without=without,
        )


class _Running:
    """A request under way: its task, its stream, and how it is cancelled. Of the loop's thread."""

    stream: Stream

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.task: asyncio.Task[None] | None = None
        self.ended = False
        self._connecting = False

    def put(self, event: Event) -> None:
        """Pass an event on, unless the end has been passed on."""
        if not self.ended:
            self.ended = isinstance(event, Done | Failed)
            self.stream.put(event)

    def cancel(self) -> None:
        """The stream ends now, the connection too; one that is half made when it is made.

        asyncio can lose a socket if a task is cancelled while it connects.
        """
        self.cancelled()
        if self.task is not None and not self._connecting:
            self.task.cancel()

    def cancelled(self) -> None:
        """The end, with what was made."""
        if not self.ended:
            for event in self.reading.done(cancelled=True):
                self.put(event)

    def phase(self, connecting: bool) -> None:
        """Whether a connection is being made; otherwise a cancel may close it."""
        self._connecting = connecting
        if self.ended:
            raise asyncio.CancelledError
