"""What rounding activations costs: products of the demo model on real text, kernels against exact.

    python bench/activation_error.py [--cache DIR] [--text FILE] [--tables avx2 avx512]

Runs the demo's BF16 pack in float32 over bench/demo_text.txt, keeps the inputs of every product,
and multiplies them again with the weights stored as NF4, MXFP4 and INT8: by the rows path (up to 8
rows) and by panels. A row's error is |kernel - exact| / |exact| with the same stored weights in
float64, a layer's the root mean square over its rows. Beside it stands what the format itself costs
the same products, and how far the inputs stick out. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
for folder in (str(FOLDER), str(FOLDER.parent)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from demo_quality import TEXT, with_kernels  # noqa: E402

from mimo_local import kernels  # noqa: E402
from mimo_local.demo import demo_pack  # noqa: E402
from mimo_local.experts.store import ExpertStore  # noqa: E402
from mimo_local.layers import MLP  # noqa: E402
from mimo_local.model import Model, Segment  # noqa: E402
from mimo_local.tokenizer import Tokenizer  # noqa: E402
from mimo_local.weights import QuantLinear, open_weights  # noqa: E402
from quant.formats import FORMATS, Parts  # noqa: E402

KINDS = ("q k v", "o", "gate up", "down")
STORED = ("nf4", "mxfp4", "int8")
EXACT_ROWS = 8
MOST_ROWS = 256
"""Rows of a matrix that are multiplied again, evenly spaced."""

Products = dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor]]]
"""(layer, kind) -> [(W (N, K), x (T, K))], float32."""


def record(pack: Path, ids: list[int]) -> Products:
    """The inputs of all products of one pass over `ids`, in float32 arithmetic."""
    found: dict[int, list[torch.Tensor]] = defaultdict(list)

    def call(self: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        found[id(self)].append(x.clone())
        return self.format.matmul(x, self.parts)

    plain = QuantLinear.__call__
    with with_kernels(None):
        weights = open_weights(pack)
        store = ExpertStore(weights)
        model = Model(weights, store)
        QuantLinear.__call__ = call  # type: ignore[method-assign]
        try:
            model.forward([Segment(torch.tensor(ids), model.new_cache())])
        finally:
            QuantLinear.__call__ = plain  # type: ignore[method-assign]
    products: Products = defaultdict(list)
    for i, layer in enumerate(model.layers):
        mlps = [layer.mlp] if isinstance(layer.mlp, MLP) else store.ram.get(i)
        uses = [("q k v", layer.attention.qkv), ("o", layer.attention.out)]
        uses += [("gate up", m) for mlp in mlps for m in (mlp.gate, mlp.up)]
        uses += [("down", mlp.down) for mlp in mlps]
        for kind, linear in uses:
            if id(linear) in found:
                w = linear.format.unpack(linear.parts)
                products[i, kind].append((w, torch.cat(found[id(linear)])))
    return products


def spread(x: torch.Tensor, most: int = MOST_ROWS) -> torch.Tensor:
    """At most that many rows of x, the first among them."""
    return x[:: -(-x.shape[0] // most)].contiguous()


def errors(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative error of every row."""
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)


def multiply(
    library: kernels.Kernels, fmt: str, parts: Parts, x: torch.Tensor, *, panels: bool
) -> torch.Tensor:
    """x W^T by one of the two paths; few rows are repeated until they are enough for panels."""
    w, rows = FORMATS[fmt].matrix(parts), x.shape[0]
    if panels and rows <= EXACT_ROWS:
        x = x.repeat(-(-(EXACT_ROWS + 1) // rows), 1)
    y = torch.empty(x.shape[0], w.rows)
    step = x.shape[0] if panels else EXACT_ROWS
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        library.matmul(w, part.data_ptr(), w.cols, len(part), y[start:].data_ptr(), w.rows)
    return y[:rows]


def measure(products: Products, tables: list[kernels.Kernels]) -> dict[str, dict[str, Any]]:
    """Case -> kind -> {"median", "worst", "layer"} over the layers; 99 % of all rows are below.

    "most of format": the largest share of the format's own error in the same layer.
    """
    by_layer: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    by_row: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    for (layer, kind), pairs in products.items():
        rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        for w, x in pairs:
            x = spread(x)
            wanted = x.double() @ w.double().T
            for fmt in STORED:
                parts = FORMATS[fmt].pack(w)
                exact = x.double() @ FORMATS[fmt].unpack(parts).double().T
                rows[f"{fmt} weights"].append(errors(exact, wanted))
                for table in tables:
                    for path in ("rows", "panels"):
                        y = multiply(table, fmt, parts, x, panels=path == "panels")
                        rows[f"{fmt} {table.isa} {path}"].append(errors(y, exact))
        for case, found in rows.items():
            by_row[case, kind] += found
            by_layer[case, kind][layer] = float(torch.cat(found).square().mean().sqrt())
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for (case, kind), layers in by_layer.items():
        worst = max(layers, key=lambda n: layers[n])
        own = by_layer[case.split()[0] + " weights", kind]
        results[case][kind] = {
            "median": round(statistics.median(layers.values()), 5),
            "worst": round(layers[worst], 5),
            "layer": worst,
            "most of format": round(max(v / own[n] for n, v in layers.items()), 3),
            "99 % of rows": round(percentile(torch.cat(by_row[case, kind])), 5),
        }
    return results


def percentile(x: torch.Tensor) -> float:
    """What 99 % of the values do not exceed."""
    return float(x.kthvalue(math.ceil(0.99 * x.numel())).values)


def outliers(products: Products, kind: str) -> dict[str, float]:
    """How far the inputs of a kind of product stick out, the same input counted once.

    max / rms: of a row, over all rows of all layers; and of its blocks of 64 columns, which share a
    scale. top columns: the share of a layer's energy in its strongest 0.1 % of columns.
    """
    whole, blocks, shares = [], [], []
    for (_, other), pairs in products.items():
        if other != kind:
            continue
        inputs = [x for _, x in (pairs[::2] if kind == "gate up" else pairs)]
        energy = torch.cat([x.square().sum(dim=0) for x in inputs])
        if kind == "gate up":  # experts see the same columns
            energy = energy.view(len(inputs), -1).sum(dim=0)
        n = math.ceil(energy.numel() / 1000)
        shares.append(float(energy.topk(n).values.sum() / energy.sum()))
        for x in inputs:
            for y, out in ((x, whole), (x.view(-1, 64), blocks)):
                rms = y.square().mean(dim=1).sqrt()
                out.append((y.abs().amax(dim=1) / rms)[rms > 0])
    rows, blocks64 = torch.cat(whole), torch.cat(blocks)
    return {
        "median": round(float(rows.median()), 1),
        "99 %": round(percentile(rows), 1),
        "most": round(float(rows.max()), 1),
        "block median": round(float(blocks64.median()), 1),
        "top columns median": round(statistics.median(shares), 4),
        "top columns most": round(max(shares), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="cache folder; default: the user's")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tables", nargs="+", help="default: all this CPU has but scalar")
    args = parser.parse_args()
    library = kernels.get()
    if library is None:
        raise SystemExit(kernels.why_unavailable())
    names = args.tables or [isa for isa in library.isas if isa != "scalar"]
    pack = demo_pack(fmt="bf16", cache_dir=args.cache)
    ids = Tokenizer.from_dir(pack).encode(args.text.read_text(encoding="utf-8"))
    products = record(pack, ids)
    stick_out = {kind: outliers(products, kind) for kind in KINDS}
    for kind, found in stick_out.items():
        print(f"{kind:8} {found}", flush=True)
    results = measure(products, [library.with_isa(name) for name in names])
    for case in sorted(results):
        found = [results[case][kind] for kind in KINDS]
        cells = (f"{c['median']:.4f} {c['worst']:.4f} {c['99 % of rows']:.4f} |" for c in found)
        print(f"{case:24}", *cells, flush=True)
    print(json.dumps({"tokens": len(ids), "outliers": stick_out, "errors": results}))


if __name__ == "__main__":
    main()
