"""What of a model goes to a GPU, or why nothing does: the card, the plan for it, the map of layers.

torch and accelerate say which cards there are and what is free on them; the planner says what would
lie where and whether that gains; accelerate goes over the same layers once more with the tensors'
true sizes. Knows no forward pass. Called by `loading`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import nn

from mimo_local import hardware
from mimo_local.device import HOST, Devices
from mimo_local.errors import UsageError
from mimo_local.hardware import Gpu, Hardware
from mimo_local.plan import Plan, here, plan
from mimo_local.plan.planner import gains
from mimo_local.settings import Paths, Settings
from mimo_local.sizes import PackSizes, layer_kv_bytes, layer_spare_bytes
from mimo_local.weights import PackWeights, Weights, shapes
from quant.inventory import layer_of, role_of
from quant.on_device import parts_there

BFLOAT16: Final = (8, 0)
"""Compute capability from which on products in bfloat16 have units of their own: RTX 30 and on."""
Tensors: TypeAlias = list[tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU that can be used."""

    index: int
    gpu: Gpu
    shared: bool = False
    """It has no memory of its own, but the machine's."""

    @property
    def device(self) -> torch.device:
        """As torch calls it."""
        return torch.device("cuda", self.index)


@dataclass(frozen=True, slots=True)
class Placed:
    """Who computes what, and what people should know about it."""

    devices: Devices
    plan: Plan | None = None
    """None for a checkpoint."""
    note: str = ""
    """One line without a full stop; empty where there is no GPU and nobody asked for one."""


def place(
    path: Path, weights: PackWeights | Weights, settings: Settings, dtype: torch.dtype
) -> Placed:
    """Plan a pack for the memory that is free now, on a GPU if that is wished and gains.

    `dtype`: of keys and values. UsageError where the settings ask for a GPU that cannot be used.
    """
    config, facts = weights.config, hardware.detect(path)
    host = Devices.all_on(HOST, config.n_layers)
    if not isinstance(weights, PackWeights):
        if settings.device == "cuda":
            raise UsageError(
                "device = cuda, but a checkpoint runs on the CPU",
                hint="make a pack of it with `mimo quantize`",
            )
        return Placed(host)
    card, why = find_card(settings)
    without = make_plan(path, weights, settings, dtype, facts)
    if card is None:
        return Placed(host, without, f"GPU not used: {why}" if why else "")
    found = make_plan(path, weights, settings, dtype, facts, card)
    if not found.device.layers:
        need = "not even one layer fits into what is free of its memory"
        if settings.device == "cuda":
            raise UsageError(
                f"device = cuda, but {need}",
                hint="close what else uses the GPU, use a smaller --context, or `--device auto`",
            )
        return Placed(host, without, f"GPU not used: {need}")
    if settings.device == "auto" and not gains(config, found, without):
        return Placed(host, without, "GPU not used: slower for this model (`--device cuda` does)")
    mapped = map_layers(weights, found, card.device)
    return Placed(mapped, found, describe(found, mapped, card))


def make_plan(
    path: Path,
    weights: PackWeights,
    settings: Settings,
    dtype: torch.dtype,
    facts: Hardware,
    card: Card | None = None,
) -> Plan:
    """Where a pack's bytes go in the memory that is free now, and what to expect of that."""
    data = Paths.default().data_dir
    known = here.calibration_of(data, here.machine_key(facts), here.model_key(path))
    facts = replace(facts, gpus=() if card is None else (card.gpu,))
    budget = here.free_now(facts, known, limit=settings.ram, vram=settings.vram)
    if card is not None and card.shared:
        budget = replace(budget, ram=max(0, budget.ram - budget.vram))
    wish, most = settings.context, weights.config.max_context
    return plan(
        weights.config,
        PackSizes.of_pack(weights.pack.manifest),
        budget,
        context=None if wish is None else min(wish, most),
        kv_itemsize=dtype.itemsize,
        drafting=settings.draft,
    )


def describe(found: Plan, devices: Devices, card: Card) -> str:
    """`RTX 4090: 48 of 48 layers, head, drafter, room for 834 experts`."""
    layers = sum(device != HOST for device in devices.layers)
    parts = [f"{layers} of {len(devices.layers)} layers"]
    parts += ["head"] if devices.head != HOST else []
    parts += ["drafter"] if devices.drafter != HOST else []
    if found.placement.vram_experts:
        parts.append(f"room for {found.placement.vram_experts} experts")
    name = card.gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return f"{name}: {', '.join(parts)}"


# ---- the card ------------------------------------------------------------------------------------


def find_card(settings: Settings) -> tuple[Card | None, str]:
    """(the card with most memory free, "") or (None, why not), "" where nobody misses one.

    UsageError where the settings ask for one.
    """
    if settings.device == "cpu" or settings.vram == 0:
        if settings.device == "cuda":
            raise UsageError(
                "device = cuda, but vram = 0 leaves it no memory", hint="leave out one of them"
            )
        return None, ""
    card, why = _look()
    if card is None and settings.device == "cuda":
        raise UsageError(
            f"device = cuda, but {why or 'there is no GPU'}",
            hint="`mimo doctor` says what is there; `--device auto` goes on without",
        )
    if card is not None and card.shared and settings.device == "auto" and settings.vram is None:
        return None, "it shares the machine's memory: say how much of that with `--vram`"
    return card, why


def _look() -> tuple[Card | None, str]:
    if not torch.cuda.is_available():
        if not hardware.gpus():
            return None, ""
        if torch.version.cuda is None:
            return None, f"PyTorch {torch.__version__} is a build without CUDA"
        return None, f"PyTorch (CUDA {torch.version.cuda}) sees none: driver too old, or hidden"
    if torch.version.hip is not None:
        return None, "cards of AMD are not supported"
    limits = memory_limits()
    cards = [index for index in limits if isinstance(index, int)]
    if not cards:
        return None, "no card answers"
    able = [i for i in cards if torch.cuda.get_device_capability(i) >= BFLOAT16]
    if not able:
        return None, f"{torch.cuda.get_device_name(cards[0])} has no units for bfloat16"
    index = max(able, key=lambda i: limits[i])
    total = int(torch.cuda.get_device_properties(index).total_memory)
    gpu = Gpu(torch.cuda.get_device_name(index), total, min(total, int(limits[index])))
    return Card(index, gpu, shared="cpu" not in limits), ""


def memory_limits() -> dict[int | str, int]:
    """Bytes that are free by device, cards that do not answer left out: accelerate's view.

    "cpu" is missing where a card shares the machine's memory.
    """
    from accelerate.utils import get_max_memory

    found: dict[int | str, int] = get_max_memory()
    return found


# ---- the map -------------------------------------------------------------------------------------


class _Part(nn.Module):
    """Tensors that stay together."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for i, (dtype, shape) in enumerate(tensors):
            empty = torch.empty(shape, dtype=dtype)
            self.register_parameter(f"t{i}", nn.Parameter(empty, requires_grad=False))


def map_layers(weights: PackWeights, found: Plan, device: torch.device) -> Devices:
    """The devices of `found`, gone over with the sizes the tensors really have.

    Never more than planned: the RAM for everything else was counted by the plan.
    """
    names = fitting(skeleton(weights, found, device), found.device.room)
    config, there = weights.config, found.device
    layers = 0
    while layers < there.layers and f"layers_{layers}" in names:
        layers += 1
    head = there.head and layers == config.n_layers and "head" in names
    drafter = there.drafter and head and "drafter" in names
    return Devices(
        tuple(device if i < layers else HOST for i in range(config.n_layers)),
        device if head else HOST,
        device if drafter else HOST,
    )


def fitting(model: nn.Module, room: int) -> set[str]:
    """Names of the children of `model` that fit into `room` bytes, in order, the first ones first.

    By accelerate's own map. It keeps room for the largest layer, to bring layers back that it put
    elsewhere; ours are computed where they lie. So a child as large as the largest, which is not
    real, comes last, and its room is added: then nothing else is kept free.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import compute_module_sizes, infer_auto_device_map

    sizes, children = compute_module_sizes(model), [name for name, _ in model.named_children()]
    largest = max(sizes[name] for name in children)
    with init_empty_weights(include_buffers=True):
        model.add_module("room", _Part([(torch.uint8, (largest,))]))
    limits = {0: room + largest, "cpu": sum(sizes.values()) + 4 * largest}
    found = infer_auto_device_map(
        model, limits, no_split_module_classes=[_Part.__name__], clean_result=False
    )
    return {name for name in children if found.get(name) == 0}


def skeleton(weights: PackWeights, found: Plan, device: torch.device) -> nn.Module:
    """Layers, head and drafter as they would lie on the device, without a byte of memory.

    Each has its tensors in the device's formats; a layer also its keys and values.
    """
    from accelerate import init_empty_weights

    config, model = weights.config, nn.Module()
    with init_empty_weights(include_buffers=True):
        for spec in config.layers:
            cache = layer_kv_bytes(spec, found.context, found.placement.kv_itemsize)
            cache += layer_spare_bytes(spec, found.placement.kv_itemsize)
            own = [*_layer_tensors(weights, spec.index, device), (torch.uint8, (cache,))]
            model.add_module(f"layers_{spec.index}", _Part(own))
        model.add_module("head", _Part(_head_tensors(weights, device)))
        if found.device.drafter:
            model.add_module("drafter", _Part(_drafter_tensors(weights, found.sizes, device)))
    return model


def _layer_tensors(weights: PackWeights, layer: int, device: torch.device) -> Tensors:
    named = ((n, s) for n, s in shapes(weights.config, experts=False) if layer_of(n) == layer)
    return [tensor for name, shape in named for tensor in _there(weights, name, shape, device)]


def _head_tensors(weights: PackWeights, device: torch.device) -> Tensors:
    config = weights.config
    name = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    norm: Tensors = [(torch.float32, (config.hidden_size,))]
    return [*norm, *_there(weights, name, (config.vocab_size, config.hidden_size), device)]


def _drafter_tensors(weights: PackWeights, sizes: PackSizes, device: torch.device) -> Tensors:
    entries = weights.pack.tensors.items()
    mtp = [(n, entry.shape) for n, entry in entries if n.startswith("model.mtp.")]
    found = [tensor for n, shape in mtp for tensor in _there(weights, n, shape, device)]
    if sizes.draft_head:
        config = weights.config
        found += parts_there("nf4", config.vocab_size, config.hidden_size, device).values()
    return found


def _there(
    weights: PackWeights, name: str, shape: tuple[int, ...], device: torch.device
) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    """A tensor of the pack as it lies on the device: what is exact stays float32."""
    if role_of(name, shape) == "exact":
        yield torch.float32, shape
        return
    rows, cols = shape
    yield from parts_there(weights.pack.tensors[name].format, rows, cols, device).values()
