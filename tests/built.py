"""Small C++ libraries against this torch, compiled once for all test sessions on a machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from together import one_at_a_time

COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def built(name: str, source: str, *libraries: str) -> Path:
    """The shared library of `source`, linked with `libraries` of torch; kept by torch's version."""
    assert COMPILER is not None, "no C++ compiler"
    root = Path(torch.__file__).parent
    key = hashlib.sha256(source.encode() + torch.__version__.encode()).hexdigest()[:16]
    base = Path(os.environ.get("MIMO_TEST_CACHE", tempfile.gettempdir()))
    folder = base / f"mimo-sim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{name}-{key}.so"
    with one_at_a_time(folder / "lock"):
        if not target.exists():
            code = target.with_suffix(f".{os.getpid()}.cpp")
            part = code.with_suffix(".so")
            code.write_text(source)
            command = [COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC"]
            command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
            command += [str(code), f"-L{root / 'lib'}", *(f"-l{lib}" for lib in libraries)]
            subprocess.run([*command, "-o", str(part)], check=True, capture_output=True, text=True)
            part.replace(target)
            code.unlink()
    return target
