"""Tokenizer files of the demo model, written from GGUF metadata for the `tokenizers` library.

The one trap: this model's pre-tokenizer is `smollm`, every digit on its own and then the GPT-2
pattern; readers that apply only the pattern join "\\n\\n" before a digit into other tokens. Knows
vocabularies, not weights. Called by mimo_local.demo.source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_local.errors import TokenizerError

CONTROL = 3
"""GGUF token type of special tokens; 1 is an ordinary one."""


def files_from_gguf(metadata: Mapping[str, object], path: Path, *, eos: int) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and generation_config.json as text; TokenizerError."""
    for key, wanted in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        if metadata.get(key) != wanted:
            raise _broken(path, f"{key} is {metadata.get(key)!r}, expected {wanted!r}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    merges = _strings(metadata, "tokenizer.ggml.merges", path)
    types = metadata.get("tokenizer.ggml.token_type")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise _broken(path, "tokenizer.ggml.token_type does not match the vocabulary")
    if not isinstance(template, str) or not template:
        raise _broken(path, "there is no chat template")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or not 0 <= eos < len(tokens):
        raise _broken(path, "the vocabulary repeats a token or lacks the end token")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 or "".join(pair) not in vocab for pair in pairs):
        raise _broken(path, "a merge is not a pair that makes a known token")
    special = {index: tokens[index] for index, kind in enumerate(types) if kind == CONTROL}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": tokens[eos],
        "pad_token": tokens[eos],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    return {
        "tokenizer.json": json.dumps(_tokenizer(vocab, pairs, special), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "generation_config.json": _generation_config(eos),
    }


def files_from_hub(folder: Path, *, eos: int) -> dict[str, str]:
    """The hub's own tokenizer.json and tokenizer_config.json; generation_config.json is ours."""
    config = _object(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    if "chat_template" not in config and template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if not isinstance(config.get("chat_template"), str):
        raise _broken(folder / "tokenizer_config.json", "there is no chat template")
    return {
        "tokenizer.json": json.dumps(_object(folder / "tokenizer.json"), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "generation_config.json": _generation_config(eos),
    }


def _tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, ...]], special: dict[int, str]
) -> dict[str, object]:
    """tokenizer.json: byte-level BPE behind the digit split."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, content) for index, content in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level()],
        },
        "post_processor": None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _generation_config(eos: int) -> str:
    return json.dumps({"eos_token_id": eos, "pad_token_id": eos, "do_sample": True}, indent=2)


def _byte_level() -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _added(index: int, content: str) -> dict[str, object]:
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _strings(metadata: Mapping[str, object], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise _broken(path, f"{key} is missing or not a list of strings")
    return value


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, f"cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise _broken(path, "is not a JSON object")
    return data


def _broken(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: {what}",
        hint="The file is not the model the demo expects; delete it and fetch it again.",
    )
