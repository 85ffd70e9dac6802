"""Rates of this machine out of the real decode loop: a prompt and some tokens of the pack itself.

First some tokens as in an answer, one after the other, with hits and misses. Then some that are
computed twice: the second time their experts have just been used and all lie in memory; then their
experts alone. The differences are what the disk, the experts and everything else cost, and the
planner's own formulas, solved for the rates, give the same times again. A bandwidth test would not
know about threads, kernels and reads.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from mimo_local.benchmark import SEED, ModelRunner
from mimo_local.config import ModelConfig
from mimo_local.errors import UsageError
from mimo_local.events import Progress
from mimo_local.experts.meters import Meters
from mimo_local.plan import Plan, prediction
from mimo_local.plan.planner import rates_of
from mimo_local.plan.rates import Calibration, Rates
from mimo_local.sizes import PackSizes

if TYPE_CHECKING:
    import torch

    from mimo_local.experts.store import Store

TOKENS: Final = 24
WARM: Final = 40
"""First tokens that are not counted: pages are touched, threads wake up, and the first trial of
guesses (`experts.prefetch`: 12 cold steps and 24) has ended."""
PROMPT: Final = 512
SLOWEST, FASTEST = 1e6, 1e12
"""Bytes/s between which a disk's rate is looked for."""


@dataclass
class Timings:
    """Seconds of each token: as in an answer, with all experts in memory, and experts alone."""

    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    experts: list[float] = field(default_factory=list)
    spent: Meters = field(default_factory=Meters)
    """Of the first times."""
    prompt_s: float = 0.0
    prompt_wait_s: float = 0.0
    depth: int = 0
    """Tokens in the context halfway."""


def calibrate(
    runner: ModelRunner,
    store: Store,
    plan: Plan,
    *,
    tokens: int = TOKENS,
    prompt: int = PROMPT,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure for some seconds; `plan`: of the loaded model. UsageError if it is too short."""
    prompt = min(prompt, min(runner.max_context, plan.context) - 2 * tokens - WARM)
    if prompt < 1 or tokens < 1:
        raise UsageError(
            f"a context of {plan.context} tokens is too short to calibrate with",
            hint=f"give at least `--context {2 * TOKENS + WARM + 1}`",
        )
    timings = measure(runner, store, tokens, prompt, on_progress, clock)
    return solve(runner, plan, timings, prompt)


def measure(
    runner: ModelRunner,
    store: Store,
    tokens: int,
    prompt: int,
    on_progress: Callable[[Progress], None] | None,
    clock: Callable[[], float],
) -> Timings:
    """Run the loop and note what it took."""
    source = random.Random(SEED)
    ids = [source.randrange(runner.vocab_size) for _ in range(prompt + WARM + 2 * tokens)]
    found, total = Timings(depth=prompt + WARM + tokens), WARM + 2 * tokens
    # The first prompt touches fresh pages and has all it reads checked: the second is like others.
    for _ in range(2):
        runner.reset()
        before, start = store.meters.copy(), clock()
        runner.prefill(ids[:prompt])
    found.prompt_s = clock() - start
    found.prompt_wait_s = store.meters.since(before).wait_s
    chosen: list[tuple[int, torch.Tensor]] = []
    for i, token in enumerate(ids[prompt:], start=1):
        before, start = store.meters.copy(), clock()
        runner.step(token)
        # In succession: with pauses between them a disk took 125 ms for what it reads in 80.
        if WARM < i <= WARM + tokens:
            found.first.append(clock() - start)
            _add(found, store.meters.since(before))
        elif i > WARM:
            # Watching asks the store for every layer's choice, so it is done in a step of its own.
            _again(runner, token, store, chosen)
            start = clock()
            _again(runner, token)
            found.again.append(clock() - start)
            found.experts.append(_experts_alone(runner, store, chosen, clock))
        if on_progress is not None:
            on_progress(Progress("calibrating", i, total, "tokens"))
    return found


def _again(
    runner: ModelRunner,
    token: int,
    store: Store | None = None,
    chosen: list[tuple[int, torch.Tensor]] | None = None,
) -> None:
    """The last token once more; with a store, note what its layers choose."""
    runner.cache.truncate(runner.cache.length - 1)
    if store is None or chosen is None:
        runner.step(token)
        return
    chosen.clear()
    store.watch(lambda layer, ids: chosen.append((layer, ids.clone())))
    try:
        runner.step(token)
    finally:
        store.watch(None)


def _experts_alone(
    runner: ModelRunner,
    store: Store,
    chosen: list[tuple[int, torch.Tensor]],
    clock: Callable[[], float],
) -> float:
    """Seconds of a token's experts, all of them in memory."""
    import torch

    from mimo_local import ops
    from mimo_local.device import moved

    config, devices = runner.model.config, runner.model.devices
    x = torch.randn(1, config.hidden_size)
    seconds = 0.0
    for layer, ids in chosen:
        device = devices.of(devices.layers[layer])
        asked = store if device is not None else store.host
        w = torch.full(ids.shape, 1 / ids.shape[1])
        there = [moved(part, device) for part in (x, ids, w)]
        with ops.threads_for(1), torch.inference_mode():
            start = clock()
            moved(asked.run(layer, *there), None)  # waits for a device
            seconds += clock() - start
    return seconds


def _add(found: Timings, spent: Meters) -> None:
    for f in fields(Meters):
        setattr(found.spent, f.name, getattr(found.spent, f.name) + getattr(spent, f.name))


# -- the formulas turned around --------------------------------------------------------------------


def solve(runner: ModelRunner, plan: Plan, found: Timings, prompt: int) -> Calibration:
    """The rates with which the planner's arithmetic gives the measured times."""
    config, sizes = runner.model.config, plan.sizes
    again, experts = statistics.median(found.again), statistics.median(found.experts)
    experts = min(experts, 0.95 * again)  # alone they may be slower by a wake-up per layer
    wanted = found.spent.wanted
    in_vram = found.spent.vram_hits / wanted if wanted else 0.0
    picks = config.experts_per_token * prediction.moe_layers(config) * (1 - in_vram)
    picks = picks if sizes.experts else 0.0
    assumed = rates_of(plan.budget, plan.placement)
    ram = picks * sizes.mean / experts if picks and experts > 0 else assumed.ram
    reached = _rest(config, plan, found.depth, again - experts, replace(assumed, ram=ram))
    missed = (found.spent.misses + found.spent.staged_hits) / wanted if wanted else 0.0
    first = statistics.fmean(found.first)
    computed = found.prompt_s - found.prompt_wait_s
    computed -= sum(prediction.memory_s(config, sizes, plan.placement, reached, prompt))
    flops = prediction.prompt_flops(config, prompt)
    flops /= max(computed, 0.1 * found.prompt_s, 1e-9)
    there = plan.device.layers == config.n_layers
    made = Calibration(
        when=datetime.now(UTC).date().isoformat(),
        tokens=len(found.first),
        prompt=prompt,
        resident_s=again - experts,
        expert_s=experts,
        wait_s=max(0.0, first - statistics.fmean(found.again)) if missed else 0.0,
        ram_rate=ram,
        rest_rate=reached.rest,
        layer_s=reached.layer_s,
        # A prompt on a GPU says nothing about the processor.
        flops=assumed.cpu_flops if plan.device.layers else flops,
        vram_rate=reached.vram if there else None,
        device_layer_s=reached.device_layer_s if there else None,
    )
    if not missed or made.wait_s <= 0:
        return made
    rate = disk_rate(config, sizes, assumed, made, in_vram, missed)
    k = config.experts_per_token
    reads = k * missed / (1 - (1 - missed) ** k)
    return made if rate is None else replace(made, disk_rate=rate, reads=reads)


def _rest(config: ModelConfig, plan: Plan, depth: int, seconds: float, assumed: Rates) -> Rates:
    """`assumed` with what everything but experts showed: where all or most of it was computed.

    What memory does not explain is overhead; if memory is faster than assumed, there is none.
    """
    in_vram, in_ram = prediction.resident_bytes(config, plan.placement, depth)
    there, layers = plan.device.layers, config.n_layers
    if there == layers:
        each = max(0.0, (seconds - in_vram / assumed.vram - in_ram / assumed.ram) / layers)
        rate = in_vram / max(seconds - layers * each - in_ram / assumed.ram, 0.05 * seconds)
        return replace(assumed, vram=rate, device_layer_s=each)
    on_device = in_vram / assumed.vram + there * assumed.device_layer_s
    seconds = max(seconds - on_device, 0.05 * seconds)
    # Without experts there is no other rate of this memory to tell the two apart.
    each = max(0.0, seconds - in_ram / assumed.ram) if plan.sizes.experts else 0.0
    return replace(assumed, rest=in_ram / (seconds - each), layer_s=each / (layers - there))


def disk_rate(
    config: ModelConfig,
    sizes: PackSizes,
    assumed: Rates,
    made: Calibration,
    in_vram: float,
    missed: float,
) -> float | None:
    """Bytes/s at which the planner's layers take what was measured with this share of misses.

    None if no rate does: what was lost was not the disk's doing.
    """

    def token_s(rate: float) -> float:
        rates = replace(assumed, ram=made.ram_rate, disk=rate)
        return prediction.expert_seconds(config, sizes, rates, in_vram, missed)[0]

    low, high = math.log(SLOWEST), math.log(FASTEST)
    target = made.expert_s + made.wait_s
    if not token_s(FASTEST) < target < token_s(SLOWEST):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if token_s(math.exp(middle)) < target else (middle, high)
    return math.exp(middle)
