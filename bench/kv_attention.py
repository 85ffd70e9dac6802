"""Attention of one full layer over 16-bit and over 8-bit keys and values, in turns.

    python bench/kv_attention.py [--contexts N ...] [--rows N ...] [--threads N ...] [--isa NAME]

The real model's shapes (64 query heads on 4 key/value heads, 192/128), caches too large for the
processor's. Each round times both kinds after one another and reads memory alone between; figures
are medians of rounds, the ratio a median of the rounds' ratios. Predicted: bytes / what memory gave
with these threads, the least time such a step can take. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from mimo_local import hardware, kernels, limits
from mimo_local.random_weights import shape_config
from mimo_local.shape_runs import AttentionCase

KINDS = {"bf16": torch.bfloat16, "int8": torch.int8}
PROBE = 512 << 20


def measure(
    cases: dict[str, AttentionCase], native: kernels.Kernels, memory: limits.Memory, rounds: int
) -> dict[str, Any]:
    """Milliseconds, GB/s and bytes of each kind, and how many times faster int8 was."""
    times: dict[str, list[float]] = {kind: [] for kind in cases}
    rates = [memory.sample()]
    for case in cases.values():
        case.seconds(native)
    for n in range(rounds):
        for kind in sorted(cases, reverse=n % 2 == 1):  # none is always the first
            found = [cases[kind].seconds(native) for _ in range(5)]
            times[kind].append(statistics.median(found))
        rates.append(memory.sample())
    rate = statistics.median(rates)
    out: dict[str, Any] = {"memory_gb_s": round(rate, 1)}
    for kind, case in cases.items():
        seconds = statistics.median(times[kind])
        out[kind] = {
            "ms": round(1e3 * seconds, 3),
            "bytes": case.nbytes,
            "predicted_ms": round(case.nbytes / rate / 1e6, 3),
            "gb_s": round(case.nbytes / seconds / 1e9, 2),
        }
    pairs = zip(times["bf16"], times["int8"], strict=True)
    out["times_faster"] = round(statistics.median(a / b for a, b in pairs), 3)
    return out


def main() -> None:
    library = kernels.loaded()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[library.default_threads, 1], metavar="N"
    )
    parser.add_argument("--isa", nargs="+", default=[library.isa])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    spec = next(s for s in shape_config(1, 32_768, shape="real").layers if s.window is None)
    memory = limits.Memory(PROBE)
    results = []
    for context in args.contexts:
        for rows in args.rows:
            cases = {
                kind: AttentionCase(spec, context, dtype=dtype, rows=rows)
                for kind, dtype in KINDS.items()
            }
            for threads in dict.fromkeys(args.threads):
                library.set_threads(threads)
                memory.choose(3)
                for isa in args.isa:
                    found = measure(cases, library.with_isa(isa), memory, args.rounds)
                    facts = {"context": context, "rows": rows, "threads": threads, "isa": isa}
                    results.append(facts | found)
                    line = ", ".join(f"{kind} {found[kind]['ms']} ms" for kind in cases)
                    print(facts, line, f"{found['times_faster']} times", flush=True)
    machine = hardware.detect(Path.cwd())
    print(json.dumps({"cpu": machine.cpu, "results": results}))


if __name__ == "__main__":
    main()
