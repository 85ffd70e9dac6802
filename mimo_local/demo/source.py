"""The original small model as the rewrite wants it: shape, float32 tensors, tokenizer files.

Two places can hold it: a GGUF file (as the package carries it, q/k rows interleaved, undone here)
and a folder of safetensors (as the hub carries it). Knows nothing about MiMo. Called by
mimo_local.demo.rewrite and by bench/train_demo_window.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mimo_local.demo.gguf import Gguf
from mimo_local.demo.tokenizer_files import files_from_gguf, files_from_hub
from mimo_local.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama-style dense model with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_theta: float
    rms_eps: float
    bos: int
    eos: int
    pad: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lowest = 0 if name in ("bos", "eos", "pad") else 1e-12 if name == "rms_eps" else 1
            if not lowest <= value <= 1 << 24:
                raise CheckpointError(
                    f"the demo model's {name} is {value}",
                    hint="The file is not the model the demo expects; delete it and fetch again.",
                )
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise CheckpointError(
                f"the demo model has {self.heads} heads of {self.head_dim} over {self.kv_heads}"
                " key/value heads",
                hint="The file is not the model the demo expects; delete it and fetch again.",
            )


class Source(Protocol):
    """Where the original weights come from."""

    shape: LlamaShape

    def tensor(self, name: str) -> torch.Tensor:
        """Weight by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), float32."""
        ...

    def tokenizer_files(self) -> dict[str, str]:
        """File name -> text of tokenizer.json, tokenizer_config.json, generation_config.json."""
        ...


def expected_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every tensor the rewrite will ask for, by Hugging Face name, with its shape."""
    h, d = shape.hidden, shape.head_dim
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, h),
        "model.norm.weight": (h,),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        names |= {
            f"{at}input_layernorm.weight": (h,),
            f"{at}post_attention_layernorm.weight": (h,),
            f"{at}self_attn.q_proj.weight": (shape.heads * d, h),
            f"{at}self_attn.k_proj.weight": (shape.kv_heads * d, h),
            f"{at}self_attn.v_proj.weight": (shape.kv_heads * d, h),
            f"{at}self_attn.o_proj.weight": (h, shape.heads * d),
            f"{at}mlp.gate_proj.weight": (shape.intermediate, h),
            f"{at}mlp.up_proj.weight": (shape.intermediate, h),
            f"{at}mlp.down_proj.weight": (h, shape.intermediate),
        }
    return names


def uninterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's row order of a q or k matrix (heads x D, H): pairs (i, i + D/2) side by side.

    GGUF keeps each head's rows as (D/2, 2); the rotation used here pairs the two halves (2, D/2).
    """
    out, hidden = rows.shape
    half = out // heads // 2
    return rows.reshape(heads, half, 2, hidden).transpose(1, 2).reshape(out, hidden).contiguous()


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


class GgufSource:
    """The model inside a GGUF file of architecture `llama`."""

    def __init__(self, path: Path) -> None:
        self.file = Gguf(path)
        self.shape = self._shape()
        for name, shape in expected_shapes(self.shape).items():
            info = self.file.tensors.get(self._gguf_name(name))
            if info is None or info.shape != shape:
                found = "nothing" if info is None else f"shape {info.shape}"
                raise CheckpointError(
                    f"{path}: {name} should have shape {shape}, found {found}",
                    hint="The file is not the model the demo expects; delete it and fetch again.",
                )

    def _shape(self) -> LlamaShape:
        meta = self.file.metadata

        def number(key: str, default: float | None = None) -> float:
            value = meta.get(key, default)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(
                    f"{self.file.path}: {key} is missing or not a number ({value!r})",
                    hint="The demo expects a GGUF file of architecture llama.",
                )
            return value

        hidden = int(number("llama.embedding_length"))
        heads = int(number("llama.attention.head_count"))
        if heads < 1 or hidden % heads:
            raise CheckpointError(
                f"{self.file.path}: {heads} heads do not divide {hidden}",
                hint="The demo expects a GGUF file of architecture llama.",
            )
        embedding = self.file.tensors.get("token_embd.weight")
        eps = number("llama.attention.layer_norm_rms_epsilon")
        return LlamaShape(
            layers=int(number("llama.block_count")),
            hidden=hidden,
            intermediate=int(number("llama.feed_forward_length")),
            heads=heads,
            kv_heads=int(number("llama.attention.head_count_kv")),
            head_dim=hidden // heads,
            vocab=embedding.shape[0] if embedding else 0,
            context=int(number("llama.context_length")),
            rope_theta=number("llama.rope.freq_base", 10000.0),
            rms_eps=float(f"{eps:.6g}"),  # stored as float32: 9.99999975e-06 means 1e-05
            bos=int(number("tokenizer.ggml.bos_token_id", 1)),
            eos=int(number("tokenizer.ggml.eos_token_id", 2)),
            pad=int(number("tokenizer.ggml.padding_token_id", 2)),
        )

    @staticmethod
    def _gguf_name(name: str) -> str:
        stem = name.removesuffix(".weight")
        if not stem.startswith("model.layers."):
            return _GGUF_NAMES.get(stem, stem) + ".weight"
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_GGUF_NAMES.get(part, part)}.weight"

    def tensor(self, name: str) -> torch.Tensor:
        """Weight by Hugging Face name, float32, q and k rows in Hugging Face order."""
        weight = self.file.read(self._gguf_name(name))
        if name.endswith("q_proj.weight"):
            return uninterleave(weight, self.shape.heads)
        if name.endswith("k_proj.weight"):
            return uninterleave(weight, self.shape.kv_heads)
        return weight

    def tokenizer_files(self) -> dict[str, str]:
        """File name -> text, written from the GGUF's vocabulary, merges and chat template."""
        return files_from_gguf(self.file.metadata, self.file.path, eos=self.shape.eos)


class HubSource:
    """The model as a hub folder: config.json, model.safetensors, tokenizer files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = folder / "model.safetensors"
        config = self._json("config.json")
        self.shape = self._shape(config)
        from safetensors import SafetensorError

        try:
            self._file = _open_safetensors(self.weights)
            names = set(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.weights}: cannot be read ({error})",
                hint="Delete the cached demo download and run the command again.",
            ) from error
        for name, shape in expected_shapes(self.shape).items():
            found = tuple(self._file.get_slice(name).get_shape()) if name in names else None
            if found != shape:
                raise CheckpointError(
                    f"{self.weights}: {name} should have shape {shape}, found {found or 'nothing'}",
                    hint="Delete the cached demo download and run the command again.",
                )

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / name}: cannot be read ({error})",
                hint="Delete the cached demo download and run the command again.",
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(
                f"{self.folder / name}: is not a JSON object",
                hint="Delete the cached demo download and run the command again.",
            )
        return data

    def _shape(self, config: Mapping[str, Any]) -> LlamaShape:
        def number(key: str, default: float | None = None) -> float:
            value = config.get(key, default)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(
                    f"{self.folder / 'config.json'}: {key} is missing or not a number ({value!r})",
                    hint="Delete the cached demo download and run the command again.",
                )
            return value

        if config.get("model_type") != "llama" or config.get("tie_word_embeddings") is not True:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: is {config.get('model_type')!r}, not a llama model"
                " with tied embeddings",
                hint="Delete the cached demo download and run the command again.",
            )
        heads = int(number("num_attention_heads"))
        rope = config.get("rope_parameters")
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        return LlamaShape(
            layers=int(number("num_hidden_layers")),
            hidden=int(number("hidden_size")),
            intermediate=int(number("intermediate_size")),
            heads=heads,
            kv_heads=int(number("num_key_value_heads", heads)),
            head_dim=int(number("head_dim", number("hidden_size") / max(heads, 1))),
            vocab=int(number("vocab_size")),
            context=int(number("max_position_embeddings")),
            rope_theta=number("rope_theta", theta or 10000.0),
            rms_eps=number("rms_norm_eps"),
            bos=int(number("bos_token_id", 1)),
            eos=int(number("eos_token_id", 2)),
            pad=int(number("pad_token_id", 2)),
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Weight by Hugging Face name, float32."""
        weight: torch.Tensor = self._file.get_tensor(name)
        return weight.float()

    def tokenizer_files(self) -> dict[str, str]:
        """File name -> text of the hub's own tokenizer files, chat template folded in."""
        return files_from_hub(self.folder, eos=self.shape.eos)


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open  # its methods carry no types

    return safe_open(str(path), framework="pt")
