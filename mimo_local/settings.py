"""Every setting, resolved once at the edge: flag > MIMO_* variable > config.toml > default.

`Settings` is frozen and passed by argument; `origin` remembers where each value came from, so that
`mimo config` and error messages can say it. `Paths` owns every folder of the user. Knows no model,
no tensor and no preset; called by cli, api and tui.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from mimo_local.errors import UsageError

KvDtype = Literal["auto", "f32", "bf16", "int8"]
Prefetch = Literal["auto", "on", "off"]
Draft = Literal["auto", "on", "off"]
Device = Literal["auto", "cpu", "cuda"]
PACK_MANIFEST: Final = "pack.json"
"""The file whose presence makes a folder a finished pack (it is written last)."""


@dataclass(frozen=True, slots=True)
class Paths:
    """The user's folders. `MIMO_HOME` moves all three under one folder."""

    config_dir: Path
    data_dir: Path
    cache_dir: Path

    @classmethod
    def default(cls, env: Mapping[str, str] = os.environ) -> Paths:
        """Where this user's files are; creates nothing."""
        home = env.get("MIMO_HOME", "")
        if home:
            root = Path(home).expanduser()
            return cls(root / "config", root / "data", root / "cache")
        import platformdirs  # 10 ms, only needed without MIMO_HOME

        dirs = platformdirs.PlatformDirs("mimo-local", appauthor=False)
        return cls(dirs.user_config_path, dirs.user_data_path, dirs.user_cache_path)

    @property
    def config_file(self) -> Path:
        """The settings file; may not exist."""
        return self.config_dir / "config.toml"

    @property
    def packs_dir(self) -> Path:
        """Where `mimo quantize` puts packs that are given a name only."""
        return self.data_dir / "packs"

    @property
    def history_file(self) -> Path:
        """The saved chats; may not exist."""
        return self.data_dir / "history.db"

    @property
    def recipes_dir(self) -> Path:
        """The user's own recipes; may not exist."""
        return self.config_dir / "recipes"

    def first_pack(self) -> Path | None:
        """The first finished pack in `packs_dir` by name, or None."""
        if not self.packs_dir.is_dir():
            return None
        found = sorted(p.parent for p in self.packs_dir.glob(f"*/{PACK_MANIFEST}"))
        return found[0] if found else None


def _parsed(kind: type, value: Any) -> Any:
    """Text (from the environment) as a number; what is no number stays what it is."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value.strip())
    except ValueError:
        return value


def _integer(low: int, high: int = 1 << 62) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        number = _parsed(int, value)
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            limit = f"at least {low}" if high == 1 << 62 else f"from {low} to {high}"
            raise ValueError(f"a whole number {limit}")
        return number

    return check


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = _parsed(float, value)
        ok = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not ok or not (low < number if above else low <= number) or not number <= high:
            raise ValueError(f"a number {'above' if above else 'from'} {low:g} up to {high:g}")
        return float(number)

    return check


def parse_size(text: str) -> int:
    """`24GB`, `24G`, `23.5 GiB`, `1TB` in bytes; GB is 10^9, GiB is 2^30. ValueError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, re.I)
    if not found or (found[3] and not found[2]):
        raise ValueError("a size like 24GB, 23.5GiB or 1TB")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if not isinstance(value, str):
        raise ValueError("a size like 24GB, 23.5GiB or 1TB")
    return parse_size(value)


def _room(value: Any) -> int:
    """A size, or 0 for none of it."""
    return 0 if value in (0, "0") and not isinstance(value, bool) else _size(value)


def _choice(*names: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return str(value)

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text in quotes")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("a path")
    return Path(value).expanduser()


def _address(value: Any) -> str:
    """A web address without a path's last slash; `off` and an empty text are none at all."""
    if value in ("", "off"):
        return ""
    from urllib.parse import urlsplit

    wanted = "an address like http://10.0.0.5:8000, or off"
    if not isinstance(value, str):
        raise ValueError(wanted)
    try:
        parts = urlsplit(value.strip())
        port = parts.port  # raises for what is no port
    except ValueError:
        raise ValueError(wanted) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(wanted)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{wanted}, without a key in it: that goes into MIMO_REMOTE_KEY")
    return value.strip().rstrip("/")


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    named = {"1": True, "true": True, "yes": True, "on": True}
    named |= {"0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.strip().lower() not in named:
        raise ValueError("true or false")
    return named[value.strip().lower()]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a run can be told; None = decided from the model, the preset or the machine."""

    model: Path | None = None
    context: int | None = None
    threads: int | None = None
    ram: int | None = None
    device: Device = "auto"
    vram: int | None = None
    prefetch: Prefetch = "auto"
    draft: Draft = "auto"
    kv_dtype: KvDtype = "auto"
    sessions_size: int | None = None
    window: int | None = None
    preset: str = "chat"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    system: str | None = None
    think: bool = False
    history: bool = True
    remote: str | None = None
    remote_model: str | None = None
    origin: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType({}), compare=False, repr=False
    )
    """Name -> where its value came from: `flag`, `MIMO_X`, the path of config.toml, `default`."""

    @classmethod
    def resolve(
        cls,
        *,
        paths: Paths | None = None,
        env: Mapping[str, str] | None = None,
        **flags: Any,
    ) -> Settings:
        """Merge all sources; a flag that is None was not typed. UsageError names file and key."""
        env = os.environ if env is None else env
        paths = paths or Paths.default(env)
        values: dict[str, Any] = {}
        origin = dict.fromkeys(OPTIONS, "default")
        for name, value in _read_file(paths.config_file).items():
            values[name] = _checked(name, value, f"{paths.config_file}: `{name}`")
            origin[name] = str(paths.config_file)
        for name in OPTIONS:
            text = env.get(variable(name), "")
            if text:
                values[name] = _checked(name, text, f"{variable(name)}")
                origin[name] = variable(name)
        for name, value in flags.items():
            if name not in OPTIONS:
                raise TypeError(f"no setting is called {name!r}")
            if value is not None:
                values[name] = _checked(name, value, f"--{name.replace('_', '-')}")
                origin[name] = "flag"
        if values.get("model") is not None:
            values["model"] = _named_pack(values["model"], paths)
        return cls(**values, origin=MappingProxyType(origin))


OPTIONS: Final[tuple[str, ...]] = tuple(f.name for f in fields(Settings) if f.name != "origin")
"""Names of all settings, in the order they are shown."""
_RULES: Final[dict[str, tuple[Callable[[Any], Any], str]]] = {
    "model": (
        _path,
        "folder of a pack or a checkpoint, or the name of a pack in the packs folder; "
        "unset: the first pack found there, else the demo",
    ),
    "context": (
        _integer(16),
        "most tokens of prompt and answer together; unset: what the RAM allows",
    ),
    "threads": (_integer(1, 4096), "CPU threads; unset: one per physical core"),
    "ram": (
        _size,
        "most RAM to use, like 48GB: what does not fit stays on disk; unset: what is free",
    ),
    "device": (
        _choice(*get_args(Device)),
        "where the model runs besides its experts; cuda: on the GPU, or not at all; "
        "auto: on the GPU if there is one and the plan expects it to be faster",
    ),
    "vram": (
        _room,
        "most GPU memory to use, like 12GB; 0: none; unset: what is free, if there is a GPU",
    ),
    "prefetch": (
        _choice(*get_args(Prefetch)),
        "read the next layer's likely experts ahead; auto: while that is measured to be faster",
    ),
    "draft": (
        _choice(*get_args(Draft)),
        "draft tokens with the MTP layers where that is measured to pay; auto: if all else fits",
    ),
    "kv_dtype": (
        _choice(*get_args(KvDtype)),
        "how keys and values are kept; int8: half of bf16 for layers that see all; "
        "auto: bf16 for packs, f32 for checkpoints",
    ),
    "sessions_size": (
        _room,
        "most disk for chats that rest, like 20GB, so that they go on at once; 0: none; "
        "unset: 10 GB, or a tenth of what is free if that is less",
    ),
    "window": (
        _integer(1),
        "keys a sliding layer sees, itself included; unset: the model's (129)",
    ),
    "preset": (_text, "sampling preset: chat, summarize, code, math, agent, default"),
    "temperature": (_number(0, 100), "0 is greedy; unset: the preset's"),
    "top_p": (
        _number(0, 1, above=True),
        "smallest set of tokens with this probability; unset: the preset's",
    ),
    "top_k": (_integer(0), "only the k likeliest tokens; 0 or unset: all"),
    "min_p": (_number(0, 1), "drop tokens below this share of the likeliest one; unset: 0"),
    "repetition_penalty": (
        _number(0, 100, above=True),
        "above 1 disfavours tokens already in the answer; unset: the preset's",
    ),
    "presence_penalty": (
        _number(-2, 2),
        "above 0 disfavours tokens already in the answer, once; unset: 0",
    ),
    "frequency_penalty": (
        _number(-2, 2),
        "the same for each time a token is there; unset: 0",
    ),
    "max_tokens": (_integer(1), "longest answer in tokens; unset: the preset's"),
    "seed": (
        _integer(0, (1 << 63) - 1),
        "makes the answer repeatable; unset: a new one each time",
    ),
    "system": (_text, "system prompt; unset: the model's recommended one"),
    "think": (_switch, "let the model think before it answers"),
    "history": (_switch, "keep chats and prompts in the data folder, to continue and search them"),
    "remote": (
        _address,
        "ask this OpenAI-compatible server (SGLang, vLLM, `mimo serve`) instead of a model here, "
        "like http://10.0.0.5:8000; off: none; your texts go there",
    ),
    "remote_model": (_text, "the model to ask for there; unset: the one it has, or its MiMo"),
}


def variable(name: str) -> str:
    """The environment variable of a setting: `top_p` -> `MIMO_TOP_P`."""
    return f"MIMO_{name.upper()}"


def describe(name: str) -> str:
    """One line of help for a setting: the flag's help text and the row in docs/settings.md."""
    return _RULES[name][1]


def _checked(name: str, value: Any, where: str) -> Any:
    try:
        return _RULES[name][0](value)
    except ValueError as error:
        # What could be a password in an address is not shown.
        shown = re.sub(r"//[^/@]*@|[?#].*", "...", str(value)) if name == "remote" else str(value)
        raise UsageError(
            f"{where} is {shown!r}, but must be {error}", hint=f"`{name}`: {describe(name)}"
        ) from None


def _named_pack(model: Path, paths: Paths) -> Path:
    """A bare name that is no folder here but a pack in the packs folder means that pack."""
    if len(model.parts) == 1 and not model.exists():
        pack = paths.packs_dir / model
        if (pack / PACK_MANIFEST).is_file():
            return pack
    return model


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", hint="repair the file or move it away"
        ) from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not valid TOML: {error}", hint="one `name = value` per line, text in quotes"
        ) from error
    for key in table:
        if key not in OPTIONS:
            close = _closest(key)
            raise UsageError(
                f"{path}: there is no setting `{key}`",
                hint=f"did you mean `{close}`?" if close else f"settings: {', '.join(OPTIONS)}",
            )
    return table


def _closest(key: str) -> str | None:
    import difflib

    found = difflib.get_close_matches(key.replace("-", "_"), OPTIONS, n=1)
    return found[0] if found else None
