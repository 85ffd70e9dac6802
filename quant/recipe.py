"""What is stored how: a format's name for each role a tensor can have.

Pure names, without torch: planning for a model that was not downloaded yet starts here. Called by
`jobs` and `convert` (making packs), `mimo_local.sizes` and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mimo_local.errors import UsageError
from quant.inventory import Role

FORMAT_NAMES = ("nf4", "mxfp4", "int8", "bf16", "f32")
"""The keys of `formats.FORMATS`."""

WIDE = "int8"
"""What the experts of `Recipe.wide` layers are stored in."""


def usual(config: Mapping[str, Any]) -> str:
    """The format a checkpoint is packed in if nobody names one: experts of 4 bits stay as they are.

    V2.6 says in its config.json that its experts are stored as MXFP4.
    """
    quantization = config.get("quantization_config")
    native = isinstance(quantization, Mapping) and quantization.get("store_dtype") == "mxfp4"
    return "mxfp4" if native else "nf4"


_EXACT = {"BF16": "bf16", "F32": "f32"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Format name per role; norms, router, sinks and biases are always exact."""

    experts: str = "nf4"
    attention: str = "int8"
    dense: str = "int8"
    embedding: str = "int8"
    head: str = "int8"
    mtp: str = "int8"
    search: bool = True
    bits: float | None = None
    """Most bits a weight on average, which decided `wide`."""
    wide: tuple[int, ...] = ()
    """Layers whose experts are stored at int8 instead."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("search", "bits", "wide") and value not in FORMAT_NAMES:
                raise UsageError(
                    f"unknown format {value!r} for {f.name}",
                    hint=f"choose one of {', '.join(FORMAT_NAMES)}",
                )

    @classmethod
    def for_format(cls, name: str) -> Recipe:
        """nf4, mxfp4: experts at 4 bit, the rest at 8; others: every matrix in that format."""
        if name in ("nf4", "mxfp4"):
            return cls(experts=name)
        return cls.uniform(name)

    @classmethod
    def uniform(cls, name: str) -> Recipe:
        """Every matrix in one format."""
        return cls(name, name, name, name, name, name)

    def to_json(self) -> dict[str, Any]:
        """Plain data for journal and manifest; without what is not used, as older packs."""
        data = asdict(self) | {"wide": list(self.wide)}
        if self.bits is None:
            del data["bits"], data["wide"]
        return data

    def experts_of(self, layer: int) -> str:
        """The format of a layer's experts."""
        return WIDE if layer in self.wide else self.experts

    def format_of(self, role: Role, stored: str) -> str:
        """The format for a role; `stored` is the dtype in the checkpoint, kept if exact."""
        return _EXACT.get(stored, "f32") if role == "exact" else str(getattr(self, role))
