"""quality.json, the quality report of a pack: what it says, how it is kept, what is out of range.

Knows figures and where the usual ranges end, and why; measures nothing (`measure` does, and
`mimo_local.fidelity`). A report of another pack or a damaged one counts as none. Called by
`convert`, `mimo_local.fidelity` and the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, cast, get_args

from quant.formats import FORMATS
from quant.inventory import Role
from quant.measure import Loss
from quant.pack import Pack
from quant.writer import PackWriter, Record

FILE = "quality.json"
VERSION = 1

USUAL_LOSS = {"nf4": 0.12, "mxfp4": 0.14, "int8": 0.045, "bf16": 0.002, "f32": 1e-6}
"""Relative RMS error up to which a matrix is like others. Random 512 x 4096 matrices lose at nf4,
mxfp4, int8: Gaussian 0.085, 0.112, 0.009; Laplace 0.097, 0.123, 0.014; Student's t with 3 degrees
of freedom, heavier tails than trained weights have, 0.118, 0.137, 0.042. More means outliers that
the format's scales cannot serve, or damage."""

CALIBRATED_LOSS = 0.25
"""The same of calibrated nf4 experts: columns that matter less are left worse on purpose. The heavy
tails above 0.169, the demo's experts up to 0.163; what it wins shows when texts are read."""

USUAL_KL = {8: 0.02, 4: 0.25}
USUAL_TOP1 = {8: 0.90, 4: 0.70}
USUAL_CHANGE = {8: 0.01, 4: 0.20}
"""By the fewest bits of a pack's matrices: nats a token from the source, share of tokens whose
likeliest successor stays, relative rise of perplexity. Just beyond the demo model on the shipped
texts: KL 0.012, 92.7 % and +0.3 % at 8 bits, 0.194, 74.5 % and +14.2 % at 4. Small models feel
rounding most, and its weights were on another 4-bit grid before: a large one that is worse is
damaged, or not what it claims to be."""
USUAL_PERPLEXITY = 200.0
"""A trained model reads the shipped texts far below; random weights near the vocabulary's size."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A pack on one text; all but the first two are None where there was no source beside it."""

    positions: int
    """Tokens that were predicted."""
    perplexity: float
    source_perplexity: float | None = None
    change: float | None = None
    """Of the perplexity, relative."""
    change_error: float | None = None
    """One standard error of it, of the paired differences."""
    kl: float | None = None
    """Mean Kullback-Leibler divergence from the source's distribution, nats."""
    kl_99: float | None = None
    """What 99 of 100 tokens stay below."""
    top1: float | None = None
    """Share of positions where both find the same token likeliest."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading the texts gave."""

    kernels: str
    source: str | None
    """"checkpoint" or "pack"; None if the pack was read alone."""
    texts: dict[str, Figures]
    """By name of the text; `all` is all of them."""
    drift: list[float]
    """Per layer: relative RMS difference of the hidden states behind it."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about a pack's quality."""

    losses: list[Loss]
    reading: Reading | None = None
    method: str = ""
    """How 4-bit codes were chosen, if not weight by weight."""

    def usual(self, role: str, fmt: str) -> float:
        """The relative error up to which a matrix is like others."""
        calibrated = self.method and role == "experts" and fmt == "nf4"
        return CALIBRATED_LOSS if calibrated else USUAL_LOSS[fmt]


def method_of(manifest: Mapping[str, Any]) -> str:
    """In words, of a pack's manifest."""
    heard = manifest.get("calibration")
    if not isinstance(heard, Mapping):
        return ""
    how = {"feedback": "error feedback", "columns": "importance of columns"}
    tokens = heard.get("tokens")
    return f"nf4 by {how.get(str(heard.get('method')), 'calibration')}, from {tokens} tokens"


def losses_to_json(losses: Iterable[Loss]) -> list[dict[str, Any]]:
    """Plain data, for the journal and the report."""
    return [asdict(loss) for loss in losses]


def write_conversion(writer: PackWriter, head: Mapping[str, Any], records: list[Record]) -> None:
    """The report of a conversion, before pack.json is written, which does not list it."""
    losses = []
    for record in records:
        with suppress(ValueError, KeyError, TypeError):  # a journal's oddity must not cost a pack
            losses += [loss_of(loss) for loss in record.get("losses", ())]
    writer.blob(FILE, _text(head, Report(losses, method=method_of(head))))


def write(pack: Pack, report: Report) -> None:
    """Put a report in the pack's folder, whole or not at all. DiskSpaceError, PackError."""
    PackWriter(pack.path).blob(FILE, _text(pack.manifest, report))


def read(pack: Pack) -> Report | None:
    """The report in the pack's folder; None if there is none, or it is damaged or another's."""
    try:
        data = json.loads((pack.path / FILE).read_text(encoding="utf-8"))
        if data["version"] != VERSION or data["pack"] != _identity(pack.manifest):
            return None
        reading = data.get("reading")
        return Report(
            [loss_of(loss) for loss in data["losses"]],
            None if reading is None else reading_of(reading),
            method_of(pack.manifest),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def to_json(report: Report) -> dict[str, Any]:
    """Plain data, the warnings among it."""
    reading = None if report.reading is None else asdict(report.reading)
    return {
        "losses": losses_to_json(report.losses),
        "reading": reading,
        "method": report.method,
        "warnings": warnings(report),
    }


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a pack from others: known before it is finished, the same after copying it."""
    return {
        "fingerprint": manifest["source"]["fingerprint"],
        "recipe": manifest["recipe"],
        "quantizer": manifest["quantizer"],
    } | ({"calibration": manifest["calibration"]} if "calibration" in manifest else {})


def _text(manifest: Mapping[str, Any], report: Report) -> bytes:
    data = {"version": VERSION, "pack": _identity(manifest), **to_json(report)}
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


# ---- from JSON of unknown origin; ValueError, KeyError or TypeError if it is none ---------------


def loss_of(data: Mapping[str, Any]) -> Loss:
    """A loss out of a journal or a report."""
    role, fmt = _word(data["role"]), _word(data["format"])
    if role not in get_args(Role) or fmt not in FORMATS:
        raise ValueError("no such role or format")
    return Loss(
        _word(data["name"]), cast(Role, role), fmt, int(_number(data["matrices"])),
        _number(data["rms"]), _number(data["worst"]), _word(data["worst_name"]),
    )  # fmt: skip


def reading_of(data: Mapping[str, Any]) -> Reading:
    """A reading out of a report."""
    source = data["source"]
    return Reading(
        _word(data["kernels"]),
        None if source is None else _word(source),
        {_word(name): _figures(value) for name, value in data["texts"].items()},
        [_number(value) for value in data["drift"]],
    )


def _figures(data: Mapping[str, Any]) -> Figures:
    values = {f.name: data[f.name] for f in fields(Figures)}
    values = {name: None if value is None else _number(value) for name, value in values.items()}
    return Figures(**{**values, "positions": int(_number(values["positions"]))})


def _word(value: object) -> str:
    """Text that goes to a terminal: no control characters."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is no name")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


# ---- what is out of the usual range --------------------------------------------------------------


def warnings(report: Report) -> list[str]:
    """What a person should look at, worst first within its kind; empty if all is as usual."""
    return [*_about_weights(report), *_about_reading(report)]


def fewest_bits(report: Report) -> int:
    """4 or 8: the ranges that apply; formats of more bits are held to those of 8."""
    formats = {loss.format for loss in report.losses}
    return 4 if formats & {"nf4", "mxfp4"} else 8


def _about_weights(report: Report) -> list[str]:
    out = []
    high = [loss for loss in report.losses if loss.worst > report.usual(loss.role, loss.format)]
    for fmt in sorted({loss.format for loss in high}):
        mine = sorted((loss for loss in high if loss.format == fmt), key=lambda loss: -loss.worst)
        more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
        roles = ", ".join(sorted({loss.role for loss in mine}))
        usual = report.usual(mine[0].role, fmt)
        out.append(
            f"{mine[0].worst_name}{more} lost {mine[0].worst:.3f} at {fmt}, usual is up to "
            f"{usual:g}: outliers; a wider format for {roles} would keep them"
        )
    return out


def _about_reading(report: Report) -> list[str]:
    reading, bits = report.reading, fewest_bits(report)
    if reading is None:
        return []
    found, usual = reading.texts["all"], f"usual at {bits} bits:"
    exact = found.perplexity if found.source_perplexity is None else found.source_perplexity
    out = []
    if reading.source == "another checkpoint":
        out.append("the source is not the checkpoint this pack was made of")
    if exact > USUAL_PERPLEXITY:
        whose = "pack" if found.source_perplexity is None else "source"
        out.append(
            f"the {whose} itself reads the texts at a perplexity of {exact:.3g}, a trained model "
            f"below {USUAL_PERPLEXITY:g}: wrong tokenizer, damaged or random weights"
        )
    if found.kl is not None and found.kl > USUAL_KL[bits]:
        out.append(f"KL {found.kl:.3g} nats a token; {usual} up to {USUAL_KL[bits]:g}")
    if found.top1 is not None and found.top1 < USUAL_TOP1[bits]:
        out.append(f"top-1 agreement {found.top1:.1%}; {usual} {USUAL_TOP1[bits]:.0%} or more")
    sure = -math.inf if found.change is None else found.change - 2 * (found.change_error or 0)
    if found.change is not None and sure > USUAL_CHANGE[bits]:
        out.append(f"perplexity {found.change:+.1%}; {usual} {USUAL_CHANGE[bits]:+.0%} or less")
    return out
