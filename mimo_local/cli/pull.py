"""`mimo pull`: from the hub to a pack that `mimo chat` finds, in one command.

Plans first and asks; progress goes to stderr and the pack's path to stdout, or with --json one
line per event to stdout. All work is `mimo_local.pull`'s.
"""

from __future__ import annotations

import json as jsonlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli import packs
from mimo_local.cli.status import Status, amount, duration, say
from mimo_local.errors import CancelledError, ExitCode, MimoError, UsageError
from mimo_local.events import Progress
from mimo_local.settings import Paths, parse_size

if TYPE_CHECKING:
    from mimo_local.plan import Plan
    from mimo_local.pull.run import Options, Pull

REPO = "XiaomiMiMo/MiMo-V2-Flash"
FORMATS = ("nf4", "mxfp4")  # what `--format` may mean if it is left out
LINE_S = 1.0  # between two lines of progress in --json

Repo = Annotated[str, typer.Argument(help="repository on the hub, as owner/name", metavar="REPO")]
To = Annotated[
    Path | None,
    typer.Option(
        "--to", help="name of the pack, or a folder; left out: after the repository", metavar="DST"
    ),
]
Keep = Annotated[
    bool, typer.Option("--keep-source", help="keep the fetched checkpoint beside the pack")
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="branch, tag or commit", metavar="REV")
]
Connections = Annotated[
    int, typer.Option("--connections", help="at the same time", min=1, max=64, metavar="N")
]
RateLimit = Annotated[
    str | None,
    typer.Option("--rate-limit", help="most bytes a second, like 20MB", metavar="SIZE"),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="use what is here, or say what is missing")
]
Restart = Annotated[bool, typer.Option("--restart", help="drop an unfinished pull and begin anew")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be done")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document per line")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="do not ask")]


def pull(
    repo: Repo = REPO,
    format: packs.Format = None,  # noqa: A002 - the option's name
    to: To = None,
    keep_source: Keep = False,
    revision: Revision = None,
    connections: Connections = 8,
    rate_limit: RateLimit = None,
    no_search: packs.NoSearch = False,
    offline: Offline = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Fetch a model from the hub and make a pack of it, layer by layer.

    Run the same command again to go on after any interruption. Only a few GB of the checkpoint are
    on the disk at a time. HF_TOKEN, HF_ENDPOINT and HTTPS_PROXY are respected.
    """
    from mimo_local.pull.hub import check_repo
    from mimo_local.pull.run import Options, usual_format
    from quant.recipe import Recipe

    check_repo(repo)
    offline = offline or _hub_is_offline()
    places = {f: packs.folder_for(to or Path(f"{repo.rpartition('/')[2]}-{f}")) for f in FORMATS}
    tell = _Teller(json)
    try:
        chosen = format or usual_format(repo, revision, list(places.values()), offline=offline)
        recipe = replace(Recipe.for_format(chosen), search=not no_search)
        target = packs.folder_for(to or Path(f"{repo.rpartition('/')[2]}-{chosen}"))
        options = Options(
            repo, recipe, revision, keep=keep_source, connections=connections,
            rate=_rate(rate_limit), offline=offline, restart=restart,
        )  # fmt: skip
        return _pull(options, target.absolute(), tell, dry_run=dry_run, yes=yes)
    except MimoError as error:
        tell("error", message=error.message, hint=error.hint)
        raise


def _pull(options: Options, target: Path, tell: _Teller, *, dry_run: bool, yes: bool) -> int:
    from mimo_local.pull.run import Pull, already_there

    there = already_there(target, options.recipe)
    if there is not None:
        say(f"the pack is already there: {amount(there.nbytes, 'bytes')}")
        _finished(target, there.nbytes, tell)
        return ExitCode.OK
    with _stoppable():
        with tell.status() as status:
            found = Pull.prepare(
                options, target, dry=dry_run, on_progress=status, on_wait=tell.note
            )
        try:
            try:
                _agreed(found, tell, dry_run=dry_run, yes=yes)
            except BaseException:
                found.discard()
                raise
            if dry_run:
                return ExitCode.OK
            with tell.status() as status:

                def shown(event: Progress) -> None:
                    _notes(found, tell)
                    status(event)

                pack = found.run(shown)
        finally:
            found.close()
    packs.layout_of(pack)
    if not tell.json:
        packs.report_on(pack, None)
    _finished(target, pack.nbytes, tell)
    return ExitCode.OK


def _agreed(found: Pull, tell: _Teller, *, dry_run: bool, yes: bool) -> None:
    """Show the plan; raises where there is no room, or nobody who wants it."""
    _notes(found, tell)
    figures = _figures(found)
    fit = _fit(found)
    tell("plan", **figures, fits=fit.fits)
    if not tell.json:
        text = _text(found, figures, fit)
        print(text) if dry_run else say(text)
    found.check_space()
    if not dry_run and not yes:
        _ask(fit)


def _ask(fit: Plan) -> None:
    """Go on only if somebody says so; what will not run here is not the default."""
    if not sys.stdin.isatty():
        raise UsageError("there is nobody to ask whether to go on", hint="say it with `--yes`")
    question = "go on?" if fit.fits else "it will not run on this machine: go on all the same?"
    typer.confirm(question, default=fit.fits, abort=True, err=True)


def _figures(found: Pull) -> dict[str, Any]:
    """Sizes and estimates, as plain data."""
    from mimo_local.pull.order import seconds

    need, free = found.space
    to_fetch, weights = found.to_fetch, found.weights_left
    rate = found.measured_rate() if to_fetch else math.inf
    config = found.remote.checkpoint.config
    convert_rate = packs.quantize_rate(found.options.recipe, config)
    sizes = {file.name: found.staging.missing(file) for file in found.remote.shards}
    took = seconds(found.order, sizes, rate, convert_rate) if rate else math.inf
    snapshot = found.remote.snapshot
    return {
        "repo": snapshot.repo,
        "commit": snapshot.commit,
        "pack": str(found.target),
        "source_bytes": found.remote.nbytes,
        "files": len(found.remote.shards),
        "skipped_tensors": len(found.remote.checkpoint.skipped()),
        "pack_bytes": found.pack_bytes,
        "fetch_bytes": to_fetch,
        "source_room": found.source_room,
        "disk_needed": need,
        "disk_free": free,
        "fetch_rate": None if math.isinf(rate) else round(rate),
        "fetch_s": _known(to_fetch / rate if rate else math.inf),
        "convert_s": _known(weights / convert_rate),
        "total_s": _known(took),
        "resumed": found.resumed,
    }


def _fit(found: Pull) -> Plan:
    """What `mimo plan` says about the pack on this machine."""
    from mimo_local.cli.plan import this_machine
    from mimo_local.config import ModelConfig
    from mimo_local.plan import plan
    from mimo_local.pull.remote import exact_sizes

    budget = replace(this_machine(measure=False), pack_present=True)  # its room: `check_space`
    config = ModelConfig.from_dict(found.remote.checkpoint.config)
    return plan(config, exact_sizes(found.remote, found.options.recipe), budget)


def _text(found: Pull, figures: dict[str, Any], fit: Plan) -> str:
    from mimo_local.cli import plan_text
    from quant.jobs import checkpoint_notes

    def gb(key: str) -> str:
        return amount(figures[key], "bytes")

    def time_of(key: str) -> str:
        return "" if figures[key] is None else f", about {duration(figures[key])}"

    rate = figures["fetch_rate"]
    how = "at most, as you said" if found.options.rate else "measured now"
    at = f" at {amount(rate, 'bytes')}/s {how}" if rate else ""
    kept = "all of the source" if found.options.keep else f"{gb('source_room')} of source at a time"
    lines = [
        f"{figures['repo']} at {figures['commit'][:12]}: {gb('source_bytes')} in "
        f"{figures['files']} files -> {gb('pack_bytes')} in {figures['pack']}",
        f"  fetch    {gb('fetch_bytes')}{time_of('fetch_s')}{at}",
        f"  convert  {_weights(found)}{time_of('convert_s')}; in all{time_of('total_s')[1:]}"
        " (estimated)",
        f"  disk     {gb('disk_needed')} more (pack and {kept}), {gb('disk_free')} free",
    ]
    lines += [f"  note     {note}" for note in checkpoint_notes(found.remote.checkpoint)]
    name = f"{figures['repo'].rpartition('/')[2]}, as this pack"
    lines += ["", plan_text.plan(fit, name)]
    lines += [f"{p.message}; {p.hint}" for p in fit.problems]
    return "\n".join(lines)


def _weights(found: Pull) -> str:
    """`309 G weights`."""
    n = found.weights_left
    return f"{n / 1e9:.0f} G weights" if n > 9.5e9 else f"{n / 1e6:.1f} M weights"


def _notes(found: Pull, tell: _Teller) -> None:
    while found.notes:
        tell.note(found.notes.pop(0))


def _finished(target: Path, nbytes: int, tell: _Teller) -> None:
    tell("done", pack=str(target), bytes=nbytes)
    named = target.parent == Paths.default().packs_dir.absolute()
    say(f"{amount(nbytes, 'bytes')} in the pack; try it: "
        f"mimo chat -m {target.name if named else target}")  # fmt: skip
    if not tell.json:
        print(target)


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise CancelledError(
            "the pull was stopped; what was fetched and converted is kept",
            hint="run the same command again: it goes on from there",
        ) from None


@dataclass
class _Teller:
    """Lines of JSON on stdout if they were asked for; the status line on stderr if not."""

    json: bool
    _line: Status | None = None
    _told: float = float("-inf")

    def __call__(self, event: str, **facts: Any) -> None:
        if self.json:
            print(jsonlib.dumps({"event": event, **facts}), flush=True)

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        self("note", text=text)
        if self._line:
            self._line.clear()
        say(text)

    @contextmanager
    def status(self) -> Iterator[Callable[[Progress], None]]:
        """A callback for progress, taken away afterwards."""
        if self.json:
            yield self._progress
            return
        self._line = Status()
        try:
            yield self._line
        finally:
            self._line.clear()

    def _progress(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._told >= LINE_S or event.done >= event.total:
            self._told = now
            eta = None if event.eta_s is None else round(event.eta_s, 1)
            self("progress", stage=event.stage, done=event.done, total=event.total,
                 unit=event.unit, eta_s=eta)  # fmt: skip


def _known(seconds: float) -> float | None:
    return round(seconds, 1) if math.isfinite(seconds) else None


def _rate(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        found = parse_size(text.removesuffix("/s"))
    except ValueError:
        found = 0
    if found <= 0:
        raise UsageError(f"`{text}` is not a rate", hint="write bytes a second, like 20MB")
    return float(found)


def _hub_is_offline() -> bool:
    """The hub's own variable for the same wish."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
