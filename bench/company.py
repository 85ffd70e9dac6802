"""Several answers at once: tokens a second by their number, and what a long prompt does to one.

    python bench/company.py [-m MODEL] [-n 64] [--prompt 2000] [--repeat 3]

One engine. First 1, 2, 4 and 8 answers of `-n` tokens written together: tokens a second of all of
them, and of each. Then one answer beside a long prompt that comes in while it is written: tokens a
second before and meanwhile, the longest pause between two tokens, and how much longer the prompt
took than alone. Prints what it does on stderr, one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from mimo_local.engine import Engine
from mimo_local.events import Done, Failed, Token
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings
from mimo_local.stream import Stream


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, help="a pack; unset: the demo")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.model is None:
        from mimo_local.demo import demo_pack

        args.model = demo_pack()
    context = args.prompt + 40 * args.tokens + 64
    with Engine.load(Settings(model=args.model, context=context)) as engine:
        answer(engine, 1, args.tokens)  # warm
        together = [
            together_rates(engine, count, args.tokens, args.repeat) for count in (1, 2, 4, 8)
        ]
        beside = [beside_prompt(engine, args.prompt, seed) for seed in range(args.repeat)]
    found = {
        "model": args.model.name,
        "together": together,
        "beside_a_prompt": {key: statistics.median(b[key] for b in beside) for key in beside[0]},
    }
    print(json.dumps(found))
    return 0


class Endless:
    """Anything but the ids that end an answer."""

    def __init__(self, engine: Engine) -> None:
        self.ends = sorted(engine.stop_ids)

    def mask(self, logits: Tensor) -> Tensor:
        return logits.index_fill(0, torch.tensor(self.ends), float("-inf"))

    def advance(self, token: int) -> bool:
        return False


def ids(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(20, 1000), k=n)


def answer(engine: Engine, seed: int, tokens: int, prompt: int = 20) -> Stream:
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=seed, max_tokens=tokens)
    return engine.submit(None, ids(prompt, seed), params, constraint=Endless(engine))


def drain(stream: Stream, times: list[float]) -> None:
    for event in stream:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Token):
            times.append(time.perf_counter())


def together_rates(engine: Engine, count: int, tokens: int, repeat: int) -> dict[str, Any]:
    """Rate from the first token of any to the last; no answer stops early."""
    rates = []
    for turn in range(repeat):
        streams = [answer(engine, 100 * turn + i + count, tokens) for i in range(count)]
        times: list[list[float]] = [[] for _ in streams]
        threads = [Thread(target=drain, args=pair) for pair in zip(streams, times, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        end = max(t[-1] for t in times)
        rates.append((sum(map(len, times)) - count) / (end - min(t[0] for t in times)))
    rate = statistics.median(rates)
    print(f"{count} together: {rate:.1f} tok/s, {rate / count:.1f} each", file=sys.stderr)
    return {"answers": count, "tokens_per_s": rate, "each": rate / count}


def beside_prompt(engine: Engine, n: int, seed: int) -> dict[str, float]:
    """An answer is written; in its middle a prompt of n tokens is asked about."""
    alone = time.perf_counter()
    done = list(engine.submit(None, ids(n, 9000 + seed), SamplingParams(max_tokens=1)))[-1]
    assert isinstance(done, Done)
    alone = done.stats.prefill_s
    stream, times = answer(engine, 7000 + seed, 10_000), list[float]()
    thread = Thread(target=drain, args=(stream, times))
    thread.start()
    while len(times) < 40:
        time.sleep(0.001)
    start = time.perf_counter()
    end = list(engine.submit(None, ids(n, 8000 + seed), SamplingParams(max_tokens=1)))[-1]
    stop = time.perf_counter()
    stream.cancel()
    thread.join()
    assert isinstance(end, Done)
    before = [at for at in times if at <= start]
    meanwhile = [start, *(at for at in times if start < at <= stop), stop]
    found = {
        "prompt_tokens": float(n),
        "prompt_alone_s": alone,
        "prompt_beside_s": end.stats.prefill_s,
        "tokens_per_s_before": (len(before) - 1) / (before[-1] - before[0]),
        "tokens_per_s_meanwhile": (len(meanwhile) - 2) / (stop - start),
        "longest_pause_s": max(b - a for a, b in itertools.pairwise(meanwhile)),
    }
    print({key: round(value, 3) for key, value in found.items()}, file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
