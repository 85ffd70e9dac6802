"""How fast a placement would be: seconds per token, per document, until it is loaded.

Bytes over rates, tiers side by side, the slowest counts. `calibrate` turns this arithmetic around
to find the rates. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mimo_local.config import ModelConfig
from mimo_local.plan.placement import DRAFT_HEAD, EMBEDDING, KV, MTP
from mimo_local.plan.rates import Rates
from mimo_local.plan.routing import HitCurve
from mimo_local.plan.types import Decode, Placement, Prediction, Prefill
from mimo_local.sizes import (
    CHUNK,
    PackSizes,
    active_weights,
    hidden_bytes,
    kv_bytes,
    layer_kv_bytes,
)

LEAST_ROWS = 256  # rows of a pass, however little memory there is
REST = "the rest"  # attention and dense layers
DEPTH = 8192  # tokens in the context while decoding: what an answer about a long page has


def predict(
    config: ModelConfig,
    sizes: PackSizes,
    found: Placement,
    rates: Rates,
    *,
    curves: Sequence[HitCurve],
    tokens: int,
    depth: int = DEPTH,
) -> Prediction:
    """Speeds of `found`; `tokens`: length of the document whose reading is predicted.

    `depth`: tokens in the context while decoding, at most all of it.
    """
    depth = min(depth, found.context)
    held = sum(found.vram.values()) + sum(found.ram.values())
    held -= kv_bytes(config, found.context, found.kv_itemsize)
    kept = (found.vram_experts + found.ram_experts) * sizes.mean
    everything = not found.disk_experts
    return Prediction(
        decode=tuple(decode(config, sizes, found, rates, curve, depth) for curve in curves),
        depth=depth,
        prefill=prefill(config, sizes, found, rates, tokens),
        load_s=(held + (kept if everything else 0)) / rates.disk,
        fill_s=0.0 if everything else kept / rates.disk,
    )


def moe_layers(config: ModelConfig) -> int:
    """Layers that choose among experts."""
    return sum(layer.mlp == "moe" for layer in config.layers)


def resident_bytes(config: ModelConfig, found: Placement, depth: int) -> tuple[int, int]:
    """(VRAM, RAM): bytes besides experts that a token reads with `depth` tokens in the context."""
    skip = {MTP, DRAFT_HEAD, KV}
    if not config.tie_embeddings or found.device.head:
        skip.add(EMBEDDING)
    there = config.layers[: found.device.layers]
    kv = sum(layer_kv_bytes(layer, depth, found.kv_itemsize) for layer in there)
    vram, ram = (
        sum(n for name, n in t.items() if name not in skip) for t in (found.vram, found.ram)
    )
    return vram + kv, ram + kv_bytes(config, depth, found.kv_itemsize) - kv


def decode(
    config: ModelConfig,
    sizes: PackSizes,
    found: Placement,
    rates: Rates,
    curve: HitCurve,
    depth: int,
) -> Decode:
    """One token with `depth` tokens in the context."""
    vram, ram = resident_bytes(config, found, depth)
    resident = rates.step_s + layers_s(config, found, rates) + vram / rates.vram + ram / rates.rest
    if not sizes.experts:
        return Decode(curve.name, 1 / resident, 0.0, 1.0, resident, 0.0, 0.0)
    in_vram = curve(found.vram_experts / sizes.experts)
    hit = curve(1 - found.disk_experts / sizes.experts)
    picks = config.experts_per_token * moe_layers(config)
    total, at_hand = expert_seconds(config, sizes, rates, in_vram, 1 - hit)
    return Decode(
        routing=curve.name,
        tokens_per_s=1 / (resident + total),
        disk_bytes=picks * (1 - hit) * sizes.mean,
        hit=hit,
        resident_s=resident,
        expert_s=at_hand,
        wait_s=total - at_hand,
    )


def layers_s(config: ModelConfig, found: Placement, rates: Rates) -> float:
    """Seconds of waking threads and launching kernels for a step of all layers."""
    there = found.device.layers
    return rates.device_layer_s * there + rates.layer_s * (config.n_layers - there)


def expert_seconds(
    config: ModelConfig, sizes: PackSizes, rates: Rates, in_vram: float, missed: float
) -> tuple[float, float]:
    """(seconds of a token's experts, the same if what is missed lay in RAM) for shares of choices.

    `in_vram`: share that is found in VRAM, `missed`: share that is read from disk.
    """
    one = (sizes.vram_slot / rates.vram, sizes.mean / rates.ram, sizes.mean / rates.disk)
    layers, k = moe_layers(config), config.experts_per_token
    total = layers * expected_layer_s(k, in_vram, missed, *one)
    return total, layers * expected_layer_s(k, in_vram, 0.0, *one)


def expected_layer_s(
    chosen: int, vram: float, disk: float, vram_s: float, ram_s: float, disk_s: float
) -> float:
    """Mean seconds of one MoE layer: `chosen` experts drawn independently over three tiers.

    `vram` and `disk` are the chances of a choice to lie there, the rest is in RAM; `*_s` is one
    expert's time in a tier. The tiers work side by side and the slowest counts; what comes from
    disk is multiplied by the CPU too, the last one after everything has been read.
    """
    mean = 0.0
    ram = max(0.0, 1 - vram - disk)
    for v in range(chosen + 1):
        for d in range(chosen - v + 1):
            r = chosen - v - d
            ways = math.comb(chosen, v) * math.comb(chosen - v, d)
            chance = ways * vram**v * disk**d * ram**r
            read = d * disk_s + ram_s if d else 0.0
            mean += chance * max(v * vram_s, (r + d) * ram_s, read)
    return mean


def prefill(
    config: ModelConfig, sizes: PackSizes, found: Placement, rates: Rates, tokens: int
) -> Prefill:
    """A document of `tokens`, in as few equal parts as the context allows."""
    parts = max(1, math.ceil(tokens / found.context))
    each = math.ceil(tokens / parts)
    there, here = pass_limits(config, sizes, found, rates, each)
    rest = here.pop(REST, 0.0)
    limits: dict[str, float] = {
        name: parts * (there.get(name, 0.0) + here.get(name, 0.0))
        for name in ("disk", "PCIe", "GPU", "arithmetic")
        if name in there or name in here
    }
    bound = max(limits, key=lambda name: limits[name])
    limits |= {REST: parts * rest} if rest else {}
    fixed = rates.step_s + layers_s(config, found, rates) * math.ceil(each / CHUNK)
    once = max(there.values(), default=0.0) + max(here.values(), default=0.0) + rest + fixed
    return Prefill(tokens, parts, parts * once, bound, limits)


def pass_limits(
    config: ModelConfig, sizes: PackSizes, found: Placement, rates: Rates, tokens: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that disk, PCIe and arithmetic need for `tokens` tokens: a GPU's layers, the others.

    Layer by layer, so that an expert is read once however long the prompt is; the rest of a layer
    once per chunk of rows. Within a layer they overlap, and the largest is its time. A GPU's
    experts come over PCIe, unless so few rows are faster where they lie. The processor reads from
    RAM what it multiplies, and while it is at attention and dense layers the disk has nothing to
    do: REST comes on top.
    """
    times, spilled = spilling(config, found, tokens)
    share = touched(config, sizes, tokens)
    on_disk = times * share * found.disk_experts * sizes.mean / rates.disk
    experts, rest = memory_s(config, sizes, found, rates, tokens)
    theirs = 6.0 * config.hidden_size * config.moe_intermediate_size * tokens
    theirs *= config.experts_per_token * moe_layers(config)
    dense = prompt_flops(config, tokens) - theirs
    computed = times * experts + theirs / rates.cpu_flops
    n = found.device.layers
    part, mixing = n / config.n_layers, _share_there(config, n)
    there: dict[str, float] = {}
    here: dict[str, float] = {}
    if n:
        weights = 3 * config.hidden_size * config.moe_intermediate_size
        passing = times * share * sizes.experts * mixing
        # A matrix of many rows is widened to bfloat16, which is written and read again.
        widened = passing * (sizes.vram_slot + 4 * weights) / rates.vram
        moved = passing * (1 - found.vram_experts / max(1, sizes.experts)) * sizes.vram_slot
        streamed = {"disk": on_disk * mixing, "PCIe": moved / rates.pcie}
        streamed["GPU"] = (dense * part + theirs * mixing) / rates.gpu_flops + widened
        stay = {"disk": on_disk * mixing, "arithmetic": computed * mixing}
        stay["GPU"] = dense * part / rates.gpu_flops
        faster = max(streamed.values()) <= max(stay.values())
        there = streamed if found.device.streams and faster else stay
    if n < config.n_layers:
        # What has spilled is read and written again in every layer.
        here["disk"] = on_disk * (1 - mixing)
        here["disk"] += 2 * (config.n_layers - n) * spilled / rates.disk
        here["arithmetic"] = computed * (1 - mixing)
        here[REST] = rest + dense * (1 - part) / rates.cpu_flops
    return there, here


def _share_there(config: ModelConfig, layers: int) -> float:
    """Share of the layers that choose among experts that lies within the first `layers`."""
    there = sum(layer.mlp == "moe" for layer in config.layers[:layers])
    return there / max(1, moe_layers(config))


def touched(config: ModelConfig, sizes: PackSizes, tokens: int) -> float:
    """Share of the experts that `tokens` tokens choose, if all are equally likely."""
    if not sizes.experts:
        return 0.0
    return 1 - (1 - config.experts_per_token / config.n_experts) ** tokens


def memory_s(
    config: ModelConfig, sizes: PackSizes, found: Placement, rates: Rates, tokens: int
) -> tuple[float, float]:
    """(experts, the rest): seconds of reading from RAM what a prompt of `tokens` multiplies.

    Weights are unpacked once for all rows, which hides nothing: 5 layers of the real shapes took
    0.30 s for a prompt and 1.9 ms for each of its tokens, and 0.30 s is what reading them takes.
    """
    experts = (found.disk_experts + found.ram_experts) * sizes.mean
    rest = resident_bytes(config, found, tokens)[1] * math.ceil(tokens / CHUNK)
    return experts * touched(config, sizes, tokens) / rates.ram, rest / rates.rest


def spilling(config: ModelConfig, found: Placement, tokens: int) -> tuple[int, int]:
    """(how often a prompt reads the experts, bytes of hidden states that lie in a file)."""
    times, all_there = 1, found.device.layers == config.n_layers
    if found.device.layers and config.is_moe:
        times = math.ceil(tokens / found.device.rows)
    if tokens <= found.hidden_tokens or not config.is_moe or all_there:
        return times, 0
    one = 4 * config.hidden_size
    kept = hidden_bytes(config, 1) - one  # two of a row's three buffers stay in RAM
    most = max(LEAST_ROWS, 2 * found.hidden_budget // kept)
    return max(times, math.ceil(tokens / most)), one * tokens


def prompt_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of a prompt, multiply-adds counted twice: weights, and attention's own."""
    flops = 2.0 * active_weights(config) * tokens
    for layer in config.layers:
        seen = tokens if layer.window is None else min(tokens, 2 * layer.window)
        flops += layer.heads * (layer.head_dim + layer.v_head_dim) * tokens * seen
    return flops
