"""Four bits against four bits: NF4 beside llama.cpp's Q4_K, on weights that no 4-bit grid favours.

    python bench/quality_vs_q4k.py [--rows N] [--cols N] [--tokens N] [--model [--cache DIR]]

Q4_K is written anew here, in torch, after its published layout: 256 weights share two float16
numbers, each 32 of them a 6-bit scale and a 6-bit minimum; scale and minimum by weighted least
squares over 21 trial grids, the weights being the mean magnitude of the block plus |w| (or with
`importance` the mean square of the activation, as its importance matrix does). 4.5 bits a weight.
NF4 has 4.25; `nf4 block 32` is what its scales for every 32 weights would give at 4.5, `nf4
importance` chooses each block's scale by the error weighted with the activations.

Weights: Gaussian, Laplace, and Student's t with 4 degrees of freedom, every column times its own
log-normal factor (sigma 0.25); activations: Gaussian, every column times exp(N(0, 1)), so that some
channels carry most of the energy, as in trained models. Nothing lies on a grid. `weights` is the
relative RMS error of the matrix, `output` that of x W^T.

--model: also KL and top-1 agreement on the shipped texts (--tokens of each) of the demo with its
experts stored each way, all else exact and in float32. Its weights sit on a Q4_1 grid, so the
source is made first: every expert weight plus uniform noise of one step of that grid, which fills
the gaps between its points evenly. Energies of activations come from bench/demo_text.txt, another
text. Last stdout line is JSON.
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

import torch

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))

from mimo_local.demo import demo_pack  # noqa: E402
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
from quant.formats import NF4, get_format  # noqa: E402
from quant.measure import relative_rms  # noqa: E402
from quant.twins import NF4_CODES, half_scale  # noqa: E402

BITS = {"nf4": 4.25, "nf4 importance": 4.25, "nf4 block 32": 4.5, "q4_k": 4.5}
BITS["q4_k importance"] = 4.5
Quantise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor]


def nf4(w: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """As this project stores it, scale search on."""
    fmt = get_format("nf4")
    assert isinstance(fmt, NF4)
    return fmt.unpack(fmt.pack(w))


def nf4_trials(block: int, *, weighted: bool) -> Quantise:
    """NF4 whose scale is the best of 16 around the largest magnitude, then fitted."""
    codes = torch.tensor(NF4_CODES)
    middles = (codes[1:] + codes[:-1]) / 2

    def quantise(w: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        x = w.reshape(-1, block)
        e = energy.expand_as(w).reshape(-1, block) if weighted else torch.ones_like(x)
        most = x.abs().amax(1).clamp(min=1e-30)
        best, least = x, torch.full_like(most, torch.inf)
        for i in range(16):
            scale = most * (0.7 + 0.025 * i)
            values = codes[torch.bucketize(x / scale[:, None], middles)]
            fitted = (e * x * values).sum(1) / (e * values.square()).sum(1).clamp(min=1e-30)
            stored = values * half_scale(fitted.abs()).float()[:, None]
            error = (e * (stored - x).square()).sum(1)
            best = torch.where((error < least)[:, None], stored, best)
            least = torch.minimum(error, least)
        return best.reshape(w.shape)

    return quantise


def q4_k(*, weighted: bool) -> Quantise:
    """Q4_K; `weighted`: with an importance matrix."""

    def quantise(w: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
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

    def __init__(
        self, base: PackWeights, change: Change, seen: dict[str, torch.Tensor] | None = None
    ) -> None:
        """`seen`: collects the summed squares of what each matrix is multiplied with."""
        self.__dict__.update(base.__dict__)
        self.change, self.seen = change, seen

    def expert(self, layer: int, e: int) -> Expert:
        plain, made = super().expert(layer, e), []
        for part, linear in zip(EXPERT_PARTS, (plain.gate, plain.up, plain.down), strict=True):
            name = expert_name(layer, e, part)
            w = self.change(name, linear.format.unpack(linear.parts))
            made.append(Heard(name, w, self.seen))
        return Expert(*made)


class Heard(QuantLinear):
    """A float32 matrix that notes the energy of its inputs."""

    __slots__ = ("name", "seen")

    def __init__(self, name: str, w: torch.Tensor, seen: dict[str, torch.Tensor] | None) -> None:
        super().__init__(get_format("f32"), {"weight": w}, *w.shape)
        self.name, self.seen = name, seen

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            self.seen[self.name] = self.seen.get(self.name, 0) + x.square().sum(0)
        return super().__call__(x)


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


def model(ways: dict[str, Quantise], cache: Path | None, tokens: int) -> dict[str, object]:
    """The demo's figures by way of storing its experts."""
    pack = demo_pack(fmt="bf16", cache_dir=cache)
    base = open_weights(pack)
    assert isinstance(base, PackWeights)
    energy: dict[str, torch.Tensor] = {}
    hidden(
        Variant(base, off_the_grid, energy), Ids.read(pack, FOLDER / "demo_text.txt", 1024, 1024)
    )
    ids = Ids.read(pack, None, tokens, base.config.max_context)
    rows, targets, spans = ids.predictions()
    source, exact = hidden(Variant(base, off_the_grid), ids)
    results: dict[str, object] = {}
    for name, quantise in ways.items():

        def change(tensor: str, w: torch.Tensor, quantise: Quantise = quantise) -> torch.Tensor:
            mine = energy.get(tensor, torch.ones(w.shape[1]))
            # A channel that was silent in a thousand tokens may speak in the next.
            return quantise(off_the_grid(tensor, w), mine + 0.01 * mean_of(mine))

        side, found = hidden(Variant(base, change), ids)
        scores = Scores(targets, two=True)
        for pair in zip(side.logits(found[rows]), source.logits(exact[rows]), strict=True):
            scores.add(*pair)
        figures = scores.figures(spans["all"])
        results[name] = {"bits": BITS[name], **dataclasses.asdict(figures)}
        print(
            f"demo        {name:16} {BITS[name]:.2f} bits  KL {figures.kl:.4f}  "
            f"top-1 {figures.top1:.3f}  perplexity {figures.perplexity:.3f} "
            f"({figures.source_perplexity:.3f})",
            flush=True,
        )
    return results


def mean_of(energy: torch.Tensor) -> float:
    """Its mean, or 1 where there was none."""
    return float(energy.mean()) or 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--cache", type=Path, help="cache folder of the demo; default: the user's")
    args = parser.parse_args()
    ways: dict[str, Quantise] = {
        "nf4": nf4,
        "nf4 importance": nf4_trials(64, weighted=True),
        "nf4 block 32": nf4_trials(32, weighted=False),
        "q4_k": q4_k(weighted=False),
        "q4_k importance": q4_k(weighted=True),
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("gaussian", "laplace", "student t4"):
        g = torch.Generator().manual_seed(0)
        w = weights(kind, (args.rows, args.cols), g)
        channels = torch.exp(torch.randn(args.cols, generator=g))
        seen, x = (torch.randn(args.tokens, args.cols, generator=g) * channels for _ in range(2))
        energy, exact = seen.square().mean(0), x @ w.T  # measured on other tokens than judged on
        results[kind] = {}
        for name, quantise in ways.items():
            stored = quantise(w, energy)
            found = {
                "bits": BITS[name],
                "weights": round(relative_rms(w, stored), 5),
                "output": round(relative_rms(exact, x @ stored.T), 5),
            }
            results[kind][name] = found
            print(
                f"{kind:10}  {name:16} {found['bits']:.2f} bits  weights {found['weights']:.4f}  "
                f"output {found['output']:.4f}",
                flush=True,
            )
    report = {"rows": args.rows, "cols": args.cols, "tokens": args.tokens, "results": results}
    if args.model:
        report["demo"] = model(ways, args.cache, args.tokens)
    print(json.dumps(report | {"torch": torch.__version__, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
