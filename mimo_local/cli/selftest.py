"""`mimo bench --gpu-selftest`: its table and its report file.

What is tested is `selftest`'s; here it becomes text. Called by `machine.bench`.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError

SelfTestFlag = Annotated[
    bool,
    typer.Option("--gpu-selftest", help="compare the GPU with the CPU, and write a report"),
]
Report = Annotated[
    Path,
    typer.Option("--report", help="where --gpu-selftest writes", metavar="FILE", dir_okay=False),
]
Device = Annotated[str, typer.Option("--device", hidden=True, help="torch's name of the device")]
REPORT = Path("mimo-gpu-selftest.md")


def run(report: Path, device: str) -> int:
    """Test, print the table and one line of JSON, write the report."""
    from mimo_local import hardware
    from mimo_local.selftest import document
    from mimo_local.selftest.run import SelfTest, device_of, sizes_for

    there = device_of(device)
    _check_writable(report)
    status = Status()
    test = SelfTest(there, sizes_for(there), on_progress=status)
    try:
        test.run()
    finally:
        status.clear()
    data = document.document(test, document.machine(test, hardware.detect()))
    print(document.screen(test))
    try:
        report.write_text(document.markdown(data), encoding="utf-8")
    except OSError as error:
        say(f"the report could not be written to {report}: {error.strerror}")
    else:
        say(f"the report is in {report}: it holds no names and no paths, look and attach it")
    print(jsonlib.dumps(data, ensure_ascii=False))
    if test.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.OK if test.ok else ExitCode.FAILED


def _check_writable(report: Path) -> None:
    """Before minutes of measuring; UsageError."""
    if report.is_dir() or not report.absolute().parent.is_dir():
        raise UsageError(
            f"the report cannot be written to {report}",
            hint="give --report a file in a folder that exists",
        )
