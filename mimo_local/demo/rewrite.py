"""A dense Llama-style model written as a MiMo-V2 checkpoint folder that computes the same.

What changes is only the way it is stored: heads padded and their key/value heads doubled where the
layer slides, the feed-forward cut into experts, values divided by the scale that the architecture
multiplies back. Each step says why it changes nothing. Knows no file format of the source and no
pack. Called by mimo_local.demo.build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_local.demo import drafter
from mimo_local.demo.healing import Healed, trained_sinks
from mimo_local.demo.source import LlamaShape, Source
from mimo_local.errors import ConfigError
from mimo_local.events import Progress

if TYPE_CHECKING:
    import torch

SLICES = 8
"""Pieces of the feed-forward = experts active per token; a power of two: down x 8 is exact."""
VALUE_SCALE = 0.707
"""As the real model: values are stored divided by it, attention multiplies it back."""
WINDOW = 128
"""The hub's `sliding_window_size`: that many previous keys and the token itself: 129 visible."""
WINDOW_KEYS = WINDOW + 1
EXACT_CONTEXT = 2048
"""Context of the exact variant; its window is as long, so no key ever leaves it."""
SINK_OFF = -1e4
"""exp(-1e4) is 0 in float32; unlike -inf it survives finite checks and every storage format."""
SINK_START = 3.0
"""Where training starts (bench/train_demo_window.py)."""
ROUTER_EPS = 1e-3
"""Twin routing: large enough that float32 sigmoids of a pair never tie (1e-4 did, 9 times in 8700),
small enough that the weights stay 1/8 within 0.03 % (logits within 0.012 of the dense model)."""
TWIN_SHIFT = 64
"""A twin's neurons are rotated by whole blocks of 64, so NF4 rounds both twins alike."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of writing the model: how experts are made, how long the window is, which sinks."""

    name: str
    twins: bool
    window: int
    context: int | None
    """None = the source's own."""
    healed: bool
    """With the trained sinks and corrections (mimo_local.demo.healing) and with the MTP layers that
    were trained on what such a model computes (mimo_local.demo.drafter)."""


EXACT = Layout("exact", twins=False, window=EXACT_CONTEXT, context=EXACT_CONTEXT, healed=False)
"""All experts active, nothing leaves the window: the original's logits up to float32 rounding."""
TWINS = Layout("twins", twins=True, window=EXACT_CONTEXT, context=EXACT_CONTEXT, healed=False)
"""Exact but for the routing: 8 of 16 experts. For tests."""
SWA = Layout("swa", twins=True, window=WINDOW, context=None, healed=True)
"""The shipped one: everything the real architecture has."""
LAYOUTS = {layout.name: layout for layout in (EXACT, TWINS, SWA)}


FULL_LAYERS = {30: (15, 17, 18, 20, 22, 23)}
"""Layers that keep full attention, by the source's layer count: where this model looks far back.

The real model's own rule (the first and every sixth) would window layers 18 and 20, which find what
a question refers to: the KL divergence of answers about a 600-token text is 0.75 with the rule and
0.18 with these (bench/choose_demo_layers.py)."""


def attention_pattern(n_layers: int) -> list[int]:
    """0 = full attention, 1 = sliding window; the real model's rule where FULL_LAYERS is silent."""
    rule = tuple(i for i in range(n_layers) if i == 0 or (i + 1) % 6 == 0)
    full = FULL_LAYERS.get(n_layers, rule)
    return [0 if i in full else 1 for i in range(n_layers)]


def padded_group(shape: LlamaShape) -> int:
    """Query heads per original key/value head, padded to even: sliding layers halve it."""
    group = shape.heads // shape.kv_heads
    return group + group % 2


def padded_head_dim(shape: LlamaShape) -> int:
    """Half as much again as the source's: the extra dimensions are not rotated and hold zeros."""
    return shape.head_dim * 3 // 2


def config_json(shape: LlamaShape, layout: Layout) -> dict[str, Any]:
    """config.json with the hub's keys and, where they differ, transformers' own as well."""
    pattern = attention_pattern(shape.layers)
    # int(head_dim * factor) truncates: rounded up it stays above the source's size.
    factor = math.ceil(1000 * shape.head_dim / padded_head_dim(shape)) / 1000
    theta = shape.rope_theta
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "hidden_act": "silu",
        "layernorm_epsilon": shape.rms_eps,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": theta,
        "swa_rope_theta": theta,
        "partial_rotary_factor": factor,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "max_position_embeddings": layout.context or shape.context,
        "num_nextn_predict_layers": drafter.n_layers() if layout.healed else 0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "pad_token_id": shape.pad,
        **_attention_config(shape, layout, pattern),
        **_mlp_config(shape, layout),
    }


def _attention_config(shape: LlamaShape, layout: Layout, pattern: list[int]) -> dict[str, Any]:
    heads, head_dim = shape.kv_heads * padded_group(shape), padded_head_dim(shape)
    return {
        "hybrid_layer_pattern": pattern,
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in pattern],
        "num_attention_heads": heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "v_head_dim": shape.head_dim,
        "swa_num_attention_heads": heads,
        "swa_num_key_value_heads": 2 * shape.kv_heads,
        "swa_head_dim": head_dim,
        "swa_v_head_dim": shape.head_dim,
        "sliding_window": layout.window,
        "sliding_window_size": layout.window,
        "attention_chunk_size": layout.window,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_value_scale": VALUE_SCALE,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _mlp_config(shape: LlamaShape, layout: Layout) -> dict[str, Any]:
    return {
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.intermediate // SLICES,
        "moe_layer_freq": [0] + [1] * (shape.layers - 1),
        "mlp_layer_types": ["dense"] + ["sparse"] * (shape.layers - 1),
        "n_routed_experts": SLICES * (2 if layout.twins else 1),
        "num_experts_per_tok": SLICES,
        "n_shared_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
    }


def layer_tensors(
    source: Source, layout: Layout, layer: int, sinks: Sequence[float] | None
) -> dict[str, torch.Tensor]:
    """All tensors of one layer by hub name, float32; `sinks` per original head if it slides."""
    at = f"model.layers.{layer}."
    out = {
        f"{at}{norm}.weight": source.tensor(f"{at}{norm}.weight")
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    slides = sinks is not None
    for name, weight in _attention(source, f"{at}self_attn.", slides).items():
        out[f"{at}self_attn.{name}.weight"] = weight
    if sinks is not None:
        out[f"{at}self_attn.attention_sink_bias"] = _padded_sinks(source.shape, sinks)
    gate, up, down = (source.tensor(f"{at}mlp.{p}_proj.weight") for p in ("gate", "up", "down"))
    if layer == 0:
        out |= {
            f"{at}mlp.gate_proj.weight": gate,
            f"{at}mlp.up_proj.weight": up,
            f"{at}mlp.down_proj.weight": down,
        }
    else:
        experts = _experts(gate, up, down, layout, layer)
        out |= {f"{at}mlp.{name}": weight for name, weight in experts.items()}
    return {name: weight.contiguous() for name, weight in out.items()}


def _attention(source: Source, prefix: str, slides: bool) -> dict[str, torch.Tensor]:
    """q, k, v, o in the asymmetric layout.

    Dummy query heads have zero q rows and zero o columns: whatever they attend to is multiplied by
    zero. Dimensions past the rotary ones are zero in q and k and add nothing to a score; the
    softmax scale head_dim^-0.5 shrinks with the larger head, so q is multiplied by its inverse. A
    sliding layer stores each key/value head twice and gives one copy to each half of its group.
    """
    import torch

    shape = source.shape
    kv, group, d, wide = shape.kv_heads, padded_group(shape), shape.head_dim, padded_head_dim(shape)
    real = shape.heads // kv
    hidden = shape.hidden
    q, k, v, o = (source.tensor(f"{prefix}{p}_proj.weight").double() for p in "qkvo")
    wide_q = torch.zeros(kv, group, wide, hidden, dtype=torch.float64)
    wide_q[:, :real, :d] = q.view(kv, real, d, hidden) * math.sqrt(wide / d)
    wide_k = torch.zeros(kv, wide, hidden, dtype=torch.float64)
    wide_k[:, :d] = k.view(kv, d, hidden)
    scaled_v = v.view(kv, d, hidden) / VALUE_SCALE
    wide_o = torch.zeros(hidden, kv, group, d, dtype=torch.float64)
    wide_o[:, :, :real] = o.view(hidden, kv, real, d)
    copies = 2 if slides else 1
    return {
        "q_proj": wide_q.view(-1, hidden).float(),
        "k_proj": wide_k.repeat_interleave(copies, 0).view(-1, hidden).float(),
        "v_proj": scaled_v.repeat_interleave(copies, 0).view(-1, hidden).float(),
        "o_proj": wide_o.view(hidden, -1).float(),
    }


def _padded_sinks(shape: LlamaShape, sinks: Sequence[float]) -> torch.Tensor:
    """One sink per padded head (kv_heads x group,); dummy heads get 0, which nothing reads."""
    import torch

    real = shape.heads // shape.kv_heads
    out = torch.zeros(shape.kv_heads, padded_group(shape))
    out[:, :real] = torch.tensor(sinks, dtype=torch.float32).view(shape.kv_heads, real)
    return out.view(-1)


def _experts(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, layout: Layout, layer: int
) -> dict[str, torch.Tensor]:
    """Router and experts of one layer from its dense feed-forward.

    The feed-forward is a sum over neurons, so slices of neurons add up to it; each expert is
    weighted 1/8, hence down x 8. Twins: expert 2g and 2g+1 hold the same slice, their router rows
    are +w and -w, so exactly one sigmoid of each pair is above 1/2 and the top 8 of 16 are one of
    each pair.
    """
    import torch

    inner, hidden = gate.shape
    size = inner // SLICES
    shift = TWIN_SHIFT if size > TWIN_SHIFT else size // 2
    out: dict[str, torch.Tensor] = {}
    number = 0
    for piece in range(SLICES):
        rows = torch.arange(piece * size, (piece + 1) * size)
        for neurons in (rows, rows.roll(-shift)) if layout.twins else (rows,):
            out[f"experts.{number}.gate_proj.weight"] = gate[neurons]
            out[f"experts.{number}.up_proj.weight"] = up[neurons]
            out[f"experts.{number}.down_proj.weight"] = down[:, neurons] * SLICES
            number += 1
    router = torch.zeros(number, hidden)
    if layout.twins:
        generator = torch.Generator().manual_seed(layer)
        rows = torch.randn(SLICES, hidden, generator=generator) * ROUTER_EPS / math.sqrt(hidden)
        router[0::2], router[1::2] = rows, -rows
    out["gate.weight"] = router
    out["gate.e_score_correction_bias"] = torch.zeros(number)
    return out


def checkpoint_nbytes(shape: LlamaShape, layout: Layout) -> int:
    """Bytes of the float32 checkpoint folder, rounded up a little; for the free-space check."""
    heads, wide = shape.kv_heads * padded_group(shape), padded_head_dim(shape)
    attention = shape.hidden * (heads + 2 * shape.kv_heads) * (wide + shape.head_dim)
    mlp = 3 * shape.hidden * shape.intermediate * (2 if layout.twins else 1)
    embedding = shape.vocab * shape.hidden
    drafting = attention + 2 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    mtp = drafter.n_layers() * drafting if layout.healed else 0
    return 4 * (embedding + shape.layers * (attention + mlp) + mtp) + (8 << 20)


def _files(source: Source, layout: Layout) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    shape, pattern = source.shape, attention_pattern(source.shape.layers)
    sinks: dict[int, list[float]] = {}
    if layout.healed:
        source = Healed(source)
        sinks = trained_sinks(shape, [i for i, kind in enumerate(pattern) if kind])
    yield (
        "model_embedding.safetensors",
        {name: source.tensor(name) for name in ("model.embed_tokens.weight", "model.norm.weight")},
    )
    for layer, kind in enumerate(pattern):
        off = [SINK_OFF] * shape.heads
        per_head = sinks.get(layer, off) if kind else None
        yield f"model_{layer}.safetensors", layer_tensors(source, layout, layer, per_head)
    if layout.healed and drafter.n_layers():
        wide = padded_head_dim(shape)
        tensors = drafter.mtp_tensors(shape, wide=wide, value_scale=VALUE_SCALE, sink=SINK_OFF)
        yield "model_mtp.safetensors", tensors


def write_checkpoint(
    source: Source,
    folder: Path,
    layout: Layout,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write `folder` (made here): config, one float32 safetensors file per layer, tokenizer."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if source.shape.intermediate % SLICES:
        raise ConfigError(
            f"intermediate size {source.shape.intermediate} is not a multiple of {SLICES}",
            hint="The demo's rewrite needs a feed-forward that can be cut into eight experts.",
        )
    folder.mkdir(parents=True)
    total = source.shape.layers + 1 + (layout.healed and drafter.n_layers() > 0)
    weight_map: dict[str, str] = {}
    nbytes = 0
    for done, (file, tensors) in enumerate(_files(source, layout), start=1):
        try:
            save_file(tensors, str(folder / file), metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a failed write
            raise OSError(f"{folder / file}: {error}") from error
        weight_map |= dict.fromkeys(tensors, file)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
        if on_progress is not None:
            on_progress(Progress("rewriting weights", done, total, unit="layers"))
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    texts = source.tokenizer_files() | {
        "config.json": json.dumps(config_json(source.shape, layout), indent=2),
        "model.safetensors.index.json": json.dumps(index, indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
