"""Who may ask and how much: keys, Host and Origin, sizes, times, bad HTTP, a full house."""

from __future__ import annotations

import json
import socket
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from servers import Serving, serving, wait_until

from mimo_local.errors import UsageError
from mimo_local.server.options import Options

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def error(found: Any) -> dict[str, Any]:
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


def raw(server: Serving, data: bytes) -> tuple[int, dict[str, Any]]:
    """What the server says to bytes of our own; it must close the connection."""
    with server.connect() as connection:
        connection.sendall(data)
        reply = b""
        while part := connection.recv(65536):
            reply += part
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


# ---- keys ----------------------------------------------------------------------------------------


def test_a_key_opens_everything_and_nothing_opens_without() -> None:
    with serving(FakeEngine(), keys=("first", "second")) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            status, headers, data = server.call("GET", path)
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
            assert error(json.loads(data))["code"] == "invalid_api_key"
        for wrong in (
            "Bearer ",
            "Bearer firs",
            "Bearer first2",
            "Basic first",
            "first",
            "Bearer é",
        ):
            header = {"Authorization": wrong.encode("utf-8").decode("latin-1")}
            assert server.call("GET", "/v1/models", headers=header)[0] == 401
        for right in ("Bearer first", "bearer second"):
            assert server.call("GET", "/v1/models", headers={"Authorization": right})[0] == 200
        assert server.call("GET", "/health")[0] == 200, "for those who watch"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="second") as client:
            assert client.models.list().data[0].id == "fake"
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_no_server_for_everybody_without_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(UsageError, match="everybody") as caught:
            Options(host=host).check()
        assert "--api-key-file" in caught.value.hint
        Options(host=host, keys=("k",)).check()
    for host in ("127.0.0.1", "127.3.4.5", "::1", "[::1]", "localhost", "LOCALHOST"):
        Options(host=host).check()
    for key in ("", " a", "é"):
        with pytest.raises(UsageError, match="key"):
            Options(keys=(key,)).check()
    with pytest.raises(UsageError, match="every web page"):
        Options(cors=("*",)).check()
    with pytest.raises(UsageError, match="no origin"):
        Options(cors=("localhost:3000",)).check()
    Options(cors=("*",), keys=("k",)).check()


# ---- Host and Origin -----------------------------------------------------------------------------


def test_a_foreign_name_is_refused_on_loopback() -> None:
    with serving(FakeEngine(), allowed_hosts=("box.lan",)) as server:
        for host in (
            "localhost",
            "localhost:99",
            "127.0.0.1:8080",
            "[::1]:1",
            "BOX.lan",
            "box.lan.",
        ):
            assert server.call("GET", "/v1/models", headers={"Host": host})[0] == 200, host
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "", "[", "127.0.0.1.x"):
            status, _, data = server.call("GET", "/v1/models", headers={"Host": host})
            assert status == 403, host
            assert error(json.loads(data))["code"] == "host_not_allowed"


def test_other_hosts_need_a_key_but_any_name_will_do() -> None:
    with serving(FakeEngine(), host="0.0.0.0", keys=("k",)) as server:
        headers = {"Host": "any.example", "Authorization": "Bearer k"}
        assert server.call("GET", "/v1/models", headers=headers)[0] == 200


def test_web_pages_may_not_ask_unless_they_are_let() -> None:
    page = {"Origin": "http://page.example"}
    preflight = page | {"Access-Control-Request-Method": "POST"}
    with serving(FakeEngine()) as server:
        status, headers, data = server.call("POST", CHAT, ASK, headers=page)
        assert status == 403 and "access-control-allow-origin" not in headers
        assert error(json.loads(data))["code"] == "origin_not_allowed"
        assert server.call("OPTIONS", CHAT, headers=preflight)[0] == 403
        assert server.call("POST", CHAT, ASK, headers={"Origin": "null"})[0] == 403
        own = {"Origin": f"http://127.0.0.1:{server.port}"}
        assert server.call("POST", CHAT, ASK, headers=own)[0] == 200
    with serving(FakeEngine(), cors=("http://page.example",), keys=("k",)) as server:
        status, headers, _ = server.call("OPTIONS", CHAT, headers=preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, "http://page.example")
        key = {"Authorization": "Bearer k"}
        status, headers, _ = server.call("POST", CHAT, ASK, headers=page | key)
        assert (status, headers["access-control-allow-origin"]) == (200, "http://page.example")
        status, headers, _ = server.call("POST", CHAT, ASK, headers=page)
        assert (status, headers["access-control-allow-origin"]) == (401, "http://page.example")
        other = {"Origin": "http://other.example"}
        assert server.call("POST", CHAT, ASK, headers=other | key)[0] == 403


# ---- sizes, kinds, paths -------------------------------------------------------------------------


def test_bodies_are_bounded_before_they_are_read() -> None:
    with serving(FakeEngine(), max_body=1000) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            huge: Any = [{"role": "user", "content": "x" * 20_000_000}]
            with pytest.raises(openai.APIStatusError) as caught:
                client.chat.completions.create(model="fake", messages=huge)
            assert caught.value.status_code == 413
        big = {"messages": [{"role": "user", "content": "x" * 2000}]}
        status, found = server.json("POST", CHAT, big)
        assert (status, error(found)["code"]) == (413, "request_too_large")
        announced = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        status, found = raw(server, f"{announced}Content-Length: 99999999999\r\n\r\n".encode())
        assert status == 413
        # Without an announcement it is counted.
        chunks = "".join(f"{200:x}\r\n{'x' * 200}\r\n" for _ in range(6)) + "0\r\n\r\n"
        status, found = raw(
            server, f"{announced}Transfer-Encoding: chunked\r\n\r\n{chunks}".encode()
        )
        assert status == 413


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status"),
    [
        ("GET", "/", None, None, 404),
        ("GET", "/v1/chat/completions/x", None, None, 404),
        ("GET", CHAT, None, None, 405),
        ("DELETE", "/v1/models", None, None, 405),
        ("PUT", "/health", b"", None, 405),
        ("POST", CHAT, b"{}", "text/plain", 415),
        ("POST", CHAT, b"{}", "", 415),
        ("POST", CHAT, b"", "application/json", 400),
        ("POST", CHAT, b"{", "application/json", 400),
        ("POST", CHAT, b"[]", "application/json; charset=utf-8", 400),
        ("POST", CHAT, b"\xff\xfe", "application/json", 400),
        (
            "POST",
            CHAT,
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "application/json",
            400,
        ),
        ("POST", CHAT, b'{"temperature": NaN, "messages": []}', "application/json", 400),
        ("POST", CHAT, b"[" * 100_000, "application/json", 400),
        ("POST", CHAT, b'{"a":' * 100_000, "application/json", 400),
    ],
)
def test_every_error_has_the_same_shape(
    method: str, path: str, body: bytes | None, kind: str | None, status: int
) -> None:
    with serving(FakeEngine()) as server:
        headers = {} if kind is None else {"Content-Type": kind}
        found, reply, data = server.call(method, path, body, headers=headers)
        assert found == status
        assert reply["content-type"] == "application/json"
        assert error(json.loads(data))["message"]


def test_what_is_no_http_is_told_so() -> None:
    with serving(FakeEngine()) as server:
        status, found = raw(server, b"\x16\x03\x01 hello\r\n\r\n")
        assert (status, error(found)["code"]) == (400, "invalid_http")
        with server.connect() as connection:  # headers without end
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000)
            assert gone(connection)
        assert server.call("GET", "/health")[0] == 200


def test_bodies_that_are_on_their_way_are_bounded_together() -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Content-Length: 1000\r\n\r\n"
    with serving(FakeEngine(), max_body=1000) as server:
        held = [server.connect() for _ in range(8)]
        for connection in held:
            connection.sendall(head.encode() + b" " * 990)
        wait_until(lambda: server.service.reading == 8 * 990)
        status, found = raw(server, head.encode() + b" " * 999)
        assert (status, error(found)["code"]) == (429, "too_much_at_once")
        for connection in held:
            connection.close()
        wait_until(lambda: server.service.reading == 0)
        assert server.json("POST", CHAT, ASK)[0] == 200


# ---- times ---------------------------------------------------------------------------------------


def gone(connection: socket.socket) -> bool:
    """Whether the other side has closed; waits for it."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_headers_and_bodies_must_come_in_time() -> None:
    with serving(FakeEngine(), header_s=0.5, body_s=0.5, idle_s=1) as server:
        with server.connect() as silent, server.connect() as slow, server.connect() as late:
            slow.sendall(b"GET /health HTT")
            # After an answer the next request may take no longer.
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in late.recv(65536)
            late.sendall(b"GET /he")
            assert gone(silent) and gone(slow) and gone(late)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        status, found = raw(server, f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert (status, error(found)["type"]) == (408, "timeout_error")


def test_connections_are_bounded() -> None:
    with serving(FakeEngine(), max_connections=3) as server:
        held = [server.connect() for _ in range(3)]
        wait_until(lambda: len(server._server.server_state.connections) == 3)
        with server.connect() as fourth:
            assert gone(fourth)
        for connection in held:
            connection.close()
        wait_until(lambda: not server._server.server_state.connections)
        assert server.call("GET", "/health")[0] == 200


# ---- a full house --------------------------------------------------------------------------------


def test_one_more_than_there_is_room_for_is_told_when_to_come_back() -> None:
    engine = FakeEngine()
    engine.queue("a", hold=True)
    engine.queue("b", hold=True)
    with serving(engine, max_requests=2) as server:
        base = f"{server.url}/v1"
        with openai.OpenAI(base_url=base, api_key="x", max_retries=0) as client:
            body: Any = {"model": "fake", **ASK, "stream": True}
            streams = [client.chat.completions.create(**body) for _ in range(2)]
            for stream in streams:
                assert next(iter(stream)).choices
            for wanted in (True, False):
                with pytest.raises(openai.RateLimitError) as caught:
                    client.chat.completions.create(**{**body, "stream": wanted})
                assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
                assert caught.value.code == "queue_full"
            status, found = server.json("GET", "/health")
            assert (status, found["running"]) == (200, 2)
            streams[0].close()
            wait_until(lambda: server.service.active == 1)
            engine.queue("room again")
            found = client.chat.completions.create(model="fake", messages=ASK["messages"])  # type: ignore[arg-type]
            assert found.choices[0].message.content == "room again"
            streams[1].close()
