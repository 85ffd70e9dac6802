"""How many bytes a model takes: every matrix of a `ModelConfig`, priced by a pack's formats.

Arithmetic only, so that planning for 309 B parameters needs no download and no torch; tests tie the
prices to `quant.formats`. Knows no machine. Called by plan, benchmark and cli.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.errors import PackError, UsageError
from quant.inventory import role_of
from quant.recipe import FORMAT_NAMES, Recipe

GB = 1_000_000_000
SCALE_GROWTH = 18 / 17  # a 4-bit expert in VRAM: 64 weights are 32 bytes and a float32, not float16
ALIGN = 4096  # an expert starts on a page, so that one direct read brings it
CHUNK = 512  # rows of one prefill step: what the activations are sized for
HIDDEN_BUFFERS = 3  # residual stream, normed rows, a layer's output
RESTARTS = 8  # points a session keeps to return to
KV_ITEMSIZES = {"f32": 4, "bf16": 2, "int8": 1}  # bytes of a number in full layers
SCALE = 4  # bytes; int8 has one for the keys and one for the values of a row and head
RING_SLACK, RING_SPARE = 3, 32  # rows of a sliding layer beside its window (`cache.RingKV`)

SMALL_HEAD = 1 << 26
"""Weights below which a head is not copied for drafts: in the processor's cache rows of 4 bits take
longer than those of 8 (demo: 0.53 ms against 0.26)."""
KINDS = ("attention", "dense", "head", "embedding", "mtp")


def matrix_bytes(fmt: str, rows: int, cols: int) -> int:
    """Bytes of one (rows, cols) matrix in format `fmt`, scales included; UsageError if unknown."""
    if fmt in ("nf4", "mxfp4") and cols % 64:
        fmt = "int8"  # blocks of 64 do not fit the row: such a matrix is kept at 8 bit
    match fmt:
        case "nf4" | "mxfp4":  # 2 bytes of scale for 64 weights, or 1 for 32
            return rows * cols // 2 + rows * cols // 32
        case "int8":
            return rows * cols + rows * 4
        case "bf16":
            return rows * cols * 2
        case "f32":
            return rows * cols * 4
    known = ", ".join(FORMAT_NAMES)
    raise UsageError(f"there is no weight format `{fmt}`", hint=f"formats: {known}")


def matrices(config: ModelConfig) -> Iterator[tuple[str, int, int, int]]:
    """(kind, rows, cols, how many) of every matrix; kinds: KINDS and "experts"."""
    hidden = config.hidden_size
    yield "embedding", config.vocab_size, hidden, 1
    if not config.tie_embeddings:
        yield "head", config.vocab_size, hidden, 1
    for layer in config.layers:
        yield from (("attention", *shape, 1) for shape in _attention(layer, hidden))
        if layer.mlp == "dense":
            yield "dense", layer.intermediate, hidden, 2
            yield "dense", hidden, layer.intermediate, 1
        else:
            yield "experts", config.moe_intermediate_size, hidden, 2 * config.n_experts
            yield "experts", hidden, config.moe_intermediate_size, config.n_experts
    if config.mtp_layer is not None and config.n_mtp_layers:
        spec, count = config.mtp_layer, config.n_mtp_layers
        yield from (("mtp", *shape, count) for shape in _attention(spec, hidden))
        yield "mtp", hidden, 2 * hidden, count
        yield "mtp", spec.intermediate, hidden, 2 * count
        yield "mtp", hidden, spec.intermediate, count


def exact_weights(config: ModelConfig) -> int:
    """Weights kept in float32: routers with their bias, norms, sinks (main layers and MTP)."""
    count = config.hidden_size * (1 + 2 * config.n_layers)
    count += sum(layer.heads for layer in config.layers if layer.has_sink)
    count += sum(
        config.n_experts * (config.hidden_size + 1) for layer in config.layers if layer.mlp == "moe"
    )
    if config.mtp_layer is not None:
        sink = config.mtp_layer.heads if config.mtp_layer.has_sink else 0
        count += config.n_mtp_layers * (5 * config.hidden_size + sink)
    return count


def active_weights(config: ModelConfig) -> int:
    """Weights one token multiplies: chosen experts, attention, dense, routers and the head."""
    total = exact_weights(config)
    for kind, rows, cols, count in matrices(config):
        if kind == "experts":
            total += rows * cols * count // config.n_experts * config.experts_per_token
        elif kind in ("attention", "dense", "head") or (
            kind == "embedding" and config.tie_embeddings
        ):
            total += rows * cols * count
    return total


def kv_bytes(config: ModelConfig, tokens: int, itemsize: int = 2) -> int:
    """Bytes of one sequence's keys and values; sliding layers stop growing at the window.

    `itemsize`: of a number as full layers keep it, see `KV_ITEMSIZES`.
    """
    total = 0
    for layer in config.layers:
        width = layer.head_dim + layer.v_head_dim
        if layer.window is None:
            head = width * itemsize + (2 * SCALE if itemsize == 1 else 0)
            total += layer.kv_heads * head * tokens
        else:
            total += layer.kv_heads * width * ring_itemsize(itemsize) * min(tokens, layer.window)
    return total


def ring_itemsize(itemsize: int) -> int:
    """Bytes of a number in sliding layers, which do not grow: never 8 bits."""
    return max(2, itemsize)


def hidden_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of a prompt that goes through the layers as a whole: hidden states, choices."""
    row = HIDDEN_BUFFERS * 4 * config.hidden_size + 8 * config.experts_per_token
    return row * tokens


def restart_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """What a session keeps of its sliding layers beside their windows.

    Copies at the points it can return to, one more while a long prompt is read, spare rows.
    """
    rows = [
        (layer.kv_heads * (layer.head_dim + layer.v_head_dim), layer.window)
        for layer in config.layers
        if layer.window is not None
    ]
    copies = sum(width * (window + RING_SLACK) for width, window in rows)
    spare = sum(width * (RING_SLACK + RING_SPARE) for width, _ in rows)
    return ring_itemsize(itemsize) * ((RESTARTS + 1) * copies + spare)


def activation_bytes(config: ModelConfig, *, native: bool = True) -> int:
    """Float32 rows of one prefill step.

    Without the native kernels also the largest matrix, which a product unpacks.
    """
    heads = max(ly.heads * (ly.head_dim + ly.v_head_dim) for ly in config.layers)
    inner = max(ly.intermediate for ly in config.layers)
    inner = max(inner, config.moe_intermediate_size * max(config.experts_per_token, 1))
    rows = 4 * CHUNK * (8 * config.hidden_size + 2 * heads + 3 * inner)
    if native:
        return rows
    sizes = (r * c for kind, r, c, _ in matrices(config) if kind not in ("embedding", "head"))
    return rows + 4 * max(sizes)


@dataclass(frozen=True, slots=True)
class PackSizes:
    """Bytes of a pack by what is placed together; `expert` is one, padded to 4 KiB.

    `slot`: bytes of one expert in VRAM, where scales of 4-bit weights are float32; 0: as `expert`.
    """

    expert: int
    experts: int
    attention: int
    dense: int
    head: int
    embedding: int
    mtp: int
    exact: int
    slot: int = 0
    draft_head: int = 0
    """Bytes in memory of the 4-bit copy of the head that drafts are made with."""

    @classmethod
    def estimate(cls, config: ModelConfig, recipe: Recipe | None = None) -> PackSizes:
        """What converting `config` by `recipe` will write, headers aside."""
        recipe = recipe or Recipe()
        size = dict.fromkeys((*KINDS, "experts"), 0)
        n_layers = sum(layer.mlp == "moe" for layer in config.layers)
        for kind, rows, cols, count in matrices(config):
            size[kind] += matrix_bytes(getattr(recipe, kind), rows, cols) * count
        count = n_layers * config.n_experts
        one = size["experts"] // count if count else 0
        return cls(
            expert=-(-one // ALIGN) * ALIGN,
            experts=count,
            exact=4 * exact_weights(config),
            slot=_slot(one, recipe.experts),
            draft_head=_draft_head(size["mtp"], (config.vocab_size, config.hidden_size)),
            **{kind: size[kind] for kind in KINDS},
        )

    @classmethod
    def of_pack(cls, manifest: Mapping[str, Any]) -> PackSizes:
        """What a finished pack holds, from its parsed pack.json; PackError if that is damaged."""
        size = dict.fromkeys((*KINDS, "experts", "exact"), 0)
        try:
            for name, entry in manifest["tensors"].items():
                shape = tuple(entry["shape"])
                kind = role_of(name, shape)
                exact = len(shape) != 2
                size[kind] += (
                    4 * math.prod(shape) if exact else matrix_bytes(entry["format"], *shape)
                )
            found = manifest["experts"].values()
            layers = [(int(e["count"]), int(e["stride"])) for e in found]
            slots = [_slot(int(e["nbytes"]), str(e["format"])) for e in found]
            embedding = tuple(manifest["tensors"]["model.embed_tokens.weight"]["shape"])
            draft_head = _draft_head(size["mtp"], embedding)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackError(
                f"pack.json is damaged: {type(error).__name__}: {error}",
                hint="check the pack with `mimo verify`",
            ) from error
        return cls(
            expert=max((stride for _, stride in layers), default=0),
            experts=sum(count for count, _ in layers),
            exact=size["exact"],
            slot=max(slots, default=0),
            draft_head=draft_head,
            **{kind: size[kind] for kind in KINDS},
        )

    @property
    def vram_slot(self) -> int:
        """Bytes one expert takes in VRAM."""
        return self.slot or self.expert

    @property
    def ram_slot(self) -> int:
        """Bytes of the RAM tier that one expert takes: whole pages (`experts.arena`)."""
        return -(-self.expert // ALIGN) * ALIGN

    @property
    def drafter(self) -> int:
        """Bytes of memory that drafting takes: MTP layers and their head; 0 without any."""
        return self.mtp + self.draft_head

    @property
    def total(self) -> int:
        """Bytes of the whole pack."""
        return self.resident + self.expert * self.experts + self.mtp

    @property
    def resident(self) -> int:
        """Bytes every token needs besides experts; embedding included, MTP not."""
        return self.attention + self.dense + self.head + self.embedding + self.exact


def _slot(nbytes: int, fmt: str) -> int:
    """Bytes in VRAM of an expert that has `nbytes` in the pack, rounded up to 256."""
    grown = math.ceil(nbytes * (SCALE_GROWTH if fmt == "nf4" else 1))
    return -(-grown // 256) * 256


def _draft_head(mtp: int, shape: tuple[int, ...]) -> int:
    rows, cols = shape
    small = rows * cols < SMALL_HEAD or cols % 64
    return 0 if small or not mtp else matrix_bytes("nf4", rows, cols)


def gb(nbytes: float) -> str:
    """Bytes as people compare them with a shop's label: 13.4 MB, 176.7 GB (powers of ten)."""
    if nbytes >= 0.9995 * GB:
        return f"{nbytes / GB:.1f} GB" if nbytes < 999.5 * GB else f"{nbytes / GB / 1000:.2f} TB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 99.95e6 else f"{nbytes / 1e6:.0f} MB"


def _attention(layer: LayerSpec, hidden: int) -> tuple[tuple[int, int], ...]:
    return (
        (layer.heads * layer.head_dim, hidden),
        (layer.kv_heads * layer.head_dim, hidden),
        (layer.kv_heads * layer.v_head_dim, hidden),
        (hidden, layer.heads * layer.v_head_dim),
    )
