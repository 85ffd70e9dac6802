"""How many bytes a model takes: every matrix of a `ModelConfig`, priced by a pack's formats.

Arithmetic only, so that planning for 309 B parameters needs no download and no torch; tests tie the
prices to `quant.formats`. Knows no machine. Called by plan, benchmark and cli.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.errors import PackError, UsageError
from quant.inventory import layer_of, role_of
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


def device_bytes(fmt: str, rows: int, cols: int) -> int:
    """The same on an accelerator: scales of NF4 are float32, floats bfloat16 (`on_device`)."""
    if fmt in ("bf16", "f32"):
        return rows * cols * 2
    nbytes = matrix_bytes(fmt, rows, cols)
    return nbytes + rows * cols // 32 if fmt == "nf4" and cols % 64 == 0 else nbytes


def matrices(config: ModelConfig) -> Iterator[tuple[str, int, int, int]]:
    """(kind, rows, cols, how many) of every matrix; kinds: KINDS and "experts"."""
    hidden = config.hidden_size
    yield "embedding", config.vocab_size, hidden, 1
    if not config.tie_embeddings:
        yield "head", config.vocab_size, hidden, 1
    for layer in config.layers:
        yield from _resident(layer, hidden)
        if layer.mlp == "moe":
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
    count = config.hidden_size + sum(_exact(config, layer) for layer in config.layers)
    return count + _exact_mtp(config)


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
    return sum(layer_kv_bytes(layer, tokens, itemsize) for layer in config.layers)


def layer_kv_bytes(layer: LayerSpec, tokens: int, itemsize: int = 2) -> int:
    """One layer's share of `kv_bytes`."""
    width = layer.head_dim + layer.v_head_dim
    if layer.window is not None:
        return layer.kv_heads * width * ring_itemsize(itemsize) * min(tokens, layer.window)
    return layer.kv_heads * tokens * (width * itemsize + (2 * SCALE if itemsize == 1 else 0))


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
    copies = sum(
        _row_bytes(layer, itemsize) * (layer.window + RING_SLACK)
        for layer in config.layers
        if layer.window is not None
    )
    spare = sum(layer_spare_bytes(layer, itemsize) for layer in config.layers)
    return (RESTARTS + 1) * copies + spare


def layer_spare_bytes(layer: LayerSpec, itemsize: int = 2) -> int:
    """Of `restart_bytes` what lies beside the window itself, and not in the host's memory always.

    Spare rows of one layer's ring.
    """
    rows = 0 if layer.window is None else RING_SLACK + RING_SPARE
    return _row_bytes(layer, itemsize) * rows


def _row_bytes(layer: LayerSpec, itemsize: int) -> int:
    """Of one position in a sliding layer."""
    return layer.kv_heads * (layer.head_dim + layer.v_head_dim) * ring_itemsize(itemsize)


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
class LayerSize:
    """Bytes of one layer besides its experts, keys and values."""

    attention: int = 0
    dense: int = 0
    exact: int = 0
    """Router, norms, sinks; float32 everywhere."""
    vram_attention: int = 0
    """On an accelerator."""
    vram_dense: int = 0

    @property
    def vram(self) -> int:
        """All of it on an accelerator."""
        return self.vram_attention + self.vram_dense + self.exact


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
    mixed: int = 0
    """Bytes of all experts where layers store theirs in different formats and `expert` is of the
    widest; 0: all are alike."""
    draft_head: int = 0
    """Bytes in memory of the 4-bit copy of the head that drafts are made with."""
    layers: tuple[LayerSize, ...] = ()
    """Attention, dense and exact parts layer by layer."""
    vram_head: int = 0
    """Head and final norm on an accelerator."""
    vram_drafter: int = 0
    """MTP layers with their norms and their head there; 0 without any."""

    @classmethod
    def estimate(cls, config: ModelConfig, recipe: Recipe | None = None) -> PackSizes:
        """What converting `config` by `recipe` will write, headers aside."""
        recipe, hidden = recipe or Recipe(), config.hidden_size
        tally = _Tally(hidden)
        for layer in config.layers:
            tally.exact(_exact(config, layer), layer.index)
            for kind, rows, cols, count in _resident(layer, hidden):
                tally.matrix(kind, getattr(recipe, kind), (rows, cols), count, layer.index)
        tally.exact(hidden + _exact_mtp(config))
        for kind, rows, cols, count in matrices(config):
            if kind not in ("attention", "dense", "experts"):
                tally.matrix(kind, getattr(recipe, kind), (rows, cols), count)
        width, experts = config.moe_intermediate_size, []
        for layer in config.layers:
            if layer.mlp == "moe":
                fmt = recipe.experts_of(layer.index)
                one = 2 * matrix_bytes(fmt, width, hidden) + matrix_bytes(fmt, hidden, width)
                experts.append((config.n_experts, -(-one // ALIGN) * ALIGN, one, fmt))
        return tally.sizes(experts)

    @classmethod
    def of_pack(cls, manifest: Mapping[str, Any]) -> PackSizes:
        """What a finished pack holds, from its parsed pack.json; PackError if that is damaged."""
        try:
            tensors, found = manifest["tensors"], list(manifest["experts"].values())
            tally = _Tally(int(tensors["model.norm.weight"]["shape"][0]))
            for name, entry in tensors.items():
                shape, layer = tuple(entry["shape"]), layer_of(name)
                kind = role_of(name, shape)
                if kind == "exact":
                    tally.exact(math.prod(shape), layer)
                else:
                    tally.matrix(kind, entry["format"], shape, 1, layer)
            experts = []
            for e in found:
                n, stride, nbytes = int(e["count"]), int(e["stride"]), int(e["nbytes"])
                experts.append((n, stride, nbytes, str(e["format"])))
            return tally.sizes(experts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackError(
                f"pack.json is damaged: {type(error).__name__}: {error}",
                hint="check the pack with `mimo verify`",
            ) from error

    @property
    def vram_slot(self) -> int:
        """Bytes one expert takes in VRAM."""
        return self.slot or self.expert

    @property
    def staging_slot(self) -> int:
        """Bytes of pinned RAM that one expert passes through on its way there."""
        return -(-self.vram_slot // ALIGN) * ALIGN

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
        return self.resident + (self.mixed or self.expert * self.experts) + self.mtp

    @property
    def mean(self) -> int:
        """Bytes of an expert, on average."""
        return self.mixed // self.experts if self.mixed else self.expert

    @property
    def resident(self) -> int:
        """Bytes every token needs besides experts; embedding included, MTP not."""
        return self.attention + self.dense + self.head + self.embedding + self.exact


def _slot(nbytes: int, fmt: str) -> int:
    """Bytes in VRAM of an expert that has `nbytes` in the pack, rounded up to 256."""
    grown = math.ceil(nbytes * {"nf4": SCALE_GROWTH, "f32": 0.5}.get(fmt, 1))
    return -(-grown // 256) * 256


class _Tally:
    """Sums a pack's matrices by kind and by layer, as they are stored and as they lie in VRAM."""

    def __init__(self, hidden: int) -> None:
        self.size = dict.fromkeys((*KINDS, "exact"), 0)
        self.layers: dict[int, dict[str, int]] = {}
        self.head: tuple[str, int, int] | None = None
        self.norm, self.mtp = 4 * hidden, 0

    def matrix(
        self, kind: str, fmt: str, shape: tuple[int, ...], count: int, layer: int | None = None
    ) -> None:
        """`count` matrices (rows, cols); ValueError for another shape."""
        rows, cols = shape
        here, there = (size(fmt, rows, cols) * count for size in (matrix_bytes, device_bytes))
        self.size[kind] += here
        if kind == "head" or (kind == "embedding" and self.head is None):
            self.head = (fmt, rows, cols)
        if kind == "mtp":
            self.mtp += there
        if layer is not None and kind in ("attention", "dense"):
            mine = self._layer(layer)
            mine[kind] += here
            mine[f"vram_{kind}"] += there

    def exact(self, weights: int, layer: int | None = None) -> None:
        """Float32 numbers, of a layer or of none."""
        self.size["exact"] += 4 * weights
        if layer is not None:
            self._layer(layer)["exact"] += 4 * weights

    def _layer(self, index: int) -> dict[str, int]:
        return self.layers.setdefault(index, {f.name: 0 for f in fields(LayerSize)})

    def sizes(self, experts: list[tuple[int, int, int, str]]) -> PackSizes:
        """With (how many, bytes of one with and without padding, format) of layers' experts."""
        fmt, rows, cols = self.head or ("f32", 0, 0)
        copied = self.size["mtp"] > 0 and rows * cols >= SMALL_HEAD and not cols % 64
        copied = copied and fmt not in ("nf4", "mxfp4")
        copy, there = (
            size("nf4", rows, cols) if copied else 0 for size in (matrix_bytes, device_bytes)
        )
        layers = tuple(LayerSize(**self.layers[i]) for i in sorted(self.layers))
        expert = max((stride for _, stride, _, _ in experts), default=0)
        count = sum(n for n, _, _, _ in experts)
        total = sum(n * stride for n, stride, _, _ in experts)
        norms = self.size["exact"] - self.norm - sum(layer.exact for layer in layers)
        return PackSizes(
            expert=expert,
            experts=count,
            slot=max((_slot(nbytes, fmt) for _, _, nbytes, fmt in experts), default=0),
            mixed=0 if total == count * expert else total,
            draft_head=copy,
            layers=layers,
            vram_head=device_bytes(fmt, rows, cols) + self.norm,
            vram_drafter=self.mtp + there + norms if self.mtp else 0,
            **self.size,
        )


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


def _resident(layer: LayerSpec, hidden: int) -> Iterator[tuple[str, int, int, int]]:
    """(kind, rows, cols, how many) of one layer's matrices besides experts."""
    yield from (("attention", *shape, 1) for shape in _attention(layer, hidden))
    if layer.mlp == "dense":
        yield "dense", layer.intermediate, hidden, 2
        yield "dense", hidden, layer.intermediate, 1


def _exact(config: ModelConfig, layer: LayerSpec) -> int:
    """Weights of one layer that are kept in float32."""
    router = config.n_experts * (config.hidden_size + 1) if layer.mlp == "moe" else 0
    return 2 * config.hidden_size + (layer.heads if layer.has_sink else 0) + router


def _exact_mtp(config: ModelConfig) -> int:
    if config.mtp_layer is None:
        return 0
    sink = config.mtp_layer.heads if config.mtp_layer.has_sink else 0
    return config.n_mtp_layers * (5 * config.hidden_size + sink)
