"""A slice of MiMo-V2-Flash for llama.cpp: true shapes, random weights, a GGUF file in seconds.

    python bench/llamacpp_slice.py OUT.gguf --layers 3 --experts q4_0 [--vocab 1024]

The first N layers of the real model (layer 0 dense with full attention, 1 to 4 experts with a
window, ...) in llama.cpp's `mimo2` architecture. Blocks are random bytes with scales that keep
activations sane, so nothing is quantised; there is no tokenizer, only token ids. Attention, dense
layer, embedding and head are Q8_0, the router F32. Runs under the Python that has `gguf`; the
shapes alone (`tensors`, `metadata`) need nothing. Called by bench/vs_llamacpp.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the Python with `gguf` in it does not have this project
    sys.path.insert(0, str(ROOT))

from mimo_local.config import LayerSpec, ModelConfig  # noqa: E402  (standard library only)

EXPERT_TYPES = ("q4_0", "q4_k", "iq4_nl", "mxfp4")
BLOCKS = {"q4_0": (32, 18), "q4_k": (256, 144), "iq4_nl": (32, 18), "mxfp4": (32, 17),
          "q8_0": (32, 34), "f32": (1, 4)}  # fmt: skip
"""Weights and bytes of a block."""
POOL_BLOCKS = 1 << 20
"""Distinct random blocks of a type, 17 to 144 MB: many times any cache."""
PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Tensor:
    """Name, (rows, columns) or (experts, rows, columns) or (n,), and block type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        weights, size = BLOCKS[self.kind]
        return prod(self.shape) // weights * size


def real_config(layers: int, vocab: int) -> ModelConfig:
    """The real model's config cut to its first `layers` layers and ids below `vocab`."""
    d = json.loads((ROOT / "mimo_local" / "real_config.json").read_text(encoding="utf-8"))
    if not 2 <= layers <= d["num_hidden_layers"]:
        # llama.cpp cannot make its cache for a model without a window layer.
        raise SystemExit(f"a slice has 2 to {d['num_hidden_layers']} layers, not {layers}")
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        d[key] = d[key][:layers]
    return ModelConfig.from_dict({**d, "num_hidden_layers": layers, "vocab_size": vocab})


def tensors(config: ModelConfig, experts: str) -> list[Tensor]:
    """Every tensor of the slice, in file order; `experts` is one of EXPERT_TYPES."""
    hidden, vocab = config.hidden_size, config.vocab_size
    out = [
        Tensor("token_embd.weight", (vocab, hidden), "q8_0"),
        Tensor("output_norm.weight", (hidden,), "f32"),
        Tensor("output.weight", (vocab, hidden), "q8_0"),
    ]
    for spec in config.layers:
        out += _attention(spec, hidden)
        out += _dense(spec, hidden) if spec.mlp == "dense" else _moe(spec, config, experts)
    return out


def _attention(spec: LayerSpec, hidden: int) -> list[Tensor]:
    blk, rows = f"blk.{spec.index}.", spec.heads * spec.v_head_dim
    found = [
        Tensor(blk + "attn_norm.weight", (hidden,), "f32"),
        Tensor(blk + "attn_q.weight", (spec.heads * spec.head_dim, hidden), "q8_0"),
        Tensor(blk + "attn_k.weight", (spec.kv_heads * spec.head_dim, hidden), "q8_0"),
        Tensor(blk + "attn_v.weight", (spec.kv_heads * spec.v_head_dim, hidden), "q8_0"),
        Tensor(blk + "attn_output.weight", (hidden, rows), "q8_0"),
        Tensor(blk + "ffn_norm.weight", (hidden,), "f32"),
    ]
    if spec.has_sink:
        found.append(Tensor(blk + "attn_sinks.weight", (spec.heads,), "f32"))
    return found


def _dense(spec: LayerSpec, hidden: int) -> list[Tensor]:
    blk, wide = f"blk.{spec.index}.", spec.intermediate
    return [
        Tensor(blk + "ffn_gate.weight", (wide, hidden), "q8_0"),
        Tensor(blk + "ffn_up.weight", (wide, hidden), "q8_0"),
        Tensor(blk + "ffn_down.weight", (hidden, wide), "q8_0"),
    ]


def _moe(spec: LayerSpec, config: ModelConfig, kind: str) -> list[Tensor]:
    blk, n, hidden = f"blk.{spec.index}.", config.n_experts, config.hidden_size
    wide = config.moe_intermediate_size
    return [
        Tensor(blk + "ffn_gate_inp.weight", (n, hidden), "f32"),
        Tensor(blk + "exp_probs_b.bias", (n,), "f32"),
        Tensor(blk + "ffn_gate_exps.weight", (n, wide, hidden), kind),
        Tensor(blk + "ffn_up_exps.weight", (n, wide, hidden), kind),
        Tensor(blk + "ffn_down_exps.weight", (n, hidden, wide), kind),
    ]


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Keys of the file without the `mimo2.` prefix; the window counts the token itself, as here."""
    first = config.layers[0]
    sliding = next(spec for spec in config.layers if spec.window is not None)
    full = next((spec for spec in config.layers if spec.window is None), first)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": config.n_layers,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_experts,
        "expert_used_count": config.experts_per_token,
        "expert_gating_func": 2,  # sigmoid
        "attention.head_count": first.heads,
        "attention.head_count_kv": [spec.kv_heads for spec in config.layers],
        "attention.key_length": first.head_dim,
        "attention.value_length": first.v_head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "attention.value_scale": config.value_scale,
        "attention.sliding_window": sliding.window,
        "attention.sliding_window_pattern": [spec.window is not None for spec in config.layers],
        "rope.dimension_count": first.rotary_dim,
        "rope.freq_base": full.rope_theta,
        "rope.freq_base_swa": sliding.rope_theta,
    }


class Pool:
    """Random blocks of one type; a tensor is a run of them from a random place, repeated."""

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        self.rng, self.blocks = rng, _random_blocks(kind, rng)

    def write(self, file: Any, nbytes: int) -> None:
        """Put `nbytes` of blocks into `file`."""
        size = self.blocks.shape[1]
        left = nbytes // size
        while left:
            start = int(self.rng.integers(0, POOL_BLOCKS - PIECE))
            n = min(left, PIECE)
            file.write(self.blocks[start : start + n].data)
            left -= n


def _random_blocks(kind: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """POOL_BLOCKS blocks: random codes, one scale that gives weights a deviation near 1/64.

    Divisors: the deviation of the type's code values when all codes are equally likely.
    """
    import numpy as np

    size = BLOCKS[kind][1]
    blocks = rng.integers(0, 256, (POOL_BLOCKS, size), dtype=np.uint8)

    def half(column: int, value: float) -> None:
        blocks[:, column : column + 2] = np.array([value], np.float16).view(np.uint8)

    if kind == "mxfp4":
        blocks[:, 0] = 127 - 8  # codes deviate by 2.9, 2^-8 makes it 1/88
    elif kind == "q4_k":  # d * 6-bit scale * code - dmin * 6-bit minimum: 7.5 d centres it
        half(0, 1 / 64 / 250)
        half(2, 7.5 / 64 / 250)
    else:
        half(0, 1 / 64 / {"q4_0": 4.6, "iq4_nl": 70.0, "q8_0": 74.0}[kind])
    return blocks


def _floats(tensor: Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
    """Norms 1, router like an untrained one, small biases and sinks."""
    import numpy as np

    if tensor.name.endswith("norm.weight"):
        return np.ones(tensor.shape, np.float32)
    return rng.normal(0.0, 0.02, tensor.shape).astype(np.float32)


def write(path: Path, config: ModelConfig, experts: str, *, seed: int = 20251217) -> int:
    """Write the slice to `path` (complete or not there at all); bytes written."""
    import numpy as np

    gguf = importlib.import_module("gguf")
    rng, pools = np.random.default_rng(seed), {}
    beside = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(beside, "mimo2")
    for key, value in metadata(config).items():
        _add(writer, f"mimo2.{key}", value)
    writer.add_tokenizer_model("none")
    listed = tensors(config, experts)
    for tensor in listed:
        kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for tensor in listed:
        if tensor.kind == "f32":
            file.write(_floats(tensor, rng).data)
        else:
            if tensor.kind not in pools:
                pools[tensor.kind] = Pool(tensor.kind, rng)
            pools[tensor.kind].write(file, tensor.nbytes)
        writer.write_padding(file, tensor.nbytes)
    writer.close()
    beside.replace(path)
    return path.stat().st_size


def _add(writer: Any, key: str, value: object) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        raise TypeError(f"{key} is {value!r}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", choices=EXPERT_TYPES, default="q4_0")
    parser.add_argument("--vocab", type=int, default=1024)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    nbytes = write(args.out, real_config(args.layers, args.vocab), args.experts)
    seconds = time.perf_counter() - start
    print(json.dumps({"path": str(args.out), "bytes": nbytes, "seconds": round(seconds, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
