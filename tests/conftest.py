"""Shared fixtures: a user folder per test, golden texts, the demo model built once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from demo_fixtures import (  # noqa: F401  (fixtures)
    demo_cache,
    demo_checkpoint,
    demo_downloads,
    demo_pack_dir,
    demo_source,
)
from together import SHARED, clear_away, new_folder

sys.path.append(str(Path(__file__).parent / "server"))  # its helpers, for bench scripts' tests too
GOLDEN = Path(__file__).parent / "golden"
LONG = (
    *("test_kernels.py", "test_sim_device.py", "test_demo_model.py"),
    "test_end_to_end.py",
    *("test_demo_server.py", "test_pull.py", "test_drafting.py", "test_demo.py", "test_convert.py"),
    *("test_killed.py", "test_pull_killed.py", "test_soak.py", "test_clients.py"),
)
"""With several workers these files are begun first, so that none of them is left for the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden files instead of comparing"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the one process, or the one that starts the workers
        clear_away()
        os.environ[SHARED] = new_folder()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {name: i for i, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def user_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Point config, data and cache of the tool at an empty folder; no test sees the user's."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MIMO_HOME", str(home))
    for name in ("MIMO_MODEL", "MIMO_ISA", "MIMO_THREADS", "MIMO_KERNELS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    yield home


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Once with the library, once with the torch way through every layer; one thread for both."""
    import torch  # not for tests that need none

    from mimo_local import kernels

    if request.param == "torch":
        monkeypatch.setattr(kernels, "get", lambda: None)
    elif kernels.get() is None:
        pytest.skip("without the native kernels there is only the torch way")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares with tests/golden/<name>; `--update-golden` writes it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} is missing: run `pytest --update-golden` and read the diff"
        assert text == path.read_text(encoding="utf-8")

    return check
