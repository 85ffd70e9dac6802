"""The report of a self-test: a Markdown text to attach to an issue, with the same as JSON below.

Nothing in it names its user: no path, no host, no serial number. Called by the CLI.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import itertools
import json
import platform
import re
import time
from pathlib import Path
from typing import Any, Final

import torch

from mimo_local import __version__, gpu_facts, kernels
from mimo_local.gpu_facts import Card
from mimo_local.hardware import Hardware
from mimo_local.kernels import triton_experts
from mimo_local.selftest.run import SelfTest
from mimo_local.selftest.types import Result
from mimo_local.sizes import gb

PACKAGES: Final = ("torch", "bitsandbytes", "triton", "numpy", "accelerate")


def machine(test: SelfTest, facts: Hardware) -> dict[str, str]:
    """What the figures depend on."""
    found = {
        "device": _device(test.device),
        "CPU": f"{facts.cpu}, {facts.cores_physical} cores, kernels: {kernels.describe()}",
        "RAM": gb(facts.ram_total),
        "system": f"{platform.system()} {platform.machine()}"
        + (", WSL" if gpu_facts.around().wsl else ""),
        "Python": platform.python_version(),
        "mimo-local": __version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] += f" (CUDA {torch.version.cuda or 'none'})"
    found["own Triton kernels"] = triton_experts.why_unavailable(test.device) or "in use"
    return found


def _device(device: torch.device) -> str:
    """Name, memory, driver and bus of a CUDA device; else torch's word for it."""
    if device.type != "cuda":
        return device.type
    index = device.index or 0
    major, minor = torch.cuda.get_device_capability(index)
    name, total = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[1]
    said = f"{name}, {gb(total)}, compute capability {major}.{minor}"
    cards = [card for card in gpu_facts.ask_driver().cards if card.name == name]
    return said + (_driver(cards[0]) if cards else "")


def _driver(card: Card) -> str:
    bus = f", PCIe {card.gen_now} x{card.lanes_now}" if card.lanes_now else ""
    return f", driver {card.driver}{bus} of {card.gen_max} x{card.lanes_max}"


def verdict(test: SelfTest) -> str:
    """One line."""
    checks = [result for result in test.results if result.ok is not None]
    failed = sum(result.ok is False for result in checks)
    said = f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks passed"
    return said + (", stopped early" if test.interrupted else "")


def mark(result: Result) -> str:
    """`passed`, `FAILED`, or nothing for a figure."""
    return {True: "passed", False: "FAILED", None: ""}[result.ok]


def screen(test: SelfTest) -> str:
    """The results for a terminal, by area, and the verdict."""
    lines: list[str] = []
    for area, results in itertools.groupby(test.results, key=lambda result: result.area):
        lines.append(area)
        rows = list(results)
        width = max(len(one.name) for one in rows)
        for one in rows:
            bound = f" ({one.bound})" if one.ok is False and one.bound else ""
            lines.append(f"  {mark(one):<6}  {one.name:<{width}}  {one.found}{bound}")
    return "\n".join([*lines, "", verdict(test)])


def document(test: SelfTest, about: dict[str, str]) -> dict[str, Any]:
    """Plain data: what the report says."""
    return {
        "verdict": verdict(test),
        "ok": test.ok,
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {key: scrubbed(value) for key, value in about.items()},
        "results": [
            {**result._asdict(), "found": scrubbed(result.found)} for result in test.results
        ],
    }


def markdown(data: dict[str, Any]) -> str:
    """The report."""
    lines = [f"# GPU self-test: {data['verdict']}", "", f"mimo-local, {data['when']}", ""]
    lines += ["| machine | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in data["machine"].items()]
    lines += ["", "| what | | result | found | asked for |", "| --- | --- | --- | --- | --- |"]
    for row in data["results"]:
        result = Result(**row)
        cells = (result.area, result.name, mark(result), result.found, result.bound)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, "", "```json", json.dumps(data, ensure_ascii=False), "```", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def scrubbed(text: str) -> str:
    """Without the user's name and without folders: errors of libraries quote paths."""
    text = text.replace(str(Path.home()), "~")
    # What is left of a path is its last part, which says which file it was.
    text = re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\":,]+)+[\\/]([^\\/\s'\":,]+)", r".../\1", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = ""
    if len(user) > 2 and user != "root":
        text = re.sub(rf"\b{re.escape(user)}\b", "user", text)
    return "".join(c for c in text if c.isprintable())
