"""How long a chat that rested on disk takes to go on, beside reading it again.

    python bench/resume.py [-m PACK | --layers 3 | --kv-only] [--tokens 30000] [--repeats 7]

PACK: the demo by default. `--layers`: a pack of the real model's first layers, random weights, made
for this run (3 layers: 7 GB) and deleted. `--kv-only`: the real model's keys and values alone, all
48 layers of them, without a model to read a prompt with. A resume is all of it: the folder is
looked through, rows are read into their place and their checksums verified; files are thrown out
of the page cache before each. Predicted: the bytes at the rate the same files are read at by a
plain loop. Prints a line per case, then one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mimo_local import loading
from mimo_local.cache import KVCache
from mimo_local.config import ModelConfig
from mimo_local.errors import MimoError
from mimo_local.generate import generate
from mimo_local.sampler import SamplingParams
from mimo_local.session import Session
from mimo_local.session_files import SessionFiles
from mimo_local.session_pool import SessionPool
from mimo_local.session_store import SessionStore
from mimo_local.settings import Settings

NEW = 20
"""Ids that come after what was saved."""


def cold(folder: Path) -> None:
    """Throw a folder's files out of the page cache."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_seconds(folder: Path) -> float:
    """Reading all files of the folder, 1 MB at a time into one buffer."""
    buffer, start = memoryview(bytearray(1 << 20)), time.perf_counter()
    for path in sorted(folder.iterdir()):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def resumes(
    files: Callable[[], SessionFiles], pool: Callable[[SessionFiles], SessionPool],
    ids: list[int], folder: Path, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Resume `repeats` times from a cold disk, a plain read before each."""
    took, plain, warm = [], [], []
    for _ in range(repeats):
        cold(folder)
        plain.append(plain_seconds(folder))
        for times, drop in ((took, True), (warm, False)):
            if drop:
                cold(folder)
            else:
                plain_seconds(folder)
            chats = pool(files())
            start = time.perf_counter()
            session = chats.take(ids)
            times.append(time.perf_counter() - start)
            assert chats.loads == 1 and len(session.ids) == len(ids) - NEW - 1, len(session.ids)
            del session, chats
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    resume = statistics.median(took)
    return {
        "bytes": nbytes,
        "resume_s": spread(took),
        "resume_warm_s": spread(warm),
        "mb_per_s": round(nbytes / resume / 1e6),
        "disk_mb_per_s": round(nbytes / statistics.median(plain) / 1e6),
        "predicted_s": round(statistics.median(plain), 4),
    }


def of_pack(pack: Path, tokens: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Read a prompt, save, resume, and check that the answer stays the same."""
    found = loading.load(Settings(model=pack, draft="off", context=tokens + 64))
    config = found.model.config
    dice = random.Random(1)
    ids = [dice.randrange(config.vocab_size) for _ in range(tokens)]
    params = SamplingParams(temperature=0.0, max_tokens=8)

    def files() -> SessionFiles:
        store = SessionStore(folder, 1 << 50)
        return SessionFiles(store, found.new_cache, model=found.name, weights="bench")

    def pool(files: SessionFiles) -> SessionPool:
        return SessionPool(found.new_cache, budget=1 << 50, files=files)

    def answer(chats: SessionPool, ids: list[int]) -> tuple[list[int], float]:
        session = chats.take(ids)
        session.ids[:] = ids
        start, first, made = time.perf_counter(), 0.0, list[int]()
        steps = generate(found.model, session.cache, session.ids, params)
        for token in steps:
            if not made:
                first = time.perf_counter() - start
                session.remember()
            made.append(token)
        session.remember()
        chats.give_back(session)
        return made, first

    chats = pool(files())
    said, prefill = answer(chats, ids)
    start = time.perf_counter()
    chats.rest(lambda: False)
    save = time.perf_counter() - start
    more = [*ids, *said, *(dice.randrange(config.vocab_size) for _ in range(NEW))]
    stayed, _ = answer(chats, more)
    chats.files = None
    chats.close()
    row = resumes(files, pool, more, folder, repeats)
    again, first = answer(pool(files()), more)
    assert again == stayed, "the resumed chat answers otherwise"
    return {
        "case": found.description,
        "tokens": tokens,
        "prefill_s": round(prefill, 2),
        "save_s": round(save, 3),
        "first_token_after_resume_s": round(first, 3),
        "ratio": round(prefill / row["resume_s"]["median"], 1),
    } | row


def of_cache(tokens: int, folder: Path, repeats: int) -> dict[str, Any]:
    """The real model's keys and values, random numbers."""
    path = Path(loading.__file__).with_name("real_config.json")
    config = ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    config = dataclasses.replace(config, n_mtp_layers=0, mtp_layer=None)

    def new_cache() -> KVCache:
        return KVCache(config, dtype=torch.bfloat16)

    def files() -> SessionFiles:
        return SessionFiles(SessionStore(folder, 1 << 50), new_cache, model="", weights="bench")

    session = Session(new_cache)
    ids = [random.Random(1).randrange(config.vocab_size) for _ in range(tokens + NEW + 1)]
    cache = session.cache
    for rows in cache.blank(tokens).values():
        for part in rows.values():
            part.view(torch.int16).random_(-16384, 16384)
    for layer in cache.layers:
        if layer.kind == "swa":
            for part in layer.blank(tokens - layer.keep, layer.keep).values():  # type: ignore[union-attr]
                part.view(torch.int16).random_(-16384, 16384)
    cache.length = tokens
    session.ids = ids[:tokens]
    saver = files()
    start = time.perf_counter()
    assert saver.save(session, lambda: False), saver.trouble
    save = time.perf_counter() - start

    def pool(files: SessionFiles) -> SessionPool:
        return SessionPool(new_cache, budget=1 << 50, files=files)

    row = resumes(files, pool, ids, folder, repeats)
    name = "keys and values of all 48 layers"
    return {"case": name, "tokens": tokens, "save_s": round(save, 3)} | row


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sessions-", dir=args.folder) as place:
        folder = Path(place) / "sessions"
        if args.kv_only:
            return of_cache(args.tokens, folder, args.repeats)
        pack = args.model
        if args.layers:
            import random_pack

            pack = Path(place) / "pack"
            random_pack.write(pack, args.layers, 1024)
        elif pack is None:
            from mimo_local.cli.models import demo_pack

            pack = demo_pack()
        return of_pack(pack, args.tokens, folder, args.repeats)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--kv-only", action="store_true")
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    args = parser.parse_args(argv)
    try:
        found = run(args)
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    ratio = f", {found['ratio']} times faster than reading" if "ratio" in found else ""
    print(
        f"{found['case']}: {found['tokens']} tokens, {found['bytes'] / 1e6:.0f} MB back in "
        f"{found['resume_s']['median']:.3f} s (predicted {found['predicted_s']:.3f}){ratio}"
    )
    print(json.dumps({"tool": "bench/resume.py"} | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
