"""A saved KV cache: one safetensors file, written whole or not at all, checked when read.

Knows names, shapes and checksums; what the rows mean is `cache`'s, which alone calls it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mimo_local.config import ModelConfig
from mimo_local.errors import DiskSpaceError, PackError, UsageError
from quant.tensorfile import bytes_of

_FORMAT = "mimo-kv-1"
_HINT = "delete the file: the conversation can be read again from its text"


def write(
    path: Path, config: ModelConfig, facts: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """`facts`: first position per layer, length, slack. DiskSpaceError, UsageError."""
    facts = {"format": _FORMAT, "config": fingerprint(config), **facts}
    meta = {"mimo": json.dumps(facts), "checksum": checksum(facts, tensors)}
    with _whole_file(path) as part:
        save_file(tensors, part, metadata=meta)


def read(path: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(facts, tensors) of a saved cache that fits `config`, every claim checked; or PackError."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            facts = json.loads(meta.get("mimo", "0"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as e:
        raise PackError(f"`{path}` is not a saved cache: {e}", hint=_HINT) from e
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise PackError(f"`{path}` is not a saved cache of this version ({_FORMAT})", hint=_HINT)
    if facts.get("config") != fingerprint(config):
        raise PackError(f"`{path}` was saved with another model or window", hint=_HINT)
    if meta.get("checksum") != checksum(facts, tensors):
        raise PackError(f"`{path}` is damaged: its checksum does not match", hint=_HINT)
    if not _consistent(facts, tensors, config):
        raise PackError(f"`{path}` holds rows that do not fit its length", hint=_HINT)
    return facts, tensors


def fingerprint(config: ModelConfig) -> str:
    """Digest of every number the cached rows depend on; equal for equal configs only."""
    text = json.dumps(asdict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def checksum(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Digest of the facts and of every byte of the rows."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name].cpu()))
    return digest.hexdigest()


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` only if the body succeeds."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as e:
        full = "os error 28" in str(e) or (isinstance(e, OSError) and e.errno == errno.ENOSPC)
        error = DiskSpaceError if full else UsageError
        raise error(f"cannot write `{path}`: {e}", hint="choose another place for it") from e
    finally:
        part.unlink(missing_ok=True)


def _consistent(
    facts: dict[str, Any], tensors: dict[str, torch.Tensor], config: ModelConfig
) -> bool:
    """Whether shapes and positions are what `save` writes (a checksum is no proof of intent)."""
    length, slack, first = facts.get("length"), facts.get("slack"), facts.get("first")
    if not (isinstance(length, int) and isinstance(slack, int) and 0 <= slack < 1 << 16):
        return False
    if not isinstance(first, list) or len(first) != config.n_layers:
        return False
    for spec, start in zip(config.layers, first, strict=True):
        low = 0 if spec.window is None else length - spec.window + 1 - slack
        high = 0 if spec.window is None else max(0, length - spec.window + 1)
        if not (isinstance(start, int) and max(0, low) <= start <= high):
            return False
        for part, dim in (("k", spec.head_dim), ("v", spec.v_head_dim)):
            rows = tensors.get(f"layers.{spec.index}.{part}")
            if rows is None or rows.shape != (length - start, spec.kv_heads, dim):
                return False
            if rows.dtype == torch.int8 and spec.window is None:
                scales = tensors.get(f"layers.{spec.index}.{part}_scales")
                if scales is None or scales.shape != (length - start, spec.kv_heads):
                    return False
                rows = scales
            if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return False
    return True
