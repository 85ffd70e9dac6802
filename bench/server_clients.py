"""Clients that connect, stall, vanish, cancel, and some that read on: a soak's load.

    python bench/server_clients.py PORT CLIENTS SECONDS SEED TOKENS

Each client does one thing after another until the seconds are over. The last line is JSON: how
often each thing was done, and with which statuses. `bench/server_soak.py` runs it once a round.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter

CHAT = "/v1/chat/completions"
KINDS = (
    *("whole", "read", "read", "leave", "leave", "vanish", "vanish", "stall", "silent"),
    *("half a head", "half a body", "bad"),
)


class Client:
    """One of many: does one thing after another until the round is over."""

    def __init__(self, port: int, seed: int, tokens: int, end: float) -> None:
        self.port, self.chance = port, random.Random(seed)
        self.tokens, self.end = tokens, end
        self.counts: Counter[str] = Counter()

    async def run(self) -> Counter[str]:
        while (left := self.end - time.monotonic()) > 0:
            kind = self.chance.choice(KINDS)
            try:
                async with asyncio.timeout(left):
                    await self.one(kind)
                self.counts[kind] += 1
            except TimeoutError:
                self.counts[f"{kind} (until the end)"] += 1
            except OSError:
                self.counts["cut off"] += 1
            await asyncio.sleep(self.chance.random() * 0.05)
        return self.counts

    def request(self, *, stream: bool) -> bytes:
        words = " ".join(self.chance.choice(["sea", "lamp", "log", "fog"]) for _ in range(20))
        body = {
            "messages": [{"role": "user", "content": words}],
            "stream": stream, "max_tokens": self.chance.randrange(1, self.tokens),
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    async def one(self, kind: str) -> None:
        plain = socket.socket()
        # A small window: what a client does not read is the server's to keep.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=plain, limit=1 << 20)
        except BaseException:
            plain.close()
            raise
        try:
            await self.talk(kind, reader, writer)
        finally:
            if kind == "vanish":  # a reset instead of a goodbye
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort() if kind == "vanish" else writer.close()

    async def talk(
        self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request = self.request(stream=kind != "whole")
        pause = self.chance.random() * 0.5
        match kind:
            case "silent":
                await asyncio.sleep(pause)
            case "half a head":
                writer.write(request[:20])
                await asyncio.sleep(pause)
            case "half a body":
                writer.write(request[:-5])
                await asyncio.sleep(pause)
            case "bad":
                writer.write(request.replace(b'"messages"', b'"massages"'))
                await self.status(reader)
            case "stall":
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(request)
                await asyncio.sleep(4 * pause)
            case "leave" | "vanish":
                writer.write(request)
                await asyncio.sleep(pause * self.chance.random())
                if self.chance.random() < 0.5:
                    await self.status(reader)
                    await reader.readline()
            case _:
                writer.write(request)
                if await self.status(reader) == 200:
                    end = b"[DONE]" if kind == "read" else b'"usage"'
                    async with asyncio.timeout(60):
                        while end not in (line := await reader.readline()) and line:
                            pass
                    self.counts["complete" if end in line else "cut short"] += 1

    async def status(self, reader: asyncio.StreamReader) -> int:
        status = int((await reader.readline()).split()[1])
        self.counts[f"status {status}"] += 1
        while (await reader.readline()).strip():
            pass
        if status != 200:
            await reader.readline()
        return status


async def clients(port: int, n: int, seconds: float, seed: int, tokens: int) -> Counter[str]:
    """A round of `n` clients."""
    end = time.monotonic() + seconds
    made = [Client(port, seed * 100_000 + i, tokens, end) for i in range(n)]
    found: Counter[str] = Counter()
    for counts in await asyncio.gather(*(client.run() for client in made)):
        found += counts
    return found


def main() -> None:
    port, n, seconds, seed, tokens = sys.argv[1:]
    work = clients(int(port), int(n), float(seconds), int(seed), int(tokens))
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
