"""Session fixtures of the real demo model, and a tiny model of the same kind made on the spot.

`demo_pack_dir` is what other test files want: the shipped pack, built once per session. Set
MIMO_DEMO_CACHE to a folder to keep the 98 MB download between sessions. conftest.py hands them to
every test.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from together import one_at_a_time, shared_folder

from mimo_local.demo import build, fetch
from mimo_local.demo.rewrite import Layout, write_checkpoint
from mimo_local.demo.source import GgufSource, LlamaShape, Source, expected_shapes
from mimo_local.errors import DownloadError

# ---- a GGUF writer, for synthetic files ----------------------------------------------------------

F32, Q4_1, Q8_0 = 0, 3, 8
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    """Type id and value, as GGUF stores a metadata entry."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + gguf_string(value)
    items = [gguf_value(item) for item in value]
    kind = items[0][:4]
    return (
        struct.pack("<I", _ARRAY)
        + kind
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]
) -> bytes:
    """A GGUF v3 file; tensors: name -> (type id, row-major shape, data)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += gguf_string(key) + gguf_value(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        out += gguf_string(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", kind, len(data))
        data += raw
    return out + b"\0" * (-len(out) % 32) + data


# ---- a tiny model of the demo's kind -------------------------------------------------------------

TINY = LlamaShape(
    layers=7, hidden=96, intermediate=256, heads=6, kv_heads=2, head_dim=16, vocab=283, context=512,
    rope_theta=10000.0, rms_eps=1e-5, bos=1, eos=2, pad=2,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by Hugging Face name, large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in expected_shapes(TINY).items():
        weight = torch.randn(shape, generator=generator)
        out[name] = 1 + 0.1 * weight if len(shape) == 1 else weight / shape[-1] ** 0.5
    return out


def tiny_metadata() -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += [f"<|special_{i}|>" for i in range(3, 17)]
    letters = sorted(ByteLevel.alphabet())
    merged = ["Ġt", "he", "Ġthe", "in", "ĊĊ", "re", "on", "an", "er", "Ġa"]
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ċ Ċ", "r e", "o n", "a n", "e r", "Ġ a"]
    tokens = special + letters + merged
    return {
        "general.architecture": "llama",
        "llama.block_count": TINY.layers,
        "llama.context_length": TINY.context,
        "llama.embedding_length": TINY.hidden,
        "llama.feed_forward_length": TINY.intermediate,
        "llama.attention.head_count": TINY.heads,
        "llama.attention.head_count_kv": TINY.kv_heads,
        "llama.rope.freq_base": TINY.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": TINY.rms_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": TINY.bos,
        "tokenizer.ggml.eos_token_id": TINY.eos,
        "tokenizer.ggml.padding_token_id": TINY.pad,
        "tokenizer.chat_template": TEMPLATE,
    }


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A q or k matrix in GGUF's row order: row 2i of a head is row i, row 2i + 1 is row i + D/2."""
    out = weight.clone()
    d = len(weight) // heads
    for head in range(heads):
        for i in range(d // 2):
            out[head * d + 2 * i] = weight[head * d + i]
            out[head * d + 2 * i + 1] = weight[head * d + i + d // 2]
    return out


def write_tiny_gguf(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    tensors = {}
    for name, weight in weights.items():
        if "q_proj" in name:
            weight = interleaved(weight, TINY.heads)
        elif "k_proj" in name:
            weight = interleaved(weight, TINY.kv_heads)
        raw = weight.contiguous().numpy().tobytes()
        tensors[GgufSource._gguf_name(name)] = (F32, tuple(weight.shape), raw)
    path.write_bytes(gguf_bytes(tiny_metadata(), tensors))
    return path


def llama_of(source: Source) -> Any:
    """The original architecture in transformers, float32, with the source's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = source.shape
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        max_position_embeddings=s.context,
        rms_norm_eps=s.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=s.bos,
        eos_token_id=s.eos,
        pad_token_id=s.pad,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    state = {name: source.tensor(name) for name in expected_shapes(s)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    # Buffers are not in the state: made again outside the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


# ---- the real one --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_downloads() -> Path:
    """Where the 98 MB file is kept: MIMO_DEMO_CACHE, or this session's folder."""
    kept = os.environ.get("MIMO_DEMO_CACHE")
    return Path(kept) if kept else shared_folder() / "demo-downloads"


@pytest.fixture(scope="session")
def demo_source(demo_downloads: Path) -> Source:
    """The original model; the tests that need it are skipped where it cannot be fetched."""
    try:
        with one_at_a_time(shared_folder() / "demo-downloads.lock"):
            return fetch.open_source(demo_downloads)
    except DownloadError as error:
        pytest.skip(f"the demo model is not here and cannot be fetched: {error}")


@pytest.fixture(scope="session")
def demo_cache(demo_source: Source, demo_downloads: Path) -> Path:
    """A cache folder for `demo_pack(cache_dir=...)`, the same for all processes of the session."""
    cache = shared_folder() / "demo-cache"
    with one_at_a_time(shared_folder() / "demo-cache.lock"):
        folder = build.demo_folder(cache)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "download").exists():
            (folder / "download").symlink_to(demo_downloads.resolve())
    return cache


@pytest.fixture(scope="session")
def demo_pack_dir(demo_cache: Path) -> Path:
    """The shipped demo pack (variant swa, int8), built by today's code, once for all processes."""
    return build.demo_pack(cache_dir=demo_cache)  # another process that builds it is waited for


@pytest.fixture(scope="session")
def demo_checkpoint(
    demo_source: Source, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Layout], Path]]:
    """`demo_checkpoint(EXACT)`: float32 checkpoint folder of a layout (0.6 to 0.9 GB, one kept)."""
    root = tmp_path_factory.mktemp("demo-checkpoints")

    def write(layout: Layout) -> Path:
        folder = root / layout.name
        if not folder.exists():
            for old in root.iterdir():
                shutil.rmtree(old)
            write_checkpoint(demo_source, folder, layout)
        return folder

    yield write
    shutil.rmtree(root)


def write_tiny_hub(
    folder: Path, weights: Mapping[str, torch.Tensor], files: dict[str, str]
) -> Path:
    """The same tiny model as the hub would hold it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), str(folder / "model.safetensors"))
    config = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_hidden_layers": TINY.layers,
        "hidden_size": TINY.hidden,
        "intermediate_size": TINY.intermediate,
        "num_attention_heads": TINY.heads,
        "num_key_value_heads": TINY.kv_heads,
        "vocab_size": TINY.vocab,
        "max_position_embeddings": TINY.context,
        "rope_theta": TINY.rope_theta,
        "rms_norm_eps": TINY.rms_eps,
        "bos_token_id": TINY.bos,
        "eos_token_id": TINY.eos,
        "pad_token_id": TINY.pad,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(files[name])
    return folder
