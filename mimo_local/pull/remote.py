"""What a repository holds, without its weights: configuration, headers, exact sizes, file table.

A header is the first kilobytes of a shard, so 313 GB are planned to the byte after 150 small
requests. Knows no disk but what a staging folder kept. Called by `run` and by `mimo plan REPO`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from mimo_local.errors import CheckpointError, DownloadError
from mimo_local.events import Progress
from mimo_local.pull.hub import Hub, RemoteFile, Snapshot
from mimo_local.pull.staging import StagedFile, Staging
from mimo_local.sizes import PackSizes
from quant.checkpoint import Checkpoint
from quant.convert import checked_jobs, copied
from quant.jobs import Job
from quant.layout import plan_experts
from quant.recipe import Recipe
from quant.shards import INDEX, shard_names
from quant.tensorfile import MAX_HEADER

FIRST: Final = 1 << 18
"""Bytes asked for first: the header of a layer's 1024 matrices has 150 kB."""
MOST_JSON: Final = 1 << 28
"""A configuration or index larger than this is no such thing."""
_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Remote:
    """A checkpoint whose data is elsewhere."""

    snapshot: Snapshot
    checkpoint: Checkpoint
    shards: tuple[RemoteFile, ...]
    small: tuple[RemoteFile, ...]
    """Configuration, index, tokenizer: what a checkpoint folder holds besides."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.size for file in self.shards)


def read_remote(
    snapshot: Snapshot,
    hub: Hub | None,
    staging: Staging,
    on_progress: Callable[[Progress], None] | None = None,
) -> Remote:
    """Everything but the data; what `staging` kept is not asked for again. DownloadError.

    `hub` None: only what was kept.
    """
    config = stored_config(snapshot, hub, staging)
    index = _json(snapshot, hub, staging, INDEX)
    # Folders below (a drafter, an audio tokenizer) hold other models.
    listing = {name for name in snapshot.files if name.endswith(".safetensors") and "/" not in name}
    found = shard_names(listing, index, f"the repository {snapshot.repo}")
    shards = tuple(snapshot.files[name] for name in found.names)
    headers = _headers(snapshot, hub, staging, shards, on_progress)
    files = [StagedFile(staging, file, headers[file.name]) for file in shards]
    checkpoint = Checkpoint.of_files(staging.folder, config, list(files), found)
    wanted = [*copied(snapshot.files), *([INDEX] if index is not None else [])]
    small = tuple(snapshot.files[name] for name in wanted)
    return Remote(snapshot, checkpoint, shards, small)


def stored_config(snapshot: Snapshot, hub: Hub | None, staging: Staging) -> dict[str, Any]:
    """The parsed config.json; what `staging` kept is not asked for again."""
    config = _json(snapshot, hub, staging, "config.json")
    if config is None:
        raise CheckpointError(
            f"{snapshot.repo} has no config.json",
            hint="name a repository that holds a MiMo-V2 checkpoint as safetensors",
        )
    return config


def exact_sizes(remote: Remote, recipe: Recipe) -> PackSizes:
    """Bytes of the pack this recipe makes of it, as its manifest would say."""
    return PackSizes.of_pack(_manifest(checked_jobs(remote.checkpoint, recipe)))


def _manifest(jobs: Iterable[Job]) -> dict[str, Any]:
    """The parts of pack.json that sizes are read from."""
    tensors: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    for job in jobs:
        if job.shapes is None:
            tensors |= {s.name: {"format": s.format, "shape": s.shape} for s in job.specs}
        else:
            layout = plan_experts(job.file, job.layer, 1, job.fmt, job.shapes)[2]
            entry = {"stride": layout.stride, "nbytes": layout.nbytes, "format": job.fmt}
            experts[str(job.layer)] = {"count": job.count, **entry}
    return {"tensors": tensors, "experts": experts}


def _json(
    snapshot: Snapshot, hub: Hub | None, staging: Staging, name: str
) -> dict[str, Any] | None:
    file = snapshot.files.get(name)
    if file is None:
        return None
    if file.size > MOST_JSON:
        raise CheckpointError(
            f"{name} of {snapshot.repo} has {file.size} bytes",
            hint="name a repository that holds a MiMo-V2 checkpoint as safetensors",
        )

    def whole(hub: Hub) -> bytes:
        data, proof = hub.read(snapshot, file, 0, file.size), file.hasher()
        proof.update(data)
        if proof.hexdigest() == file.digest:
            return data
        raise DownloadError(
            f"{name} has the wrong checksum: {proof.hexdigest()[:9]}..., not {file.digest[:9]}...",
            hint="try again; if it stays wrong, the mirror or a proxy in between is damaged",
        )

    raw = _kept_or(staging, f"json/{name}", hub, whole)
    try:
        value = json.loads(raw)
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(
        f"{name} of {snapshot.repo} holds no JSON object",
        hint="check HF_ENDPOINT, and whether a login page or a proxy stands in between",
    )


def _headers(
    snapshot: Snapshot,
    hub: Hub | None,
    staging: Staging,
    shards: tuple[RemoteFile, ...],
    on_progress: Callable[[Progress], None] | None,
) -> Mapping[str, bytes]:
    """Name -> the file's length field and header."""

    def one(file: RemoteFile) -> bytes:
        name = f"headers/{file.name}"
        return _kept_or(staging, name, hub, lambda hub: _header(hub, snapshot, file))

    found: dict[str, bytes] = {}
    pool = ThreadPoolExecutor(_AT_ONCE, "headers")
    try:
        for file, header in zip(shards, pool.map(one, shards), strict=True):
            found[file.name] = header
            if on_progress:
                on_progress(Progress("reading headers", len(found), len(shards), "files"))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def _header(hub: Hub, snapshot: Snapshot, file: RemoteFile) -> bytes:
    head = hub.read(snapshot, file, 0, min(FIRST, file.size))
    length = 8 + int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(file.size, MAX_HEADER):
        raise CheckpointError(
            f"{file.name} claims a header of {length - 8} bytes in a file of {file.size} bytes",
            hint="the repository is damaged, or the file is no safetensors file",
        )
    rest = hub.read(snapshot, file, len(head), length) if length > len(head) else b""
    return (head + rest)[:length]


def _kept_or(staging: Staging, name: str, hub: Hub | None, fetch: Callable[[Hub], bytes]) -> bytes:
    """What an earlier run kept, else what the hub says; kept only where a pull is under way."""
    kept = staging.kept(name)
    if kept is not None:
        return kept
    if hub is None:
        raise DownloadError(
            f"{name.partition('/')[2]} is not here, and this run may not fetch it",
            hint="run the same command once without --offline",
        )
    data = fetch(hub)
    if staging.locked:
        staging.keep(name, data)
    return data
