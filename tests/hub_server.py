"""A hub on 127.0.0.1: lists repositories, hands out files by ranges, and fails on demand.

It speaks what the hub's library and `mimo pull` ask: `/api/models/.../revision`, `/tree` in pages
with a Link header, `/resolve` with a redirect to a storage host (the same server by another name,
so that a token sent there shows). `faults` decide per request; every request is logged.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "XiaomiMiMo/MiMo-V2-Flash"
PAGE = 4  # entries of a listing


@dataclass
class Asked:
    """One request."""

    path: str
    host: str
    headers: Message
    file: str = ""
    start: int = 0
    stop: int | None = None

    @property
    def stored(self) -> bool:
        """Asked of the storage host."""
        return self.path.startswith("/cdn/")


@dataclass
class Fault:
    """What to do instead of the right answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """Bytes after which the connection is dropped."""
    flip: bool = False
    """One byte is wrong."""
    whole: bool = False
    """The range is ignored."""
    wait: threading.Event | None = None
    """Do not answer before this."""


class HubServer:
    """One repository made of a folder, at a commit of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = hashlib.sha1(str(folder).encode()).hexdigest()
        self.moved: str | None = None
        """What `main` means now, if it moved on."""
        self.gated = self.private = False
        self.token = ""
        """The only token that is let in, if any is asked for."""
        self.asked: list[Asked] = []
        self.fault: Callable[[Asked], Fault | None] = lambda _: None
        self._hashes: dict[str, str] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def sha256(self, name: str) -> str:
        if name not in self._hashes:
            with (self.folder / name).open("rb") as file:
                self._hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[name]

    def lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", "tokenizer.json"))

    def entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "path": "sub"}]
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            size, name = path.stat().st_size, path.relative_to(self.folder).as_posix()
            if self.lfs(name):
                oid = self.sha256(name)
                lfs = {"oid": oid, "size": size, "pointerSize": 134}
                entry = {"oid": "1" * 40, "lfs": lfs, "xetHash": "2" * 64}
            else:
                blob = b"blob %d\0" % size + path.read_bytes()
                entry = {"oid": hashlib.sha1(blob).hexdigest()}
            found.append({"type": "file", "size": size, "path": name, **entry})
        return found

    def files(self, kind: str = "") -> list[str]:
        """Files asked of the storage host or the hub, in order."""
        return [a.file for a in self.asked if a.file and kind in a.path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        address = self.path  # through a proxy it is a whole URL
        parts = urlsplit(address)
        host = parts.netloc or self.headers.get("Host", "")
        asked = Asked(parts.path, host, self.headers)
        found = re.search(r"/(?:resolve/[^/]+|cdn)/([^/?]+)$", parts.path)
        if found:
            asked.file = unquote(found[1])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            asked.start, asked.stop = int(wanted[1]), int(wanted[2]) + 1
        hub.asked.append(asked)
        fault = hub.fault(asked)
        try:
            if fault and fault.wait:
                fault.wait.wait(20)
            if fault and fault.status:
                self.answer(fault.status, fault.body, fault.headers)
            elif asked.stored:
                self.send_file(asked, fault)
            elif parts.path.startswith("/api/"):
                self.api(parts.path, parse_qs(parts.query))
            else:
                self.resolve(asked, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def let_in(self) -> bool:
        hub, given = self.hub, self.headers.get("Authorization", "")
        page = {"X-Error-Message": "no"}
        if hub.token and given == f"Bearer {hub.token}":
            return True
        if given and given != f"Bearer {hub.token}" and (hub.private or hub.gated):
            self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials"})
        elif hub.gated:
            self.answer(403, b"{}", page | {"X-Error-Code": "GatedRepo"})
        elif hub.private:
            self.answer(401, b"{}", page | {"X-Error-Code": "RepoNotFound"})
        else:
            return True
        return False

    def api(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        if not path.startswith(f"/api/models/{REPO}/"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if not self.let_in():
            return
        action, _, revision = path.removeprefix(f"/api/models/{REPO}/").partition("/")
        if revision not in ("main", "v1", hub.commit, hub.moved):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif action == "revision":
            sha = hub.moved if hub.moved and revision == "main" else hub.commit
            self.answer(200, json.dumps({"id": REPO, "sha": sha}).encode(), {})
        else:
            at = int(query.get("cursor", ["0"])[0])
            entries = hub.entries()
            headers = {}
            here = self.headers["Host"]
            if at + PAGE < len(entries):
                headers["Link"] = f'<http://{here}{path}?cursor={at + PAGE}>; rel="next"'
            self.answer(200, json.dumps(entries[at : at + PAGE]).encode(), headers)

    def resolve(self, asked: Asked, fault: Fault | None) -> None:
        hub = self.hub
        if not asked.path.startswith(f"/{REPO}/resolve/{hub.commit}/"):
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif self.let_in():
            if hub.lfs(asked.file):
                headers = {
                    "Location": f"http://localhost:{hub.port}/cdn/{asked.file}?signed=1",
                    "X-Linked-Etag": f'"{hub.sha256(asked.file)}"',
                    "X-Repo-Commit": hub.commit,
                }
                self.answer(302, b"Found", headers)
            else:
                self.send_file(asked, fault)

    def send_file(self, asked: Asked, fault: Fault | None) -> None:
        path = self.hub.folder / asked.file
        total, status, begin, end = path.stat().st_size, 200, 0, path.stat().st_size
        if asked.stop is not None and not (fault and fault.whole):
            if asked.start >= total:
                self.answer(416, b"", {"Content-Range": f"bytes */{total}"})
                return
            begin, end, status = asked.start, min(asked.stop, total), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        wrong = (begin + end) // 2 if fault and fault.flip else -1
        if fault and fault.cut is not None:
            end = min(end, begin + fault.cut)
            self.close_connection = True
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                data = bytearray(file.read(min(1 << 18, end - begin)))
                if begin <= wrong < begin + len(data):
                    data[wrong - begin] ^= 1
                self.wfile.write(data)
                begin += len(data)
        self.wfile.flush()
