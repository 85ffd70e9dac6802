"""Products, attention and experts on a device against float32 on the CPU, in the real shapes.

Weights are random and packed as in a pack; the CPU's side unpacks them a few rows at a time and
multiplies in float32, by no kernel of ours. Called by `run`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F

from mimo_local import device_attention, ops
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.device_linear import placed
from mimo_local.experts.vram import STAGING, VramTier
from mimo_local.random_weights import EXPERT_FORMATS, REST_FORMATS, RandomWeights
from mimo_local.selftest.types import Result, Sizes, checked, off, timed
from mimo_local.sizes import GB
from mimo_local.weights import Expert, QuantLinear, stack
from quant.on_device import activations

ROWS: Final = (1, 2, 4, 8, 16, 64)
"""Rows of x: an answer, drafts, several answers, a prompt."""
COMPANY: Final = (2, 4, 8, 16)
PRODUCT: Final = 1e-2
"""Of a product: results are rounded to bfloat16 (0.2 %), int8 scales too."""
ATTENTION: Final = 1e-2
EXPERT: Final = 2e-2
"""Three products, what is between them rounded to bfloat16."""
_CHUNK: Final = 1 << 24
"""Weights unpacked at once on the CPU: 64 MB."""


def products(device: torch.device, sizes: Sizes, config: ModelConfig) -> Iterator[Result]:
    """Every kind of matrix in every format."""
    for name in sizes.formats:
        differing: list[str] = []
        for what, linear in _matrices(name, config):
            yield _product(what, linear, device, sizes, differing)
        said = "the same bits alone and among others"
        if differing:
            said = "differs among others: " + ", ".join(differing)
        yield Result("products", f"{name}, a row in company", None, said)


def _matrices(name: str, config: ModelConfig) -> Iterator[tuple[str, QuantLinear]]:
    """What a model may store in this format."""
    last = config.n_layers - 1
    if name in REST_FORMATS:
        weights = RandomWeights(config, rest=name)
        prefix = f"model.layers.{last}.self_attn."
        parts = [weights.linear(f"{prefix}{part}_proj.weight") for part in "qkv"]
        yield "q, k and v", stack(parts)
        yield "attention's output", weights.linear(f"{prefix}o_proj.weight")
        yield "dense down", weights.linear("model.layers.0.mlp.down_proj.weight")
        yield "head", weights.linear("lm_head.weight")
    if name in EXPERT_FORMATS:
        expert = RandomWeights(config, experts=name).expert(last, 0)
        yield "expert's gate", expert.gate
        yield "expert's down", expert.down


def _product(
    what: str, linear: QuantLinear, device: torch.device, sizes: Sizes, differing: list[str]
) -> Result:
    """One matrix; its name goes to `differing` if a row's bits depend on who rides along."""
    g = torch.Generator().manual_seed(linear.rows)
    x = torch.randn(max(ROWS), linear.cols, generator=g).bfloat16()
    wanted = by_hand(linear, x.float())
    there = placed(linear, device)
    rows = x.to(device=device, dtype=activations(device))
    found = {n: there(rows[:n]) for n in ROWS}
    worst = max(off(y, wanted[:n]) for n, y in found.items())
    alone = found[1][0].cpu()
    if any(not torch.equal(found[n][0].cpu(), alone) for n in COMPANY):
        differing.append(what)
    copies = [there, *(_again(there) for _ in range(min(64, sizes.flushed // there.nbytes)))]
    speeds = []
    for n in (1, 4):
        took = timed([partial(m, rows[:n]) for m in copies], device, sizes.seconds)
        speeds.append(f"{n} row{'s' * (n > 1)} {took * 1e6:.0f} us")
        if n == 1:
            speeds[-1] += f" ({there.nbytes / took / GB:.0f} GB/s)"
    name = f"{linear.format.name}, {what}"
    return checked("products", name, worst, PRODUCT, ", ".join(speeds))


def _again(linear: QuantLinear) -> QuantLinear:
    parts = {name: part.clone() for name, part in linear.parts.items()}
    return type(linear)(linear.format, parts, linear.rows, linear.cols)


def by_hand(linear: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """x (T, cols) f32 times the unpacked matrix, some of its rows at a time."""
    step = max(1, _CHUNK // linear.cols)
    out = []
    for a in range(0, linear.rows, step):
        parts = {name: part[a : a + step] for name, part in linear.parts.items()}
        out.append(x @ linear.format.unpack(parts).T)
    return torch.cat(out, 1)


# ---- attention -----------------------------------------------------------------------------------


def attention(device: torch.device, sizes: Sizes, config: ModelConfig) -> Iterator[Result]:
    """A full layer and a sliding one: one row, drafts, a prompt behind a context."""
    kinds = {spec.attention: spec for spec in config.layers}
    for kind, spec in kinds.items():
        cases = {
            "one row": (1, sizes.context), "four rows": (4, sizes.context),
            "a prompt": (sizes.prompt, 0), "a prompt behind another": (sizes.prompt, sizes.prompt),
        }  # fmt: skip
        for name, (n, before) in cases.items():
            label = f"{kind}{' with sink' * spec.has_sink}, {name}"
            yield _attention(label, spec, n, before, device, sizes)


def _attention(
    name: str, spec: LayerSpec, n: int, before: int, device: torch.device, sizes: Sizes
) -> Result:
    """n rows behind `before` others, of which a sliding layer keeps a window."""
    first = 0 if spec.window is None else max(0, before - spec.window + 1)
    n_keys = before + n - first
    g = torch.Generator().manual_seed(n)
    q = torch.randn(n, spec.heads, spec.head_dim, generator=g).bfloat16()
    k = torch.randn(n_keys, spec.kv_heads, spec.head_dim, generator=g).bfloat16()
    v = torch.randn(n_keys, spec.kv_heads, spec.v_head_dim, generator=g).bfloat16()
    sink = torch.randn(spec.heads, generator=g) if spec.has_sink else None
    place = {"start": before, "first": first, "window": spec.window}
    wanted = ops.attention(q.float(), k.float(), v.float(), sink=sink, **place)  # type: ignore[arg-type]
    dtype = activations(device)
    there = [x.to(device=device, dtype=dtype) for x in (q, k, v)]
    bias = None if sink is None else sink.to(device)

    def call() -> torch.Tensor:
        return device_attention.attention(*there, sink=bias, **place)  # type: ignore[arg-type]

    error = off(call(), wanted)
    took = timed([call], device, sizes.seconds)
    return checked("attention", name, error, ATTENTION, f"{took * 1e6:.0f} us")


# ---- experts -------------------------------------------------------------------------------------


def experts(device: torch.device, sizes: Sizes, config: ModelConfig) -> Iterator[Result]:
    """Experts copied into VRAM as the tier does it, and multiplied from there."""
    layer = config.n_layers - 1
    x = torch.randn(4, config.hidden_size, generator=torch.Generator().manual_seed(7)).bfloat16()
    for name in sizes.formats:
        if name not in EXPERT_FORMATS:
            continue
        weights = RandomWeights(config, experts=name)
        layout = weights.expert_layout
        assert layout is not None
        one = VramTier({layer: layout}, 0, device).slot_bytes
        # More than there are staging buffers: one has to be waited for.
        made = {(layer, e): weights.expert(layer, e) for e in range(STAGING + 1)}
        tier = VramTier({layer: layout}, len(made) * one, device)
        there = x.to(device=device, dtype=tier.dtype)
        found = {}
        for key, expert in made.items():
            tier.touch(key)
            if tier.consider(key, expert):
                found[key] = tier.run(key, there)  # at once: the copy has only been queued
            tier.end_of_step()
        here = list(found)
        errors = [off(y, _expert(made[key], x.float())) for key, y in found.items()]
        took = timed([partial(tier.run, key, there) for key in here], device, sizes.seconds)
        more = f"{len(here)} of {len(made)} came in, four rows {took * 1e6:.0f} us"
        worst = max(errors) if len(here) == len(made) else math.inf
        yield checked("experts", f"{name}, in VRAM", worst, EXPERT, more)
        yield from _together(name, tier, layer, there, made, device, sizes)


def _together(
    name: str,
    tier: VramTier,
    layer: int,
    x: torch.Tensor,
    made: Mapping[tuple[int, int], Expert],
    device: torch.device,
    sizes: Sizes,
) -> Iterator[Result]:
    """All experts of a step by two kernels, where those serve; against one after the other."""
    experts = [e for _, e in made]
    numbers = [experts] * x.shape[0]
    shares = torch.linspace(0.1, 0.9, x.shape[0] * len(experts)).view(x.shape[0], -1)
    w = shares.to(device)
    found = tier.together(layer, x, numbers, w)
    if found is None:
        return
    wanted = sum(
        _expert(expert, x.float().cpu()) * shares[:, i : i + 1]
        for i, expert in enumerate(made.values())
    )
    assert isinstance(wanted, torch.Tensor)
    one = partial(tier.together, layer, x[:1], numbers[:1], w[:1])
    took = timed([one], device, sizes.seconds)
    apart = timed([partial(tier.run, key, x[:1]) for key in made], device, sizes.seconds)
    more = f"one row {took * 1e6:.0f} us, one by one {len(made) * apart * 1e6:.0f} us"
    yield checked("experts", f"{name}, {len(made)} at once", off(found, wanted), EXPERT, more)


def _expert(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    hidden = F.silu(by_hand(expert.gate, x)) * by_hand(expert.up, x)
    return by_hand(expert.down, hidden)
