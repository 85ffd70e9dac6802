"""From settings to the parts of an engine: weights, experts, model, tokenizer, limits.

The one place that decides the cache's dtype, the context that fits the memory and the threads.
Only `Engine.load` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from mimo_local import hardware, kernels, placing
from mimo_local.cache import KVCache
from mimo_local.config import ModelConfig
from mimo_local.device import Devices
from mimo_local.errors import NotEnoughMemoryError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.device_sweep import DeviceSweep
from mimo_local.experts.memory import available_memory
from mimo_local.experts.opening import open_store
from mimo_local.experts.store import Store
from mimo_local.experts.vram import VramTier
from mimo_local.family import named
from mimo_local.model import Model
from mimo_local.mtp import Drafter
from mimo_local.placing import Placed
from mimo_local.plan import Plan, here
from mimo_local.runs import Recorder
from mimo_local.settings import Paths, Settings
from mimo_local.sizes import GB, activation_bytes, gb, kv_bytes, restart_bytes
from mimo_local.tokenizer import Tokenizer
from mimo_local.weights import PackWeights, Weights, open_weights

DEFAULT_CONTEXT: Final = 32_768
"""Tokens without --context, if the memory allows: 0.78 GB of cache for the real model."""
SMALLEST_CONTEXT: Final = 2048
CONTEXT_SHARE: Final = 0.25
"""Part of the memory left after loading that one session's cache may take unasked."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine is made of."""

    model: Model
    name: str
    description: str
    context_limit: int
    tokenizer: Tokenizer | None
    new_cache: Callable[[], KVCache]
    kernel: str
    drafter: Drafter | None
    """None where the model has no MTP layers, or they do not fit, or nobody wants drafts."""
    plan: Plan | None
    """What was planned and predicted; None for a checkpoint."""
    recorder: Recorder | None
    session_bytes: int
    """Memory for all sessions together."""


def load(settings: Settings, on_event: Callable[[Progress], None] | None = None) -> Loaded:
    """Load the pack or checkpoint folder `settings.model`; raises MimoError.

    Without tokenizer files it still answers ids.
    """
    if settings.model is None:
        raise UsageError("no model was given", hint="give the folder of a pack or a checkpoint")
    path = settings.model
    set_threads(settings.threads)
    weights = open_weights(path, on_progress=on_event, window=settings.window)
    # The tokenizer first: it is quick, and a broken one should not cost minutes of loading.
    has_tokenizer = (path / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_dir(path) if has_tokenizer else None
    dtype = kv_dtype(settings.kv_dtype, weights.kind)
    placed = placing.place(path, weights, settings, dtype)
    made = placed.plan
    with told_of_vram(made):
        experts = open_experts(weights, placed, settings, dtype, on_event)
        model = Model(
            weights,
            experts,
            devices=placed.devices,
            hidden_budget=None if made is None else made.hidden_budget_bytes,
            device_budget=None if made is None else made.device.hidden,
            on_progress=on_event,
        )
        drafter = None
        wanted = weights.config.n_mtp_layers and settings.draft != "off"
        if wanted and (made is None or made.drafts):
            drafter = Drafter(weights, model)

    def new_cache() -> KVCache:
        cache = model.new_cache(dtype=dtype)
        if drafter is not None:
            cache.draft = drafter.new_cache(dtype, cache.slack)
        return cache

    wish = settings.context if made is None else made.context
    there = 0 if made is None else made.device.kv
    limit = context_limit(weights.config, wish, dtype, elsewhere=there)
    return Loaded(
        model=model,
        name=path.resolve().name,
        description=describe(path, weights, placed.note),
        context_limit=limit,
        tokenizer=tokenizer,
        new_cache=new_cache,
        kernel=kernel_of(placed.devices),
        drafter=drafter,
        plan=made,
        recorder=None if made is None else new_recorder(path, weights.config, made, experts),
        session_bytes=session_bytes(weights.config, limit, dtype)
        if made is None
        else made.session_bytes,
    )


def open_experts(
    weights: PackWeights | Weights,
    placed: Placed,
    settings: Settings,
    dtype: torch.dtype,
    on_event: Callable[[Progress], None] | None,
) -> Store:
    """The host's experts, and before them those of a device if layers run there."""
    made, device, tier = placed.plan, placed.devices.accelerator, None
    layers = list[int]()
    if device is not None and made is not None and isinstance(weights, PackWeights):
        layers = [n for n in weights.pack.expert_layers if placed.devices.layers[n] == device]
        if layers and made.expert_vram_bytes:
            # Before the experts in RAM, which take minutes: it shows whether the VRAM is there.
            layouts = {n: weights.pack.expert_layout(n) for n in layers}
            tier = VramTier(layouts, made.expert_vram_bytes, device)
    inner = open_store(
        weights,
        ram=settings.ram,
        spare=spare(weights.config, settings.context, dtype) if made is None else made.spare_bytes,
        elsewhere=0 if made is None else made.elsewhere_bytes,
        prefetch=settings.prefetch,
        on_progress=on_event,
    )
    if device is None or not layers:
        return inner
    prompts = DeviceSweep.of(inner, tier, device, weights)
    return DeviceStore(inner, tier, device, layers, prompts)


@contextmanager
def told_of_vram(made: Plan | None) -> Iterator[None]:
    """What does not fit into a GPU's memory as an error of ours: somebody else took some."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and pinned memory has no other
        if made is None or not made.device.layers or "out of memory" not in str(error).lower():
            raise
        most = max(0, made.budget.vram - 2 * GB) // GB
        raise NotEnoughMemoryError(
            f"the GPU's memory ran out while the model was loaded: {gb(made.vram_bytes)} of "
            f"{gb(made.budget.vram)} that were free were planned",
            hint=f"give it less with `--vram {most}GB` or a smaller --context; `--device cpu` goes "
            "without",
        ) from error


def kernel_of(devices: Devices) -> str:
    """What products run on, for people: `avx512`, `cuda + avx512`."""
    device = devices.accelerator
    return kernels.describe() if device is None else f"{device.type} + {kernels.describe()}"


def new_recorder(path: Path, config: ModelConfig, made: Plan, experts: Store) -> Recorder:
    """Who writes down what answers took beside what `made` had predicted."""
    machine = here.machine_key(hardware.detect(path))
    return Recorder(
        Paths.default().data_dir, config=config, plan=made, meters=experts.meters.copy,
        machine=machine, model=path.resolve().name, pack=here.model_key(path),
    )  # fmt: skip


def spare(config: ModelConfig, context: int | None, dtype: torch.dtype) -> int:
    """Bytes to keep from a checkpoint's experts: the cache of a session, a step's activations."""
    tokens = min(context or DEFAULT_CONTEXT, config.max_context)
    work = activation_bytes(config, native=kernels.get() is not None)
    return session_bytes(config, tokens, dtype) + work


def session_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a session of so many tokens: all that its rings and restart points take too."""
    return kv_bytes(config, tokens, dtype.itemsize) + restart_bytes(config, dtype.itemsize)


def set_threads(threads: int | None) -> None:
    """Threads of torch and of the kernels, for the whole process; None: what may be used."""
    native = kernels.get()
    if native is not None:
        native.set_threads(threads or native.default_threads)
    torch.set_num_threads(threads or min(torch.get_num_threads(), hardware.usable_cores()))


def kv_dtype(wish: str, kind: str) -> torch.dtype:
    """How keys and values are kept. auto: exact beside exact weights, half the size for packs."""
    if wish == "auto":
        wish = "bf16" if kind == "pack" else "f32"
    return {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[wish]


def context_limit(
    config: ModelConfig, wish: int | None, dtype: torch.dtype, *, elsewhere: int = 0
) -> int:
    """Most tokens of a session: as wished, else as fits; never more than the model can.

    `elsewhere`: bytes of keys and values that lie on a device and take no RAM.
    """
    free = available_memory()
    if wish is not None:
        limit = min(wish, config.max_context)
        need = kv_bytes(config, limit, dtype.itemsize) - elsewhere
        if need > free:
            raise NotEnoughMemoryError(
                f"a context of {limit} tokens takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB "
                "are free",
                hint="ask for a smaller --context"
                + ("" if dtype == torch.int8 else ", or set kv_dtype = int8"),
            )
        return limit
    limit = min(config.max_context, DEFAULT_CONTEXT)
    while limit > SMALLEST_CONTEXT and kv_bytes(config, limit, dtype.itemsize) > (
        CONTEXT_SHARE * free
    ):
        limit = max(SMALLEST_CONTEXT, limit // 2)
    return limit


def describe(path: Path, weights: PackWeights | Weights, note: str = "") -> str:
    """One line for people: what it is, how large, in which formats, on which kernels; a GPU's."""
    config = weights.config
    kind = "checkpoint"
    if isinstance(weights, PackWeights):
        formats = {entry.format for entry in weights.pack.tensors.values()}
        formats |= {
            weights.pack.expert_layout(spec.index).format
            for spec in config.layers
            if spec.mlp == "moe"
        }
        # f32 is what norms are kept in: it says nothing about the pack.
        kind = " + ".join(sorted(formats - {"f32"}) or ["f32"])
    experts = f", {config.n_experts} experts" if config.is_moe else ""
    return (
        f"{named(path.resolve().name, config)}: {config.n_layers} layers{experts}, "
        f"{weights.nbytes / 1e9:.2f} GB, {kind}, {kernels.describe()} kernels"
        + (f"; {note}" if note else "")
    )
