"""Clients that misbehave: each kind alone, then 200 of all kinds; nothing of them stays."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeStream
from servers import Serving, serving, wait_until

CHAT = "/v1/chat/completions"
BENCH = Path(__file__).parent.parent.parent / "bench"


def send(server: Serving, connection: socket.socket, *, stream: bool = True) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": %s}'
    body %= b"true" if stream else b"false"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def answer_threads() -> int:
    return sum(thread.name.startswith("mimo-answer") for thread in threading.enumerate())


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[FakeStream]:
    """All streams the engine has given."""
    made: list[FakeStream] = []
    submit = FakeEngine.submit

    def keeping(self: FakeEngine, *args: Any, **kwargs: Any) -> FakeStream:
        made.append(submit(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(FakeEngine, "submit", keeping)
    return made


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_who_leaves_cancels_at_once(streams: list[FakeStream], stream: bool, reset: bool) -> None:
    engine = FakeEngine()
    engine.queue("a", hold=True)
    with serving(engine) as server:
        connection = server.connect()
        send(server, connection, stream=stream)
        wait_until(lambda: server.service.running)
        if reset:
            linger = b"\1\0\0\0\0\0\0\0"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        wait_until(lambda: streams[0]._cancelled.is_set())
        wait_until(lambda: not server.service.active)
        wait_until(lambda: not answer_threads())


class Silent(FakeStream):
    """Waits in the queue: says nothing until it is cancelled."""

    def _play(self) -> Any:
        self._cancelled.wait()
        from mimo_local.events import Done, Stats

        yield Done("cancelled", Stats())


def test_who_leaves_the_queue_cancels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import fakes

    monkeypatch.setattr(fakes, "FakeStream", Silent)
    with serving(FakeEngine(), ping_s=0.1) as server:
        connection = server.connect()
        send(server, connection)
        data = b""
        while b": queued" not in data:
            data += connection.recv(65536)
        health = server.json("GET", "/health")[1]
        assert (health["running"], health["waiting"]) == (0, 1)
        connection.close()
        wait_until(lambda: not server.service.active and not answer_threads())


def test_what_nobody_reads_is_bounded_and_given_up(streams: list[FakeStream]) -> None:
    """40 MB of answer for a client that takes none: kept up to the limit, then it is over."""
    engine = FakeEngine(delay_s=0.0003)
    engine.queue(*["x" * 10_000] * 4000)
    with serving(engine, max_waiting=500_000, stall_s=1) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # and of its children
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send(server, connection)
        most = 0

        def over() -> bool:
            nonlocal most
            most = max([most, *(feed._waiting for feed in server.service._feeds)])
            return streams != [] and streams[0]._cancelled.is_set()

        wait_until(over)
        wait_until(lambda: not server.service.active)
        assert most < 600_000
        # The connection is cut off as well, though the client still holds it.
        wait_until(lambda: not server._server.server_state.connections)
        connection.close()


def test_a_short_answer_nobody_takes_does_not_hold_its_connection() -> None:
    engine = FakeEngine()
    engine.queue("x" * 8_000_000)  # more than the system's own buffers
    with serving(engine, max_waiting=20_000_000, stall_s=1) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # and of its children
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send(server, connection, stream=False)
        wait_until(lambda: server.service.metrics.answers.labels("stop")._value.get() == 1)
        wait_until(lambda: not server._server.server_state.connections)
        connection.close()


def test_who_reads_slowly_but_reads_gets_everything() -> None:
    engine = FakeEngine()
    engine.queue(*["y" * 1000] * 300)
    with serving(engine, stall_s=30) as server, server.connect() as connection:
        send(server, connection)
        data = b""
        while b"[DONE]" not in data[-100:]:
            data += connection.recv(4096)
        assert data.count(b"y" * 1000) == 300


def test_a_client_that_is_gone_while_its_prompt_is_made_leaves_no_stream(
    streams: list[FakeStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    engine = FakeEngine()
    submit = engine.submit

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        go_on.wait(10)
        return submit(*args, **kwargs)

    monkeypatch.setattr(engine, "submit", slow)
    engine.queue("a", hold=True)
    with serving(engine) as server:
        connection = server.connect()
        send(server, connection)
        entered.wait(10)
        connection.close()
        wait_until(lambda: not server._server.server_state.connections)
        go_on.set()
        wait_until(lambda: streams and streams[0]._cancelled.is_set())
        wait_until(lambda: not server.service.active and not answer_threads())


def test_a_client_that_takes_nothing_does_not_hold_up_the_end() -> None:
    engine = FakeEngine()
    engine.queue(*["x" * 100_000] * 80)
    with serving(engine, max_waiting=20_000_000, stall_s=3600, grace_s=0.2) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # and of its children
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send(server, connection)
        wait_until(lambda: server.service.metrics.answers.labels("stop")._value.get() == 1)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    connection.close()


class Forgetful(FakeEngine):
    """Keeps no record of what it was asked: that would be memory."""

    def submit(self, *args: Any, **kwargs: Any) -> FakeStream:
        self.requests.clear()
        return super().submit(*args, **kwargs)


def test_two_hundred_clients_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import server_clients
    import server_soak

    def reply(prompt: str) -> str:
        return "words of some length " * (400 if len(prompt) % 8 == 0 else 5)

    engine = Forgetful(reply=reply, delay_s=0.0002)
    found = server_soak.run(
        lambda tell: engine, n=200, seconds=8, round_s=3, say=lambda text: None, max_waiting=100_000
    )
    assert found["rounds"] >= 2
    assert (found["threads_grown"], found["tasks_grown"], found["files_grown"]) == (0, 0, 0), found
    assert found["rss_grown_bytes"] < 60e6, found
    counts = found["counts"]
    assert {"status 200", "status 400", "status 429", "complete"} <= set(counts), counts
    kinds = {kind.removesuffix(" (until the end)") for kind in counts}
    assert set(server_clients.KINDS) <= kinds, counts
    assert not any(kind.startswith("status 5") for kind in counts), counts
