"""llama-cpp-python in a virtual environment of its own, built from source with clang.

Fetched with pip, never a dependency of this project. From source because the wheels are built for
old CPUs; with clang because llama.cpp's AMX path built by gcc 12 dies of an illegal instruction.
Called by bench/vs_llamacpp.py; knows nothing of what is measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mimo_local.errors import DownloadError, MimoError

TOOLS = ("clang", "clang++", "cmake", "ninja")
CMAKE_ARGS = (
    "-G Ninja",
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
ISAS = {"native": ("-DGGML_NATIVE=ON",), "avx2": ("-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF")}
"""Flags of what the build may use: all this CPU has, or AVX2, FMA, F16C and BMI2."""
SOURCE = "llama-cpp-python"
VERSION = "0.3.36"
"""Pinned: results name it, and the mimo2 architecture and the C functions used are known in it."""
Say = Callable[[str], None]


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def usable(venv: Path) -> bool:
    """Whether `venv` holds a llama.cpp that loads."""
    python = python_of(venv)
    if not python.is_file():
        return False
    check = [str(python), "-c", "import llama_cpp, gguf"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def ensure(venv: Path, *, jobs: int, say: Say, isa: str = "native") -> Path:
    """The Python that has llama.cpp, built first if `venv` has none; MimoError, DownloadError."""
    if usable(venv):
        return python_of(venv)
    require_tools()
    say(f"building llama.cpp into {venv}: 7 minutes on two cores, once")
    start = time.monotonic()
    venv.parent.mkdir(parents=True, exist_ok=True)
    log = venv.with_name(venv.name + ".log")
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(venv)], log)
    with tempfile.TemporaryDirectory(prefix="llamacpp-", dir=venv.parent) as scratch:
        source = fetch(python_of(venv), Path(scratch), log)
        say(f"{source.name}: compiling with {jobs} jobs, output in {log}")
        command = [str(python_of(venv)), "-m", "pip", "install", "-v", str(source), "gguf"]
        _run(command, log, {**os.environ, **build_environment(jobs, isa)})
    if not usable(venv):
        raise MimoError(f"the llama.cpp built in {venv} does not load", hint=f"see {log}")
    say(f"built in {time.monotonic() - start:.0f} s")
    return python_of(venv)


def require_tools(which: Callable[[str], str | None] = shutil.which) -> None:
    """MimoError unless compiler and build tools are there."""
    missing = [tool for tool in TOOLS if which(tool) is None]
    if missing:
        raise MimoError(
            f"building llama.cpp needs {', '.join(missing)}",
            hint="install them, on Debian or Ubuntu: `apt install clang cmake ninja-build`",
        )


def build_environment(jobs: int, isa: str = "native") -> dict[str, str]:
    """What pip's build reads."""
    return {
        "CC": "clang",
        "CXX": "clang++",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "CMAKE_ARGS": " ".join((*CMAKE_ARGS, *ISAS[isa])),
    }


def fetch(python: Path, scratch: Path, log: Path) -> Path:
    """The sources, unpacked below `scratch` and made fit to build."""
    command = [str(python), "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-binary", SOURCE, "--dest", str(scratch), f"{SOURCE}=={VERSION}"]
    try:
        _run(command, log)
        archive = next(scratch.glob("*.tar.gz"))
    except (MimoError, StopIteration) as error:
        raise DownloadError(
            f"{SOURCE} {VERSION} cannot be fetched: {error}",
            hint=f"go online and try again; see {log}",
        ) from error
    with tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
    source = next(path for path in scratch.iterdir() if path.is_dir())
    prepare(source)
    return source


def prepare(source: Path) -> None:
    """Take git's links out and make every file new: else ninja configures again for ever."""
    for link in sorted(source.rglob(".git")):
        if link.is_dir():
            shutil.rmtree(link)
        else:
            link.unlink()
    now = time.time()
    for path in source.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (now, now))


def _run(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
    """One command at low priority, its output appended to `log`; MimoError if it fails."""
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    with log.open("ab") as out:
        done = subprocess.run([*nice, *command], stdout=out, stderr=out, env=env, check=False)
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line.strip() for line in lines if "rror" in line][-1:] or lines[-1:]
        raise MimoError(
            f"`{' '.join(command[:4])} ...` failed: {' '.join(told)[:200]}",
            hint=f"its whole output is in {log}",
        )
