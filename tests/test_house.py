"""The house rules as tests: sizes, hints, the file map, what a fresh interpreter may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimo_local import errors

ROOT = Path(__file__).parent.parent
PACKAGES = ("mimo_local", "quant", "tui")

# A file past 400 lines or a function past 60 wants a reason, here.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def sources(*suffixes: str) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def test_no_file_outgrows_its_room() -> None:
    too_long = {
        str(path.relative_to(ROOT)): n
        for path in sources(".py", ".cpp", ".h")
        if (n := len(path.read_text().splitlines())) > 400
    }
    assert set(too_long) == set(LONG_FILES), too_long


def test_no_function_outgrows_a_screen() -> None:
    too_long = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    too_long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert set(too_long) == set(LONG_FUNCTIONS), too_long


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_error_has_an_exit_code_and_a_place_in_the_docstring() -> None:
    for cls in subclasses(errors.MimoError):
        if cls.__module__ == errors.__name__:
            assert isinstance(cls.exit_code, errors.ExitCode)  # type: ignore[attr-defined]
            assert cls.__name__ in (errors.__doc__ or ""), cls


def test_every_raise_of_ours_carries_a_hint() -> None:
    ours = {c.__name__ for c in subclasses(errors.MimoError)} | {"MimoError"}
    missing = []
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            func = node.exc.func
            name = (
                func.id
                if isinstance(func, ast.Name)
                else func.attr
                if isinstance(func, ast.Attribute)
                else ""
            )
            if name in ours and not any(k.arg in ("hint", None) for k in node.exc.keywords):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not missing


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(".py")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_the_readme_maps_exactly_the_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- map -->\n```\n(.*?)```\n<!-- /map -->", readme, re.S)
    assert block, "README.md has no file map between <!-- map --> markers"
    folder, mapped = "", set()
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        name = line.strip().split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            if not folder:
                mapped.add(name)
        else:
            mapped.add(folder + name)
    actual = {
        str(path.relative_to(ROOT))
        for path in sources(".py", ".cpp", ".h", ".tcss")
        if path.name != "__init__.py" or path.parent == ROOT / "mimo_local/kernels"
    }
    actual |= {str(p.relative_to(ROOT)) for p in (ROOT / "bench").glob("*.py")}
    assert mapped == actual, {"missing": sorted(actual - mapped), "stale": sorted(mapped - actual)}


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("from mimo_local.cli import main; main(['--help'])", "torch textual starlette numpy"),
        ("import mimo_local", "torch numpy textual typer"),
        ("import mimo_local.settings, mimo_local.chat, mimo_local.events", "torch numpy textual"),
        ("import mimo_local.documents, mimo_local.hardware", "torch numpy textual"),
        ("import tui.app", "torch numpy"),
        ("import mimo_local.cli.serve", "torch numpy starlette uvicorn pydantic llguidance"),
        ("import mimo_local.server.app, mimo_local.grammar", "torch numpy llguidance"),
        ("import mimo_local.kernels", "torch numpy"),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_it_must(statement: str, banned: str) -> None:
    code = (
        "import sys\n"
        f"try:\n    exec({statement!r})\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', sorted(set({banned.split()!r}) & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().endswith("LOADED []"), out.stdout[-200:]


def test_nothing_tracked_names_a_path_of_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.-])/(root|home/[a-z]+)/", "--", "."],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if listed.returncode == 128:
        pytest.skip("not a git checkout")
    hits = [h for h in listed.stdout.splitlines() if not h.startswith("tests/test_house.py")]
    assert not hits
