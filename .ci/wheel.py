"""Is what pip installs whole? A wheel is built as a stranger's pip would, installed and used.

    python .ci/wheel.py build OUT    # OUT: a folder for the wheel and, unpacked, its library
    python .ci/wheel.py use OUT

`build` takes a copy of the tracked files, builds with build isolation and compares: every file of
the packages is in the wheel, and the library, and nothing else. `use` installs it under the
constraints into a new environment that sees the packages of the one this script runs in, but not
its editable install nor this folder, and works with it from elsewhere: every module imported,
`mimo --version`, `--help`, `doctor`, recipes, the window, a tiny checkpoint quantised, verified,
measured and asked. Then once more without a compiler: it must build and install all the same, say
what is missing, and answer. Called by .ci/run and `make wheel`; what is wrong first ends it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
        if not module.name.endswith((".__main__", ".libmimo_kernels")):
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

    def __init__(self, base: Path, wheel: Path) -> None:
        self.folder, self.elsewhere = base / "venv", base / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        call([sys.executable, "-m", "venv", "--without-pip", self.folder])
        self.python = self.folder / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        there, here = (
            call([python, "-c", ask]).strip() for python in (sys.executable, self.python)
        )
        # A folder on the path: its modules are seen, its .pth files (the editable install) are not.
        Path(here, "dependencies.pth").write_text(f"{there}\n", encoding="utf-8")
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MIMO_", "PYTHON"))
        } | {"MIMO_HOME": str(base / "home")}
        # No index: that every dependency is met by what the tests ran with is part of the check.
        call([
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python),
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
    if shutil.which("git"):
        ask = ["git", "-c", "core.quotePath=off", "ls-files"]
        done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout:
            return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    found = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    products = {"__pycache__", "build", "dist", ".venv", ".git"}
    return sorted(str(p) for p in found if not products & {*p.parts} and p.suffix != ".so")


def build(out: Path, env: dict[str, str] | None = None) -> tuple[Path, list[str]]:
    """The wheel, made by pip with build isolation, and the names of the files it was made of."""
    files, pip = tracked(), [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    with tempfile.TemporaryDirectory(prefix="mimo-tree-") as folder:
        for name in files:
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        options = ["--quiet", "--no-deps", "-c", ROOT / "constraints.txt", "-w", out]
        call([*pip, *options, folder], env=env)
    (wheel,) = out.glob("*.whl")
    return wheel, files


def compare(wheel: Path, files: Sequence[str], *, native: bool) -> None:
    """The wheel holds the packages' files, the library if one was built, and nothing else."""
    wanted = {name for name in files if name.split("/")[0] in PACKAGES and "/" in name}
    wanted = {name for name in wanted if not NATIVE_SOURCES.match(name)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    if native:
        wanted.add(LIBRARY)
    assert names == wanted, f"missing {sorted(wanted - names)}, too many {sorted(names - wanted)}"


def use(wheel: Path, scratch: Path) -> Path:
    """Everything a user would, with a model of a few hundred kilobytes: its pack."""
    env = Environment(scratch / "a", wheel)
    version = env.mimo("--version")
    assert re.fullmatch(r"mimo \d+\.\d+\.\d+\S*\n", version), version
    assert "summarize" in env.mimo("--help")
    kernels = env.doctor()["kernels"]
    assert "reference" not in kernels["in use"], kernels
    print(env.run(LOOK, env.folder, ROOT, "native").strip())
    assert "contract" in env.mimo("run", "--list")
    env.run(WINDOW)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # the one thing from the tests
    call([sys.executable, "-c", MAKE_CHECKPOINT, scratch], env=os.environ | {"PYTHONPATH": path})
    pack, checkpoint = scratch / "pack", scratch / "checkpoint"
    env.mimo("quantize", checkpoint, pack, "--yes")
    env.mimo("verify", pack)
    env.mimo("measure", pack, checkpoint, "--json")
    answer = env.mimo("chat", "-m", pack, "--max-tokens", "12", "--seed", "1", "Is anybody there?")
    assert answer.strip(), "no answer"
    return pack


def without_a_compiler(pack: Path, scratch: Path) -> None:
    """It builds, installs, says what is missing and answers."""
    none = os.environ | {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    wheel, files = build(scratch / "bare", none)
    compare(wheel, files, native=False)
    env = Environment(scratch / "b", wheel)
    kernels = env.doctor()["kernels"]
    assert "reference" in kernels["in use"] and "C++ compiler" in kernels["because"], kernels
    env.mimo("chat", "-m", pack, "--max-tokens", "2", "Is anybody there?")


def main() -> None:
    """`build OUT` or `use OUT`."""
    what, out = sys.argv[1], Path(sys.argv[2]).absolute()
    if what == "build":
        wheel, files = build(out)
        compare(wheel, files, native=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(LIBRARY, out)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, whole")
        return
    with tempfile.TemporaryDirectory(prefix="mimo-wheel-") as folder:
        (wheel,) = out.glob("*.whl")
        pack = use(wheel, Path(folder))
        print("installed and used")
        without_a_compiler(pack, Path(folder))
        print("and without a compiler")


if __name__ == "__main__":
    main()
