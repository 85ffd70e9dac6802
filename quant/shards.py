"""Which files a checkpoint folder consists of, by its index or by their names.

Reads the index and asks which files exist; opens no tensors. Called by `checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_local.errors import CheckpointError
from quant.tensorfile import read_json

INDEX = "model.safetensors.index.json"
REFETCH = "fetch this file of the checkpoint again; its checksum is on the model's hub page"


@dataclass(frozen=True, slots=True)
class Shards:
    """What a checkpoint consists of, as its index or its files' names say."""

    names: list[str]
    """Of the safetensors files, sorted."""
    weight_map: dict[str, str] | None
    """Tensor -> file."""
    tp_size: int | None = None
    """Tensor-parallel shards that fused tensors were written in."""


def find_shards(folder: Path) -> Shards:
    """The files of the checkpoint in a folder."""
    index = None
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, error=CheckpointError, hint=REFETCH)
    listing = {p.name for p in folder.glob("*.safetensors") if p.is_file()}
    return shard_names(listing, index, str(folder))


def shard_names(listing: set[str], index: Mapping[str, Any] | None, where: str) -> Shards:
    """The same for a folder `where` that lists these safetensors files and has this index."""
    weight_map: dict[str, str] | None = None
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) and v == Path(v).name and v not in ("", "..")
            for v in weight_map.values()
        ):
            raise CheckpointError(
                f"{INDEX} has no usable weight_map (tensor name -> file name)", hint=REFETCH
            )
        names = set(weight_map.values())
    elif "model.safetensors" in listing:
        names = {"model.safetensors"}
    else:
        names = set(listing)
        for match in [m for n in names if (m := re.fullmatch(r"(.*)-\d+-of-(\d+)(\..*)", n))]:
            width = len(match[2])
            for i in range(int(match[2])):
                names.add(f"{match[1]}-{i + 1:0{width}d}-of-{match[2]}{match[3]}")
    names |= {name for name in listing if "mtp" in name}
    missing = sorted(names - listing)
    if missing:
        raise CheckpointError(
            f"{missing[0]} is missing in {where}"
            + (f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""),
            hint="fetch the missing files into the folder, then run this again",
        )
    if not names:
        raise CheckpointError(
            f"no .safetensors files in {where}",
            hint="give the folder of a Hugging Face checkpoint (a pack needs no conversion)",
        )
    return Shards(sorted(names), weight_map, None if index is None else _tp_size(index))


def _tp_size(index: Mapping[str, Any]) -> int | None:
    metadata = index.get("metadata")
    value = metadata.get("tp_size") if isinstance(metadata, dict) else None
    if value is not None and (type(value) is not int or value < 1):
        raise CheckpointError(f"{INDEX}: tp_size is {value!r}, not a count", hint=REFETCH)
    return value
