"""What lies in VRAM besides experts: whole layers from the first on, head, drafter, buffers.

A byte of these is read for every token, one of an expert only sometimes: so they come first, and
experts only when all of them are there. Layers are whole and consecutive, because every change of
place costs a copy and a wait. Pure arithmetic. Called by `placement`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimo_local.config import ModelConfig
from mimo_local.settings import Draft
from mimo_local.sizes import PackSizes, gb, layer_kv_bytes, layer_spare_bytes

VRAM_RESERVE = 2_500_000_000  # CUDA context, workspaces, the desktop's own use
STREAMS = (
    3  # experts on their way through VRAM during a prompt: one computed, one arriving, one due
)
STAGING = 2  # pinned buffers that experts wanted most come in through (`experts.vram`)
HIDDEN_SHARE = 8  # at most an eighth of the VRAM goes to hidden states of a prompt
# Sizes of the buffers that `prefill`, `device_attention`, `device_sweep`, `shares` and
# `quant.on_device` make, which a test compares with these.
LEAST_ROWS = 256  # of a pass
CHUNK = 2048  # rows of a prompt that go through attention at once
BLOCK = 256  # rows of a sliding layer's block of attention
UNPACKED = 1 << 25  # weights widened at once
SWEPT, SHARED = 2048, 8192  # rows of an expert at once, rows the processor takes over
VERIFIED = 4  # rows of a step of one sequence: a token and its drafts


@dataclass(frozen=True, slots=True)
class OnDevice:
    """What a GPU holds besides experts; nothing where `layers` is 0. Bytes of VRAM but `pinned`."""

    layers: int = 0
    """So many from the first on, with their keys and values."""
    head: bool = False
    drafter: bool = False
    attention: int = 0
    dense: int = 0
    exact: int = 0
    kv: int = 0
    """Keys and values of a context as long as planned."""
    restarts: int = 0
    """Spare rows of rings; the points to return to are copies in RAM."""
    head_bytes: int = 0
    drafter_bytes: int = 0
    work: int = 0
    """Activations of one chunk of rows."""
    hidden: int = 0
    """Hidden states of the rows of one pass."""
    rows: int = 0
    """Most rows of a pass of a long prompt."""
    streams: int = 0
    """Slots that experts pass through during a prompt."""
    pinned: int = 0
    """RAM that is copied from and to: not to be swapped out."""
    left: int = 0
    """What experts may have."""
    reserve: int = 0
    """Left alone."""
    room: int = 0
    """What layers, head, drafter and experts may have together."""

    @property
    def nbytes(self) -> int:
        """All of it but experts."""
        weights = self.attention + self.dense + self.exact + self.head_bytes + self.drafter_bytes
        return weights + self.kv + self.restarts + self.work + self.hidden + self.streams


def hidden_bytes(config: ModelConfig, rows: int) -> int:
    """Hidden and mixed rows in float32, normed ones in bfloat16, choices and their order."""
    return rows * (10 * config.hidden_size + 48 * config.experts_per_token)


def work_bytes(config: ModelConfig, context: int, kv_itemsize: int = 2) -> int:
    """The largest of what one layer needs at once, and room for caches to grow in."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    # Normed rows and their sum; queries, rotated; keys and values for every head; results, joined.
    attention = max(
        4 * ly.heads * (ly.head_dim + ly.v_head_dim)
        + 2 * ly.heads * (ly.head_dim + ly.v_head_dim)
        + 8 * ly.heads * ly.v_head_dim
        for ly in config.layers
    )
    dense = max((6 * ly.intermediate for ly in config.layers if ly.mlp == "dense"), default=0)
    rows = min(CHUNK, context) * (14 * hidden + max(attention, dense))
    # Scores in float32, their exponentials, those in bfloat16.
    scores = 10 * max(
        ly.heads * (VERIFIED * context if ly.window is None else BLOCK * (BLOCK + ly.window))
        for ly in config.layers
    )
    full = [ly for ly in config.layers if ly.window is None]
    # 8-bit keys and values become float32 and bfloat16 before they are multiplied.
    numbers = 6 * max((layer_kv_bytes(ly, context, 1) for ly in full), default=0)
    layer = rows + scores + (numbers if kv_itemsize == 1 else 0) + 2 * 2 * UNPACKED
    sweep = SWEPT * (12 * hidden + 6 * width) + 4 * hidden * width + 6 * SHARED * hidden
    most = max(layer, sweep if config.is_moe else 0)
    return most + growing_bytes(config, context, kv_itemsize)


def growing_bytes(config: ModelConfig, context: int, kv_itemsize: int = 2) -> int:
    """Full layers' rows grow by an eighth, and one layer's old and new ones are there at once."""
    full = [ly for ly in config.layers if ly.window is None]
    keys = [layer_kv_bytes(ly, context, kv_itemsize) for ly in full]
    return sum(keys) // 8 + max(keys, default=0)


def on_device(
    config: ModelConfig,
    sizes: PackSizes,
    vram: int,
    reserve: int,
    *,
    context: int,
    kv_itemsize: int,
    drafting: Draft = "auto",
) -> OnDevice:
    """As much as fits into `vram` bytes without `reserve`."""
    reserve, vram = min(vram, reserve), vram - reserve
    work = work_bytes(config, context, kv_itemsize)
    streamed = sizes.experts > 0
    streams = STREAMS * sizes.vram_slot if streamed else 0
    one = hidden_bytes(config, 1)
    rows = min(context, max(LEAST_ROWS, max(0, vram) // HIDDEN_SHARE // one if streamed else CHUNK))
    hidden = rows * one
    room = left = vram - work - streams - hidden
    attention = dense = exact = kv = restarts = count = 0
    for spec, size in zip(config.layers, sizes.layers, strict=False):
        keys = layer_kv_bytes(spec, context, kv_itemsize)
        points = layer_spare_bytes(spec, kv_itemsize)
        if size.vram + keys + points > left:
            break
        left -= size.vram + keys + points
        attention, dense = attention + size.vram_attention, dense + size.vram_dense
        exact, kv, restarts = exact + size.exact, kv + keys, restarts + points
        count += 1
    if not count:
        return OnDevice()
    head = drafter = 0
    if count == config.n_layers and sizes.vram_head <= left:
        head, left = sizes.vram_head, left - sizes.vram_head
    if head and drafting != "off" and sizes.vram_drafter <= left:
        drafter, left = sizes.vram_drafter, left - sizes.vram_drafter
    wanted = head and streamed
    pinned = sizes.staging_slot * ((STREAMS if streamed else 0) + (STAGING if wanted else 0))
    pinned += 6 * SHARED * config.hidden_size if streamed else 0
    return OnDevice(
        layers=count, head=head > 0, drafter=drafter > 0,
        attention=attention, dense=dense, exact=exact, kv=kv, restarts=restarts,
        head_bytes=head, drafter_bytes=drafter,
        work=work, hidden=hidden, rows=rows, streams=streams, pinned=pinned,
        left=left if wanted else 0, reserve=reserve, room=room,
    )  # fmt: skip


def notes(config: ModelConfig, vram: int, found: OnDevice) -> tuple[str, ...]:
    """Why a GPU has less to do than somebody might expect; `vram`: all there is of it."""
    if vram <= 0 or found.head:
        return ()
    if not found.layers:
        return (
            f"{gb(vram)} of VRAM are too few for one layer beside the buffers: the GPU is not used",
        )
    whole = found.layers == config.n_layers
    where = (
        "all layers but not the head" if whole else f"{found.layers} of {config.n_layers} layers"
    )
    return (
        f"{gb(vram)} of VRAM hold {where}, and no experts: a shorter --context leaves room for "
        "more",
    )
