"""Four bits against four bits: NF4 beside llama.cpp's Q4_K, on weights that no 4-bit grid favours.

    python bench/quality_vs_q4k.py [--rows N] [--cols N] [--tokens N]
                                  [--model [--text FILE] [--cache DIR]]

Q4_K is written anew here, in torch, after its published layout: 256 weights share two float16
numbers, each 32 of them a 6-bit scale and a 6-bit minimum; scale and minimum by weighted least
squares over 21 trial grids, the weights being the mean magnitude of the block plus |w| (or with
`importance` the mean square of the activation, as its importance matrix does). 4.5 bits a weight.
NF4 has 4.25: as stored without calibration, with the weighted scale search alone (`columns`), and
with error feedback, which is what `mimo quantize --calibrate` does.

Weights: Gaussian, Laplace, and Student's t with 4 degrees of freedom, every column times its own
log-normal factor (sigma 0.25); activations: Gaussian, every column times exp(N(0, 1)), so that some
channels carry most of the energy, as in trained models. `mixed`: half of their energy lies in an
eighth as many directions as there are columns, which go together then. Nothing lies on a grid.
`weights` is the relative RMS error of the matrix, `output` that of x W^T.

--model: also KL and top-1 agreement on the shipped texts (--tokens of each) of the demo with its
experts stored each way, all else exact and in float32. Its weights sit on a Q4_1 grid, so the
source is made first: every expert weight plus uniform noise of one step of that grid, which fills
the gaps between its points evenly. What experts are multiplied with is heard in the shipped
calibration texts (--calibrate-tokens of each), which share no line with those that are read, for
Q4_K's importance as for NF4. `nf4 4.5 bits` widens the experts of the layers that lose most to
int8, as `--bits 4.5` does. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))

from mimo_local.demo import demo_pack  # noqa: E402
from mimo_local.fidelity.budget import weigh  # noqa: E402
from mimo_local.fidelity.calibration import Calibration  # noqa: E402
from mimo_local.fidelity.run import Ids  # noqa: E402
from mimo_local.fidelity.scores import Scores  # noqa: E402
from mimo_local.fidelity.side import Side  # noqa: E402
from mimo_local.weights import (  # noqa: E402
    EXPERT_PARTS,
    Expert,
    PackWeights,
    QuantLinear,
    expert_name,
    open_weights,
)
from quant.calibrated import Importance, importance_of, pack_nf4, upper_factor  # noqa: E402
from quant.formats import get_format  # noqa: E402
from quant.inventory import expert_of  # noqa: E402
from quant.measure import relative_rms  # noqa: E402

BITS = {"nf4": 4.25, "nf4 columns": 4.25, "nf4 feedback": 4.25, "q4_k": 4.5}
BITS["q4_k importance"] = 4.5
Quantise = Callable[[torch.Tensor, Importance | None], torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor]


def nf4(*, calibrated: bool, feedback: bool = False) -> Quantise:
    """As this project stores it, scale search on."""
    fmt = get_format("nf4")

    def quantise(w: torch.Tensor, known: Importance | None) -> torch.Tensor:
        if known is None or not calibrated:
            return fmt.unpack(fmt.pack(w))
        return fmt.unpack(pack_nf4(w, known if feedback else Importance(known.columns)))

    return quantise


def q4_k(*, weighted: bool) -> Quantise:
    """Q4_K; `weighted`: with an importance matrix."""

    def quantise(w: torch.Tensor, known: Importance | None) -> torch.Tensor:
        energy = torch.ones(w.shape[1]) if known is None else known.columns
        x = w.reshape(-1, 32)
        plain = x.square().mean(1, keepdim=True).sqrt() + x.abs()
        spread = 2 * w.reshape(-1, 256).square().mean(1).repeat_interleave(8)[:, None]
        e = energy.expand_as(w).reshape(-1, 32) * (spread + x.square()).sqrt()
        scale, low = _grid(x, e if weighted else plain)
        scales, lows = scale.view(-1, 8), low.view(-1, 8)
        scale, low = (_six_bits(part).view(-1, 1) for part in (scales, lows))
        code = torch.where(scale > 0, (x + low) / scale, 0.0).round().clamp(0, 15)
        return (scale * code - low).reshape(w.shape)

    return quantise


def _six_bits(parts: torch.Tensor) -> torch.Tensor:
    """Eight scales or minima as 6-bit multiples of one float16."""
    most = parts.amax(1, keepdim=True)
    steps = torch.where(most > 0, parts * 63 / most, 0.0).round().clamp(0, 63)
    return (most / 63).half().float() * steps


def _grid(x: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, 32), weights e -> scale, minimum >= 0 (B,): x is about scale * code - minimum."""
    low, high = x.amin(1).clamp(max=0), x.amax(1)
    width = (high - low).clamp(min=1e-30)
    best_scale, best_low = width / 15, -low

    def codes(inverse: torch.Tensor) -> torch.Tensor:
        return ((x - low[:, None]) * inverse[:, None]).round().clamp(0, 15)

    def error(scale: torch.Tensor, minimum: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (e * (scale[:, None] * q - minimum[:, None] - x).square()).sum(1)

    least = error(best_scale, best_low, codes(1 / best_scale))
    total, mean = e.sum(1), (e * x).sum(1)
    for trial in range(21):
        q = codes((14 + 0.1 * trial) / width)
        first, second, cross = (e * q).sum(1), (e * q * q).sum(1), (e * q * x).sum(1)
        determinant = (total * second - first * first).clamp(min=1e-30)
        scale = (total * cross - mean * first) / determinant
        minimum = (first * cross - second * mean) / determinant
        scale = torch.where(minimum < 0, cross / second.clamp(min=1e-30), scale)
        minimum = minimum.clamp(min=0)
        found = error(scale, minimum, q)
        better = found < least
        least = torch.where(better, found, least)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, minimum, best_low)
    return best_scale, best_low


def weights(name: str, shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """A random matrix of this kind, its columns of different sizes."""
    normal = torch.randn(shape, generator=g)
    if name == "laplace":
        u = torch.rand(shape, generator=g) - 0.5
        normal = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))
    elif name == "student t4":
        chi = torch.randn((4, *shape), generator=g).square().sum(0)
        normal = normal / (chi / 4).sqrt()
    return normal * torch.exp(0.25 * torch.randn(shape[1], generator=g))


class Variant(PackWeights):
    """A pack whose experts are changed as they are read."""

    def __init__(self, base: PackWeights, change: Change) -> None:
        self.__dict__.update(base.__dict__)
        self.change = change

    def expert(self, layer: int, e: int) -> Expert:
        plain, made = super().expert(layer, e), []
        for part, linear in zip(EXPERT_PARTS, (plain.gate, plain.up, plain.down), strict=True):
            w = self.change(expert_name(layer, e, part), linear.format.unpack(linear.parts))
            made.append(QuantLinear(get_format("f32"), {"weight": w}, *w.shape))
        return Expert(*made)


def off_the_grid(name: str, w: torch.Tensor) -> torch.Tensor:
    """W plus uniform noise as wide as a step of the Q4_1 grid of its 32 weights."""
    blocks = w.reshape(-1, 32)
    step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (blocks + (torch.rand(blocks.shape, generator=g) - 0.5) * step).reshape(w.shape)


def hidden(weights: PackWeights, ids: Ids) -> tuple[Side, torch.Tensor]:
    """All texts through all layers in float32."""
    side = Side(weights, ids.lengths, exact=True)
    x = side.embed(ids.rows)
    for spec in weights.config.layers:
        x = side.through(spec, x, lambda share: None)
    return side, side.normed(x)


class Hearing(Calibration):
    """Keeps what was heard in every layer, and writes nothing."""

    heard_in: dict[int, Any]

    def _save(self) -> None:
        if self.heard is not None:
            self.heard_in[self.heard.layer] = self.heard

    def read(self) -> dict[int, Any]:
        self.heard_in, self.hidden = {}, self.side.embed(self.ids)
        for spec in self.weights.config.layers:
            self._through(spec.index, lambda nbytes, stage: None)
        return self.heard_in


def model(
    ways: dict[str, Quantise],
    cache: Path | None,
    tokens: int,
    calibration: int,
    text: Path | None,
) -> dict[str, object]:
    """The demo's figures by way of storing its experts."""
    pack = demo_pack(fmt="bf16", cache_dir=cache)
    base = open_weights(pack)
    assert isinstance(base, PackWeights)
    original = Variant(base, off_the_grid)
    heard = Hearing(original, pack, pack, tokens=calibration).read()
    print("demo        calibrated", flush=True)
    ids = Ids.read(pack, text, tokens, base.config.max_context)
    rows, targets, spans = ids.predictions()
    source, exact = hidden(original, ids)
    logits = list(source.logits(exact[rows]))
    wide, bits = widened(original, pack)
    results: dict[str, object] = {"widened": wide}
    tried = [(name, way, (), BITS[name]) for name, way in ways.items()]
    tried.append(("nf4 4.5 bits", ways["nf4 feedback"], tuple(wide), bits))
    for name, quantise, eight, stored in tried:

        def change(
            tensor: str, w: torch.Tensor, quantise: Quantise = quantise,
            eight: tuple[int, ...] = eight,
        ) -> torch.Tensor:  # fmt: skip
            layer, expert, part = expert_of(tensor) or (0, 0, "")
            w = off_the_grid(tensor, w)
            if layer in eight:
                return get_format("int8").unpack(get_format("int8").pack(w))
            return quantise(w, heard[layer].of(expert, part, "feedback"))

        side, found = hidden(Variant(base, change), ids)
        scores = Scores(targets, two=True)
        for pair in zip(side.logits(found[rows]), logits, strict=True):
            scores.add(*pair)
        each = {text: scores.figures(rows) for text, rows in spans.items()}
        figures = each["all"]
        results[name] = {"bits": stored, **{t: dataclasses.asdict(f) for t, f in each.items()}}
        print(
            f"demo        {name:16} {stored:.2f} bits  KL {figures.kl:.4f}  "
            f"top-1 {figures.top1:.3f}  perplexity {figures.perplexity:.3f} "
            f"({figures.source_perplexity:.3f})  "
            + "  ".join(f"{text} {f.kl:.3f}" for text, f in each.items() if text != "all"),
            flush=True,
        )
    return results


def widened(original: PackWeights, pack: Path) -> tuple[list[int], float]:
    """Layers whose experts go to int8 within 4.5 bits, as `--bits` chooses, and the bits then."""
    losses = weigh(original, pack, get_format("nf4"))
    shapes = [(linear.rows, linear.cols) for e in [original.expert(next(iter(losses)), 0)]
              for linear in (e.gate, e.up, e.down)]  # fmt: skip
    weights = sum(rows * cols for rows, cols in shapes)
    four, eight = (
        8 * sum(get_format(f).nbytes(*shape) for shape in shapes) / weights for f in ("nf4", "int8")
    )
    count = int((4.5 - four) / (eight - four) * len(losses))
    wide = sorted(losses, key=lambda layer: (-losses[layer], layer))[:count]
    return sorted(wide), four + (eight - four) * count / len(losses)


def heard_of(x: torch.Tensor) -> Importance:
    """What calibration learns from these inputs."""
    columns = importance_of(x.square().mean(0))
    assert columns is not None
    return Importance(columns, upper_factor(x.T @ x, len(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--calibrate-tokens", type=int, default=1500)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--text", type=Path, help="read this file instead of the shipped texts")
    parser.add_argument("--cache", type=Path, help="cache folder of the demo; default: the user's")
    args = parser.parse_args()
    ways: dict[str, Quantise] = {
        "nf4": nf4(calibrated=False),
        "nf4 columns": nf4(calibrated=True),
        "nf4 feedback": nf4(calibrated=True, feedback=True),
        "q4_k": q4_k(weighted=False),
        "q4_k importance": q4_k(weighted=True),
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("gaussian", "laplace", "student t4"):
        g = torch.Generator().manual_seed(0)
        w = weights(kind, (args.rows, args.cols), g)
        channels = torch.exp(torch.randn(args.cols, generator=g))
        mix = torch.randn(args.cols // 8, args.cols, generator=g) / (args.cols / 8) ** 0.5
        inputs = []
        for part in range(
            4
        ):  # calibrated on other tokens than judged on: plain, plain, mixed, mixed
            x = torch.randn(args.tokens * (1 if part % 2 else 8), args.cols, generator=g)
            if part >= 2:
                x = (x + torch.randn(len(x), len(mix), generator=g) @ mix) / 2**0.5
            inputs.append(x * channels)
        known = [heard_of(inputs[0]), heard_of(inputs[2])]
        results[kind] = {}
        for name, quantise in ways.items():
            stored = [quantise(w, each) for each in known]
            found = {"bits": BITS[name], "weights": round(relative_rms(w, stored[0]), 5)}
            for case, x, q in zip(("output", "mixed"), inputs[1::2], stored, strict=True):
                found[case] = round(relative_rms(x @ w.T, x @ q.T), 5)
            results[kind][name] = found
            print(
                f"{kind:10}  {name:16} {found['bits']:.2f} bits  weights {found['weights']:.4f}  "
                f"output {found['output']:.4f}  mixed {found['mixed']:.4f}",
                flush=True,
            )
    report = {"rows": args.rows, "cols": args.cols, "tokens": args.tokens, "results": results}
    if args.model:
        report["demo"] = model(ways, args.cache, args.tokens, args.calibrate_tokens, args.text)
    print(json.dumps(report | {"torch": torch.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
