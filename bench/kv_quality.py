"""What keeping keys and values in fewer bits costs: the demo model with f32, bf16 and int8 caches.

    python bench/kv_quality.py [--cache DIR] [--text FILE]

Products: queries, keys and values of every full layer while the demo reads the text, then attention
with rounded keys and values against float32 ones: |difference| / |output| of a row, the median of
rows and the worst layer's. `groups`: one scale per so many dims instead of one per row and head;
`turned`: keys and queries rotated by a Hadamard matrix first; `kernels`: what the library makes of
the rows it stores against the same rows in float32. Perplexity: of the text, and change to f32 with
its standard error; of the shipped int8 pack, and of the bf16 one, whose products round nothing.
Recall: the text's first 160 tokens come again 2000 and 4000 tokens later: how many are the
likeliest continuation, and their perplexity beside the first time's. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_quality import TEXT, perplexities, token_losses, with_kernels

from mimo_local import kernels, layers, ops
from mimo_local.blocks import KV_DTYPES
from mimo_local.cache_layers import View, coded
from mimo_local.demo import demo_pack
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.tokenizer import Tokenizer
from mimo_local.weights import open_weights

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
Rounding = Callable[[torch.Tensor], torch.Tensor]
DISTANCES = (2000, 4000)
PASSAGE, STARTED = 160, 8


def model_of(pack: Path) -> Model:
    weights = open_weights(pack)
    return Model(weights, ExpertStore(weights))


# ---- products ------------------------------------------------------------------------------------


def seen(pack: Path, ids: list[int]) -> list[dict[str, Any]]:
    """Queries, keys, values and positions of every call of a full layer, in float32."""
    calls: list[dict[str, Any]] = []
    attention = ops.attention

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        if facts["window"] is None:
            calls.append({"q": q.clone(), "k": k.clone(), "v": v.clone(), **facts})
        return attention(q, k, v, **facts)

    with with_kernels(None):
        model = model_of(pack)
        layers.ops.attention = recording
        try:
            token_losses(model, ids)
        finally:
            layers.ops.attention = attention
    return calls


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def by_row(x: torch.Tensor) -> torch.Tensor:
    codes, scales = coded(x)
    return codes * scales[..., None]


def in_groups(size: int) -> Rounding:
    """One scale per `size` dims."""

    def rounding(x: torch.Tensor) -> torch.Tensor:
        return by_row(x.reshape(x.shape[0], -1, size)).view(x.shape)

    return rounding


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rounded in a basis that spreads every outlier over 32 dims, and turned back."""
    h = torch.ones(1, 1)
    for _ in range(5):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    h /= math.sqrt(32)
    blocks = x.reshape(*x.shape[:2], -1, 32)
    rounded = by_row((blocks @ h).flatten(-2)).view(blocks.shape)
    return (rounded @ h.T).view(x.shape)


ROUNDINGS: dict[str, tuple[Rounding, Rounding]] = {
    "bf16": (to_bf16, to_bf16),
    "int8": (by_row, by_row),
    "int8, keys only": (by_row, same),
    "int8, values only": (same, by_row),
    "int8, groups of 32": (in_groups(32), in_groups(32)),
    "int8, keys turned": (turned, by_row),
}


def errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(rows,) relative differences."""
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


def native(call: dict[str, Any], rows: View) -> torch.Tensor:
    """The library's attention over stored rows; no window, no sink."""
    q, library = call["q"].contiguous(), kernels.loaded()
    n, heads, dk = q.shape
    dv = rows.v.shape[2]
    facts = kernels.Heads(heads, rows.k.shape[1], dk, dv, 0, None, KV_DTYPES[rows.k.dtype])
    sequence = kernels.Sequence(*rows.where, 0, call["start"], n)
    out = torch.empty(n, heads * dv)
    library.call(
        "attend", ctypes.byref(facts), q.data_ptr(), heads * dk, ctypes.byref(sequence), 1,
        out.data_ptr(), heads * dv,
    )  # fmt: skip
    return out


def products(calls: list[dict[str, Any]], per_layer: int) -> dict[str, Any]:
    """Error of every rounding; calls come in the order of layers, `per_layer` for each."""
    found: dict[str, list[torch.Tensor]] = {}
    largest: list[float] = []
    for call in calls:
        facts = {name: call[name] for name in ("start", "first", "window", "sink")}
        q, k, v = (call[name].float() for name in "qkv")
        wanted = ops.attention(q, k, v, **facts)
        for name, (keys, values) in ROUNDINGS.items():
            got = ops.attention(q, keys(k), values(v), **facts)
            found.setdefault(name, []).append(errors(got, wanted))
        rows = View(*(coded(k)[0], coded(v)[0]), 0, coded(k)[1], coded(v)[1])
        exact = ops.attention(q, *rows.numbers(), **facts)
        found.setdefault("kernels", []).append(errors(native(call, rows), exact))
        largest.append(float((k.abs().amax(-1) / k.square().mean(-1).sqrt()).median()))
    out: dict[str, Any] = {"key_max_over_rms": round(statistics.median(largest), 2)}
    layers_seen = len(calls) // per_layer
    for name, parts in found.items():
        by_layer = [float(torch.cat(parts[i::layers_seen]).median()) for i in range(layers_seen)]
        out[name] = {
            "median": _short(float(torch.cat(parts).median())),
            "worst_layer": _short(max(by_layer)),
            "worst_row": _short(float(torch.cat(parts).max())),
        }
        print(f"{name:20} {out[name]}", flush=True)
    return out


# ---- the whole model -----------------------------------------------------------------------------


def text(pack: Path, ids: list[int]) -> dict[str, Any]:
    """Perplexity with each kind of cache, and the change to f32."""
    model, plain, out = model_of(pack), torch.empty(0), {}
    for name, dtype in DTYPES.items():
        losses = token_losses(model, ids, dtype=dtype)
        plain = losses if name == "f32" else plain
        more = losses - plain
        out[name] = {
            "perplexity": perplexities(losses),
            "change": round(math.expm1(float(more.mean())), 6),
            "standard_error": round(float(more.std()) / len(more) ** 0.5, 6),
            "token_change_rms": round(float(more.square().mean().sqrt()), 5),
        }
        print(f"{name:5} {out[name]}", flush=True)
    return out


def recall(pack: Path, ids: list[int]) -> dict[str, Any]:
    """How well the first lines of the text are continued when they come a second time."""
    model, plain, out = model_of(pack), torch.empty(0), {}
    passage, other = ids[:PASSAGE], ids[PASSAGE:]
    for distance in DISTANCES:
        between = (other * (distance // len(other) + 1))[: distance - PASSAGE]
        rows = torch.tensor(passage + between + passage)
        for name, dtype in DTYPES.items():
            cache = model.new_cache(dtype=dtype)
            model.prefill(Segment(rows[:-PASSAGE], cache))
            logp = model.logits(model.forward([Segment(rows[-PASSAGE:], cache)])).log_softmax(-1)
            # The first few are needed to tell what is being repeated.
            wanted, logp = rows[-PASSAGE + STARTED :], logp[STARTED - 1 : -1]
            losses = -logp.gather(1, wanted[:, None])[:, 0]
            plain = losses if name == "f32" else plain
            more = losses - plain
            found = {
                "copied": int((logp.argmax(-1) == wanted).sum()),
                "of": len(wanted),
                "perplexity": round(math.exp(float(losses.mean())), 3),
                "change": round(math.expm1(float(more.mean())), 5),
                "standard_error": round(float(more.std()) / len(more) ** 0.5, 5),
            }
            out[f"{distance} {name}"] = found
            print(f"recall over {distance} tokens, {name}: {found}", flush=True)
        alone = token_losses(model, ids[:PASSAGE])[STARTED - 1 :]
        out["the first time"] = {"perplexity": round(math.exp(float(alone.mean())), 3)}
    return out


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="cache folder; default: the user's")
    parser.add_argument("--text", type=Path, default=TEXT)
    args = parser.parse_args()
    packs = {fmt: demo_pack(fmt=fmt, cache_dir=args.cache) for fmt in ("int8", "bf16")}
    pack = packs["int8"]
    tokenizer, words = Tokenizer.from_dir(pack), args.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(words)
    calls = seen(pack, ids)
    n_full = sum(spec.window is None for spec in open_weights(pack).config.layers)
    report = {
        "text": args.text.name,
        "tokens": len(ids),
        "kernels": kernels.describe(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "products": products(calls, len(calls) // n_full),
        "text_perplexity": {fmt: text(one, ids) for fmt, one in packs.items()},
        "recall": {fmt: recall(one, ids) for fmt, one in packs.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
