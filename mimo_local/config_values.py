"""Typed, range-checked access to the keys of one parsed config.json; errors name the key.

Knows numbers, flags and lists, nothing about any model. Called by `config`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mimo_local.errors import ConfigError

# The real models stay below 2^21 in every number; more than this is a damaged or hostile file.
_ABSURD = 2**24
_MAX_CONFIG_BYTES = 16 << 20
_HINT = "compare the file with the model's original config.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ConfigError with the file's name and the reason."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"`{path}` is {path.stat().st_size} bytes long", hint=_HINT)
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read `{path}`: {e.strerror or e}",
            hint="point at the folder of a checkpoint or a pack: it holds config.json",
        ) from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"`{path}` is not valid JSON: {e}", hint="fetch the file again") from e
    return Values(d).d


class Values:
    """One parsed config.json; null counts as absent everywhere."""

    def __init__(self, d: object) -> None:
        if not isinstance(d, dict):
            raise ConfigError(f"config is a {type(d).__name__}, not an object", hint=_HINT)
        self.d: dict[str, Any] = d

    def missing(self, key: str) -> ConfigError:
        """The error for a key that is not there."""
        return ConfigError(f"config.json has no `{key}`", hint=_HINT)

    def bad(self, key: str, value: object, why: str) -> ConfigError:
        """The error for a value that cannot be."""
        return ConfigError(f"config.json: `{key}` is {value!r}: {why}", hint=_HINT)

    def present(self, key: str, default: object) -> Any:
        """A value or its default; ConfigError without either."""
        value = self.d.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.missing(key)
        return value

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = _ABSURD
    ) -> int:
        """A whole number in low..high; null counts as absent."""
        value = self.present(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, value, "a whole number is needed")
        if not low <= value <= high:
            raise self.bad(key, value, f"outside {low}..{high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number; null counts as absent."""
        return self.positive(key, self.present(key, default))

    def positive(self, key: str, value: object) -> float:
        """`value` as a finite positive number; `key` names it in the error."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key, value, "a number is needed")
        if not (math.isfinite(value) and value > 0):
            raise self.bad(key, value, "a positive number is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, nothing like it."""
        value = self.present(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false is needed")
        return bool(value)

    def either(self, key: str, other: Mapping[str, Any], other_key: str) -> float:
        """A positive number under either spelling; where both are given they must agree."""
        found = [
            self.positive(name, value)
            for name, value in ((key, self.d.get(key)), (other_key, other.get(other_key)))
            if value is not None
        ]
        if not found:
            raise self.missing(key)
        if found[0] != found[-1]:
            raise self.bad(key, found[0], f"transformers' `{other_key}` says {found[-1]}")
        return found[0]

    def pattern(self, key: str, n: int, read: Callable[[object], str | None]) -> list[str] | None:
        """One entry per layer through `read` (None = not understood); None without the key."""
        raw = self.d.get(key)
        if raw is None:
            return None
        if not isinstance(raw, list | tuple) or len(raw) != n:
            raise self.bad(key, raw, f"a list of num_hidden_layers = {n} entries is needed")
        out = []
        for i, item in enumerate(raw):
            word = read(item) if not isinstance(item, bool | list | dict) else None
            if word is None:
                raise self.bad(f"{key}[{i}]", item, "not a layer kind of this family")
            out.append(word)
        return out

    def kinds(
        self, n: int, hub: str, hub_words: dict[int, Any], own: str, own_words: dict[str, Any]
    ) -> list[Any]:
        """Layer kinds from the hub's 0/1 list or transformers' words; both must agree."""
        a = self.pattern(hub, n, lambda x: hub_words.get(x) if isinstance(x, int) else None)
        b = self.pattern(own, n, lambda x: own_words.get(x) if isinstance(x, str) else None)
        if a is not None and b is not None and a != b:
            i = next(i for i in range(n) if a[i] != b[i])
            raise self.bad(f"{hub}[{i}]", a[i], f"`{own}` says {b[i]!r}")
        found = a if a is not None else b
        if found is None:
            raise self.missing(hub)
        return found
