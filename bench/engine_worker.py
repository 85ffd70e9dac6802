"""One engine in a process of its own, answering one-line JSON requests with milliseconds.

    python bench/engine_worker.py llamacpp MODEL.gguf --context 1024 --batch 512
    python bench/engine_worker.py ours --pack DIR | --slice 3 --format nf4 --vocab 1024

Requests: {"op": "prefill", "n": 512}, "fill", "decode", "verify", "threads", "info", "quit". Times
are taken here, around the engine's own call, up to the logits in memory; `others` says what other
processes took of the machine meanwhile. The parent half, `Worker`,
stops its process while it is not asked, so that no engine's spinning threads cost the other
anything. Both engines get the same random ids. Called by bench/vs_llamacpp.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # llama.cpp's Python does not have this project
    sys.path.insert(0, str(ROOT))

from mimo_local.errors import MimoError, UsageError  # noqa: E402  (standard library only)

SEED = 20251217
PATIENCE_S = 1800.0
"""The longest a request may take: 8192 ids through a 4-layer slice take minutes on two cores."""


class Engine(Protocol):
    """A model and one growing sequence of ids."""

    vocab: int

    def info(self) -> dict[str, Any]:
        """What it is and what it runs with: engine, version, isa, model, bytes, threads."""

    def set_threads(self, n: int) -> None:
        """Use `n` CPU threads from now on."""

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, ids: Sequence[int], outputs: str) -> None:
        """Append `ids` in one batch, up to the logits of the "last" or of "all" of them."""

    def meters(self) -> dict[str, Any]:
        """Counters of where experts came from since it was loaded; empty without tiers."""


class Others:
    """What other processes, and other guests of the host, take of this machine from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Of all cores' time, 0..1, in steps of the kernel's 10 ms; 0 where /proc is not there."""
        wall, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        cores = os.cpu_count() or 1
        return round(max(0.0, busy - own - 0.02) / max(wall * cores, 1e-9), 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of all processes, of this one."""
        busy, stat = 0.0, Path("/proc/stat")
        if stat.is_file():
            user, nice, system, _idle, _iowait, irq, soft, steal = (
                int(field) for field in stat.read_text(encoding="ascii").split()[1:9]
            )
            ticks = user + nice + system + irq + soft + steal
            busy = ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


class Server:
    """Turns requests into calls of an engine, and times them."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine, self.clock = engine, clock
        self.ids = random.Random(SEED)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request: `ms` holds one time per call of the engine."""
        op, n = str(request.get("op")), int(request.get("n", 0))
        if op == "info":
            return self.engine.info()
        if op == "meters":
            return self.engine.meters()
        if n < 1:
            raise UsageError(f"request `{op}` with n = {n}", hint="n is a count from 1 up")
        if op == "threads":
            self.engine.set_threads(n)
            return {}
        if op == "fill":  # the same ids in both engines, in batches that fit a small buffer
            self._restart()
            chunk = int(request.get("chunk", n))
            for start in range(0, n, chunk):
                self.engine.feed(self._draw(min(chunk, n - start)), "last")
            return {}
        if op not in ("prefill", "decode", "verify"):
            raise UsageError(f"there is no request `{op}`", hint="see the module's first lines")
        if op == "prefill":
            self._restart()
        others = Others()
        if op == "decode":
            found = [self._timed(1, "last") for _ in range(n)]
        else:
            found = [self._timed(n, "all" if op == "verify" else str(request.get("outputs")))]
        return {"ms": found, "others": others.share()}

    def _restart(self) -> None:
        self.ids = random.Random(SEED)
        self.engine.reset()

    def _draw(self, n: int) -> list[int]:
        return [self.ids.randrange(self.engine.vocab) for _ in range(n)]

    def _timed(self, n: int, outputs: str) -> float:
        ids = self._draw(n)
        start = self.clock()
        self.engine.feed(ids, outputs)
        return 1e3 * (self.clock() - start)


def serve(engine: Engine, requests: IO[str], replies: IO[str]) -> None:
    """Answer until "quit" or the end of `requests`; an engine's error is a reply, too."""
    server = Server(engine)
    for line in requests:
        request = json.loads(line)
        if request.get("op") == "quit":
            return
        try:
            reply = server.answer(request)
        except MimoError as error:
            reply = {"error": error.message, "hint": error.hint}
        except (RuntimeError, MemoryError, ValueError) as error:
            reply = {"error": f"{type(error).__name__}: {error}", "hint": "see the worker's log"}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """The parent's half: a child process that is stopped whenever it is not being asked."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, patience_s: float = PATIENCE_S
    ) -> None:
        self.name, self.log, self.patience_s = name, log, patience_s
        self.others = 0.0
        """What other processes took of the machine during the last timed request, 0..1."""
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.info = self._read()  # the first line comes when the model is loaded
        self._pause()

    def ask(self, op: str, n: int = 1, **more: object) -> dict[str, Any]:
        """The reply to one request; MimoError when the engine failed or died."""
        assert self.process.stdin is not None
        self._signal("SIGCONT")
        try:
            with suppress(BrokenPipeError):  # a dead one says why in its log
                self.process.stdin.write(json.dumps({"op": op, "n": n, **more}) + "\n")
                self.process.stdin.flush()
            return self._read()
        finally:
            self._pause()

    def ms(self, op: str, n: int = 1, **more: object) -> list[float]:
        """The times of one request."""
        reply = self.ask(op, n, **more)
        self.others = float(reply.get("others", 0.0))
        return [float(value) for value in reply["ms"]]

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._signal("SIGCONT")
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        alarm = threading.Timer(self.patience_s, self.process.kill)
        alarm.start()
        try:
            line = self.process.stdout.readline()
        finally:
            alarm.cancel()
        if not line and self.process.wait() == -signal.SIGKILL:
            raise MimoError(
                f"{self.name} was killed: no answer in {self.patience_s:.0f} s, or no memory left",
                hint=f"use fewer --layers, or see {self.log}",
            )
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise MimoError(
                f"{self.name} ended with status {self.process.wait()}: {' | '.join(tail)}",
                hint=f"its whole output is in {self.log}",
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise MimoError(f"{self.name}: {reply['error']}", hint=reply["hint"])
        return reply

    def _pause(self) -> None:
        self._signal("SIGSTOP")

    def _signal(self, name: str) -> None:
        if self.process.poll() is None and hasattr(signal, name):
            self.process.send_signal(getattr(signal, name))


class Ours:
    """This project's engine, through the runner that `mimo bench` uses."""

    def __init__(self, args: argparse.Namespace) -> None:
        from mimo_local import benchmark, kernels

        start = time.perf_counter()
        model, new_cache, self.what = load_pack(args) if args.pack else load_slice(args)
        self.kernel = kernels.describe()
        self.runner = benchmark.ModelRunner(model, new_cache)
        self.vocab = self.runner.vocab_size
        self.set_threads(args.threads)
        self.load_s = time.perf_counter() - start

    def info(self) -> dict[str, Any]:
        """Engine, version, kernels, model."""
        from mimo_local import __version__

        return {
            "engine": "mimo-local",
            "version": __version__,
            "isa": self.kernel,
            "model": self.what,
            "bytes": peak_rss(),
            "vocab": self.vocab,
            "threads": self.runner.threads(),
            "load_s": round(self.load_s, 1),
        }

    def set_threads(self, n: int) -> None:
        """Kernels' and torch's."""
        self.runner.set_threads(n)

    def reset(self) -> None:
        """A new cache."""
        self.runner.reset()

    def meters(self) -> dict[str, Any]:
        """The expert store's."""
        store = self.runner.model.experts
        return asdict(store.meters) | {"bytes": store.nbytes, "peak_rss": peak_rss()}

    def feed(self, ids: Sequence[int], outputs: str) -> None:
        """Steps as the engine makes them: one id, a whole prompt, or rows to verify.

        A prompt's last layer runs for all rows only where `outputs` are: as in llama.cpp.
        """
        if len(ids) == 1:
            self.runner.step(ids[0])
        elif outputs == "all" and len(ids) <= 8:
            import torch

            from mimo_local.model import Segment

            segment = Segment(torch.tensor(ids, dtype=torch.int64), self.runner.cache)
            self.runner.model.logits(self.runner.model.forward([segment]))
        else:
            self.runner.whole = outputs == "all"
            self.runner.prefill(ids)


def peak_rss() -> int:
    """Most bytes of memory this process ever had."""
    from mimo_local.hardware import peak_rss as measured

    return measured()


def load_pack(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """(model, new_cache, description) of a pack or checkpoint folder."""
    from mimo_local.loading import load
    from mimo_local.settings import Settings

    loaded = load(
        Settings.resolve(
            model=args.pack,
            threads=args.threads,
            ram=args.ram,
            prefetch=args.prefetch,
            context=args.context,
        )
    )
    return loaded.model, loaded.new_cache, loaded.description


def load_slice(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """(model, new_cache, description) of real-shape layers with random packed weights."""
    import torch

    from mimo_local.shape_bench import real_shape_model

    model = real_shape_model(args.slice, args.vocab, args.format)
    what = f"{args.slice} layers, experts {args.format}, rest int8"
    # Keys and values in 16 bits, as packs have them and as llama.cpp does.
    return model, lambda: model.new_cache(dtype=torch.bfloat16), what


def open_llamacpp(args: argparse.Namespace) -> Engine:
    """llama.cpp with a GGUF file."""
    from llamacpp_engine import LlamaCpp

    size = {"context": args.context, "batch": args.batch, "threads": args.threads}
    return LlamaCpp(args.gguf, **size, mmap=not args.no_mmap, repack=not args.no_repack)


def die_with_parent() -> None:
    """A stopped process would outlive a killed parent for ever, with its gigabytes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(argv: Sequence[str] | None = None) -> int:
    die_with_parent()
    # Libraries print where they like: the replies keep the real stdout, all else goes to the log.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
        kinds = parser.add_subparsers(dest="engine", required=True)
        theirs, ours = kinds.add_parser("llamacpp"), kinds.add_parser("ours")
        theirs.add_argument("gguf", type=Path)
        theirs.add_argument("--no-mmap", action="store_true", help="weights in memory of its own")
        theirs.add_argument("--no-repack", action="store_true", help="weights as the file has them")
        ours.add_argument("--pack", type=Path)
        ours.add_argument("--ram", help="most memory to use, like 2GB")
        ours.add_argument("--prefetch", choices=("auto", "on", "off"))
        ours.add_argument("--slice", type=int, default=3)
        ours.add_argument("--format", default="nf4")
        ours.add_argument("--vocab", type=int, default=1024)
        for sub in (theirs, ours):
            sub.add_argument("--context", type=int, default=1024)
            sub.add_argument("--batch", type=int, default=512)
            sub.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        args = parser.parse_args(argv)
        try:
            engine = Ours(args) if args.engine == "ours" else open_llamacpp(args)
        except MimoError as error:
            print(json.dumps({"error": error.message, "hint": error.hint}), file=replies)
            return 1
        print(json.dumps(engine.info()), file=replies, flush=True)
        serve(engine, sys.stdin, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
