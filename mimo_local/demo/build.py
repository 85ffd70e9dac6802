"""Builds the demo pack once into the user's cache and finds it again ever after.

fetch -> rewrite as a float32 checkpoint folder -> quant.convert -> verify -> rename into place,
under a lock file, in a scratch folder beside the result. Whatever interrupts it (Ctrl-C, a full
disk, kill -9), the place of the pack holds nothing or a whole pack. Called by cli, api and
engine's default.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mimo_local.demo.fetch import open_source
from mimo_local.demo.rewrite import LAYOUTS, Layout, checkpoint_nbytes, write_checkpoint
from mimo_local.demo.source import Source
from mimo_local.errors import DiskSpaceError, MimoError, PackError, UsageError
from mimo_local.events import Progress
from mimo_local.settings import Paths

OnProgress = Callable[[Progress], None] | None

DEMO_VERSION = 4
"""Part of every pack's folder name; raise it when what goes into a pack changes."""
VARIANTS = ("swa", "exact")
FORMATS = ("int8", "nf4", "bf16")

LOCK_POLL_S = 0.2


def demo_folder(cache_dir: Path | None = None) -> Path:
    """The folder of everything the demo keeps; `cache_dir` defaults to the user's."""
    return (cache_dir or Paths.default().cache_dir) / "demo"


def demo_pack(
    *,
    on_progress: OnProgress = None,
    variant: str = "swa",
    fmt: str = "int8",
    rebuild: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Path of the demo pack, fetched and built first if it is not there; safe to call anywhere.

    variant: "swa" (shipped: window 128, trained sinks, 8 of 16 experts) or "exact" (the original's
    logits). fmt: "int8", "nf4" or "bf16"; int8 because the weights already sit on a 4-bit grid and
    another 4-bit one rounds them a second time (docs/demo.md). Raises UsageError, DownloadError,
    DiskSpaceError, and MimoError where the cache cannot be written.
    """
    if variant not in VARIANTS or fmt not in FORMATS:
        raise UsageError(
            f"there is no demo pack of variant {variant!r} and format {fmt!r}",
            hint=f"Variants are {', '.join(VARIANTS)}; formats are {', '.join(FORMATS)}.",
        )
    root = demo_folder(cache_dir)
    pack = root / f"smollm2-135m-{variant}-{fmt}-v{DEMO_VERSION}"
    if not rebuild and _usable(pack):
        return pack
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "lock", on_progress):
            if rebuild or not _usable(pack):  # somebody else may have built it while we waited
                _make(pack, LAYOUTS[variant], fmt, on_progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"the disk of {root} filled up while the demo pack was built",
                hint="Free 1.5 GB or set MIMO_HOME to a folder on a larger disk.",
            ) from error
        raise MimoError(
            f"the demo pack cannot be built in {root}: {error}",
            hint="Set MIMO_HOME to a folder you can write to.",
        ) from error
    return pack


def _make(pack: Path, layout: Layout, fmt: str, on_progress: OnProgress) -> None:
    """Fetch, build in a scratch folder, rename to `pack`; the lock is held."""
    root = pack.parent
    downloads = root / "download"
    for left_over in (*root.glob(".build-*"), *downloads.glob(".fetch-*")):  # of a killed build
        shutil.rmtree(left_over, ignore_errors=True)
    source = open_source(downloads, on_progress=on_progress)
    _require_space(root, source, layout, fmt)
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=root))
    try:
        _build(source, layout, fmt, scratch, on_progress)
        if pack.exists():
            pack.rename(scratch / "old")
        (scratch / "pack").rename(pack)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(
    source: Source, layout: Layout, fmt: str, scratch: Path, on_progress: OnProgress
) -> None:
    """scratch/checkpoint, then scratch/pack, converted and verified."""
    from quant.convert import Recipe, convert

    checkpoint = scratch / "checkpoint"
    write_checkpoint(source, checkpoint, layout, on_progress=on_progress)
    pack = convert(checkpoint, scratch / "pack", Recipe.for_format(fmt), on_progress=on_progress)
    shutil.rmtree(checkpoint)
    pack.verify(on_progress)


def _usable(pack: Path) -> bool:
    """Whether the folder opens as a pack; checksums were verified when it was built."""
    from quant.pack import Pack

    if not (pack / "pack.json").is_file():
        return False
    try:
        Pack.open(pack)
    except PackError:
        return False
    return True


def _require_space(root: Path, source: Source, layout: Layout, fmt: str) -> None:
    """DiskSpaceError unless the checkpoint and the pack (at most 2 of its 4 bytes a weight) fit."""
    checkpoint = checkpoint_nbytes(source.shape, layout)
    needed = checkpoint + (checkpoint // 2 if fmt == "bf16" else checkpoint // 3)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise DiskSpaceError(
            f"building the demo pack needs {needed / 1e9:.1f} GB in {root},"
            f" {free / 1e9:.1f} are free",
            hint="Free some space (two thirds of it is needed only while building),"
            " or set MIMO_HOME to a folder on a larger disk.",
        )


@contextmanager
def _locked(path: Path, on_progress: OnProgress) -> Iterator[None]:
    """Hold an exclusive lock on `path`; waits for another process, without deafening Ctrl-C."""
    with path.open("a+b") as file:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if on_progress is not None:
                    waited = int(time.monotonic() - began)
                    on_progress(Progress("waiting for another build", waited, 0, unit="seconds"))
                time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
