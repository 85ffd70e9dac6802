"""Perplexity of the demo model: original attention and the shipped window, at BF16, 8 and 4 bit.

    python bench/demo_quality.py [--cache DIR] [--text FILE] [--activations [TABLE ...]]

Reads bench/demo_text.txt (written for this repository) whole, through this project's engine;
builds the packs it needs into the cache. `no sinks` is the shipped pack with its sinks switched
off: what the learned ones are worth. --activations: instead, what rounding activations costs the
shipped packs: float32 activations (the torch twins) against the kernels of each table (default: of
this CPU's best), reading 512 rows at a time (panels) and 8 (rows path). Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mimo_local import kernels
from mimo_local.demo import demo_pack
from mimo_local.demo.rewrite import SINK_OFF
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.tokenizer import Tokenizer
from mimo_local.weights import PackWeights, open_weights

TEXT = Path(__file__).parent / "demo_text.txt"
BANDS = ((1, 128), (128, 512), (512, 1 << 20))
"""Positions before the window fills, soon after, and long after."""


def token_losses(
    model: Model, ids: list[int], chunk: int = 512, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Negative log-likelihood (len(ids) - 1,) f32 of every token after the first.

    `dtype`: of the cache.
    """
    cache = model.new_cache(dtype=dtype)
    losses = []
    rows = torch.tensor(ids)
    for start in range(0, len(ids) - 1, chunk):
        part = rows[start : min(start + chunk, len(ids) - 1)]
        logp = model.logits(model.forward([Segment(part, cache)])).log_softmax(-1)
        target = rows[start + 1 : start + 1 + len(part)]
        losses.append(-logp.gather(1, target[:, None])[:, 0])
    return torch.cat(losses)


def perplexities(losses: torch.Tensor) -> dict[str, float]:
    """Perplexity over all positions and over each band that the text reaches."""
    out = {"all": losses}
    for low, high in BANDS:
        part = losses[low - 1 : high - 1]
        if len(part):
            out[f"{low}-{min(high, len(losses) + 1) - 1}"] = part
    return {name: round(math.exp(float(part.mean())), 3) for name, part in out.items()}


def without_sinks(weights: PackWeights) -> PackWeights:
    """The same weights, every sink reading as switched off."""
    read: Callable[[str], torch.Tensor] = weights.tensor

    def tensor(name: str) -> torch.Tensor:
        value = read(name)
        return torch.full_like(value, SINK_OFF) if "sink" in name else value

    weights.tensor = tensor  # type: ignore[method-assign]
    return weights


@contextmanager
def with_kernels(library: kernels.Kernels | None) -> Iterator[None]:
    """This library, or none, for everything that asks for one meanwhile."""
    get = kernels.get
    kernels.get = lambda: library  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.get = get


def measure(pack: Path, ids: list[int], *, sinks: bool = True) -> dict[str, Any]:
    """Perplexities and size of one pack."""
    weights = open_weights(pack)
    assert isinstance(weights, PackWeights)
    if not sinks:
        weights = without_sinks(weights)
    began = time.monotonic()
    losses = token_losses(Model(weights, ExpertStore(weights)), ids)
    return {
        "perplexity": perplexities(losses),
        "pack_bytes": sum(f.stat().st_size for f in pack.iterdir()),
        "seconds": round(time.monotonic() - began, 1),
    }


def packs(cache: Path | None, text: Path) -> tuple[dict[str, Any], int]:
    """Results of every pack by name, and how many tokens the text has."""
    results: dict[str, Any] = {}
    ids: list[int] = []
    for variant, fmt, sinks in (
        ("exact", "bf16", True),
        ("exact", "int8", True),
        ("swa", "bf16", True),
        ("swa", "int8", True),
        ("swa", "nf4", True),
        ("swa", "int8", False),
    ):
        pack = demo_pack(variant=variant, fmt=fmt, cache_dir=cache)
        ids = ids or Tokenizer.from_dir(pack).encode(text.read_text(encoding="utf-8"))
        name = f"{variant} {fmt}" + ("" if sinks else " no sinks")
        results[name] = measure(pack, ids, sinks=sinks)
        print(f"{name:20} {results[name]['perplexity']}", flush=True)
    return results, len(ids)


def activations(cache: Path | None, text: Path, tables: list[str]) -> tuple[dict[str, Any], int]:
    """Results by pack and arithmetic, and how many tokens the text has."""
    library = kernels.loaded()
    results: dict[str, Any] = {}
    ids: list[int] = []
    for fmt in ("int8", "nf4"):
        pack = demo_pack(fmt=fmt, cache_dir=cache)
        ids = ids or Tokenizer.from_dir(pack).encode(text.read_text(encoding="utf-8"))
        cases: list[tuple[str, kernels.Kernels | None, int]] = [("float32", None, 512)]
        for table in tables or [library.isa]:
            bound = library.with_isa(table)
            cases += [(f"{table} panels", bound, 512), (f"{table} rows", bound, 8)]
        plain: torch.Tensor | None = None
        for arithmetic, kernel, chunk in cases:
            with with_kernels(kernel):
                weights = open_weights(pack)
                losses = token_losses(Model(weights, ExpertStore(weights)), ids, chunk)
            plain = losses if plain is None else plain
            more = losses - plain
            change = math.expm1(float(more.mean()))
            sigma = float(more.std()) / len(more) ** 0.5
            results[f"{fmt} {arithmetic}"] = {
                "perplexity": perplexities(losses),
                "change": round(change, 5),
                "standard_error": round(sigma, 5),
                "token_change_rms": round(float(more.square().mean().sqrt()), 4),
            }
            perplexity = perplexities(losses)["all"]
            print(f"{fmt} {arithmetic:16} {perplexity} {change:+.2%} +- {sigma:.2%}", flush=True)
    return results, len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="cache folder; default: the user's")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--activations", nargs="*", metavar="TABLE")
    args = parser.parse_args()
    if args.activations is None:
        results, tokens = packs(args.cache, args.text)
    else:
        results, tokens = activations(args.cache, args.text, args.activations)
    report = {
        "text": args.text.name,
        "tokens": tokens,
        "kernels": kernels.describe(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
