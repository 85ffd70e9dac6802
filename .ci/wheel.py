"""Is what pip installs whole? A wheel is built as a stranger's pip would, installed and used.

    python .ci/wheel.py VENV

VENV: a virtual environment that has the dependencies (`make wheel` passes the one of `make test`,
where the package itself is installed in place). The wheel is built with build isolation from a copy
of the tracked files, installed under the constraints into a new environment that sees VENV's
packages but not its editable install nor this folder, and used from elsewhere: names of all files,
`mimo --version`, `--help`, `doctor`, recipes, a tiny checkpoint quantised, measured and asked, the
window opened. Then once more without a compiler: it must install all the same and say what is
missing. Prints what it did; the first thing that is wrong ends it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mimo_local", "quant", "tui")
LIBRARY = "mimo_local/kernels/libmimo_kernels.so"
NATIVE_SOURCES = re.compile(r"mimo_local/kernels/(src/|CMakeLists\.txt$)")

# A checkpoint of the demo's kind with small random weights and a real tokenizer.
MAKE_CHECKPOINT = """
import sys
from pathlib import Path
from demo_fixtures import tiny_weights, write_tiny_gguf
from mimo_local.demo.rewrite import TWINS, write_checkpoint
from mimo_local.demo.source import GgufSource
folder = Path(sys.argv[1])
source = GgufSource(write_tiny_gguf(folder / "tiny.gguf", tiny_weights()))
write_checkpoint(source, folder / "checkpoint", TWINS)
"""

# Every module can be imported, none from another place; the library is the wheel's own.
LOOK = """
import importlib, pkgutil, sys
from pathlib import Path
home, root, native = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "native"
assert not [p for p in sys.path if Path(p).resolve().is_relative_to(root)], sys.path
count = 0
for name in ("mimo_local", "quant", "tui"):
    package = importlib.import_module(name)
    found = [name]
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            found.append(module.name)
    for module in map(importlib.import_module, found):
        assert Path(module.__file__).is_relative_to(home), module.__file__
        count += 1
from mimo_local import kernels
loaded = kernels.get()
if native:
    assert loaded is not None, kernels.why_unavailable()
    assert loaded.path.is_relative_to(home), loaded.path
    mapped = {line.split()[-1] for line in open("/proc/self/maps") if "mimo" in line}
    assert mapped == {str(loaded.path)}, mapped
else:
    assert loaded is None
print(count, "modules,", kernels.describe())
"""

# The window with its style sheet, on no terminal; an engine that cannot be opened is told in it.
WINDOW = """
import asyncio
from mimo_local.errors import UsageError
from tui.app import MimoApp

def no_model(on_event):
    raise UsageError("there is no model here", hint="this is a check")

async def look():
    app = MimoApp(no_model)
    async with app.run_test(size=(80, 24)) as pilot:
        while app.chat_screen.state == "loading":
            await pilot.pause(0.02)
        assert app.chat_screen.prompt.region.height > 0
        assert "there is no model here" in app.export_screenshot().replace("&#160;", " ")
    app.close()

asyncio.run(look())
"""


class Environment:
    """A new virtual environment with one wheel in it, used from a folder that holds nothing."""

    def __init__(self, base: Path, dependencies: Path, wheel: Path) -> None:
        self.folder, self.elsewhere = base / "venv", base / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        call([dependencies, "-m", "venv", "--without-pip", self.folder])
        self.python = self.folder / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        there, here = (
            Path(call([python, "-c", ask]).strip()) for python in (dependencies, self.python)
        )
        # A folder on the path: its modules are seen, its .pth files (the editable install) are not.
        (here / "dependencies.pth").write_text(f"{there}\n", encoding="utf-8")
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MIMO_", "PYTHON"))
        } | {"MIMO_HOME": str(base / "home"), "PYTHONWARNINGS": "error::ResourceWarning"}
        # No index: that every dependency is met by what the tests ran with is part of the check.
        call([
            *(dependencies, "-m", "pip", "--disable-pip-version-check", "--python", self.python),
            *("install", "--quiet", "--no-index", "-c", ROOT / "constraints.txt", wheel),
        ])  # fmt: skip

    def mimo(self, *arguments: object) -> str:
        """`mimo ...`, by its script."""
        return call([self.folder / "bin" / "mimo", *arguments], env=self.env, cwd=self.elsewhere)

    def run(self, script: str, *arguments: object) -> str:
        """Python in it."""
        return call([self.python, "-c", script, *arguments], env=self.env, cwd=self.elsewhere)

    def doctor(self) -> dict[str, dict[str, str]]:
        """The sections of `mimo doctor --json`, which must find nothing broken."""
        report = json.loads(self.mimo("doctor", "--json"))
        assert report["ok"], report["problems"]
        sections: dict[str, dict[str, str]] = report["sections"]
        return sections


def call(
    command: Sequence[object], *, env: dict[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Its stdout; ends everything with what it said if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=env, cwd=cwd,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        line = " ".join(str(part) for part in command)
        sys.exit(f"wheel: `{line[:300]}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> list[str]:
    """Files of the project as git knows them; without git, those that are no products."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = call(["git", "-c", "core.quotePath=off", "ls-files"], cwd=ROOT).splitlines()
        return [name for name in names if (ROOT / name).is_file()]
    found = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    products = {"__pycache__", "build", "dist", ".venv", ".git"}
    return sorted(str(p) for p in found if not products & {*p.parts} and p.suffix != ".so")


def build(tree: Path, dependencies: Path, out: Path, env: dict[str, str] | None = None) -> Path:
    """The wheel of a tree, made by pip with build isolation."""
    pip = [dependencies, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    call([*pip, "--no-deps", "-c", ROOT / "constraints.txt", "-w", out, tree], env=env)
    (wheel,) = out.glob("*.whl")
    return wheel


def compare(wheel: Path, files: Sequence[str], *, native: bool) -> None:
    """The wheel holds the packages' files, the library if one was built, and nothing else."""
    wanted = {name for name in files if name.split("/")[0] in PACKAGES and "/" in name}
    wanted = {name for name in wanted if not NATIVE_SOURCES.match(name)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    if native:
        wanted.add(LIBRARY)
    assert names == wanted, f"missing {sorted(wanted - names)}, too many {sorted(names - wanted)}"


def use(env: Environment, dependencies: Path, scratch: Path) -> None:
    """Everything a user would, with a model of a few hundred kilobytes."""
    version = env.mimo("--version")
    assert re.fullmatch(r"mimo \d+\.\d+\.\d+\S*\n", version), version
    assert "summarize" in env.mimo("--help")
    kernels = env.doctor()["kernels"]
    assert "reference" not in kernels["in use"], kernels
    print(env.run(LOOK, env.folder, ROOT, "native").strip())
    assert "contract" in env.mimo("run", "--list")
    env.run(WINDOW)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    call(
        [dependencies, "-c", MAKE_CHECKPOINT, scratch], env=os.environ | {"PYTHONPATH": path}
    )  # the one thing that comes from the tests
    pack, checkpoint = scratch / "pack", scratch / "checkpoint"
    env.mimo("quantize", checkpoint, pack, "--yes")
    env.mimo("verify", pack)
    env.mimo("measure", pack, checkpoint, "--json")
    answer = env.mimo("chat", "-m", pack, "--max-tokens", "12", "--seed", "1", "Is anybody there?")
    assert answer.strip(), "no answer"


def main() -> None:
    """Build, compare, install, use; with the compiler of this machine and without one."""
    dependencies = Path(sys.argv[1]).absolute() / "bin" / "python"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mimo-wheel-") as folder:
        scratch, files = Path(folder), tracked()
        for name in files:
            (scratch / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, scratch / "tree" / name)
        wheel = build(scratch / "tree", dependencies, scratch / "dist")
        compare(wheel, files, native=True)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, whole")
        use(Environment(scratch / "a", dependencies, wheel), dependencies, scratch)
        print(f"installed and used ({time.monotonic() - begun:.0f} s)")
        shutil.rmtree(scratch / "tree" / "build")
        none = os.environ | {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
        bare = build(scratch / "tree", dependencies, scratch / "bare", none)
        compare(bare, files, native=False)
        env = Environment(scratch / "b", dependencies, bare)
        kernels = env.doctor()["kernels"]
        assert "reference" in kernels["in use"] and "C++ compiler" in kernels["because"], kernels
        env.mimo("chat", "-m", scratch / "pack", "--max-tokens", "2", "Is anybody there?")
        print(f"and without a compiler ({time.monotonic() - begun:.0f} s)")


if __name__ == "__main__":
    main()
