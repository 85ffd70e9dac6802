"""What is sent: an address, the body of a chat request, and which model of several is meant.

Pure functions; called by `backend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from mimo_local.errors import UsageError
from mimo_local.remote.answers import shown
from mimo_local.sampler import SamplingParams

EXTRAS: Final = ("chat_template_kwargs", "top_k", "min_p", "repetition_penalty")
"""Fields that are not OpenAI's: vLLM, SGLang and `mimo serve` know them, hosted ones may not."""
SIZES: Final = ("max_model_len", "context_length", "context_window", "max_context_length")
"""What servers call the longest context of a model."""


def base(address: str) -> str:
    """Where the API is: the address itself if it has a path, else its `/v1`."""
    address = address.rstrip("/")
    return address if urlsplit(address).path else f"{address}/v1"


def root(address: str) -> str:
    """Where what is not OpenAI's is: `/tokenize` lies beside `/v1`."""
    return base(address).removesuffix("/v1")


def is_loopback(address: str) -> bool:
    """Whether the address is on this machine; a tunnel may still lead elsewhere."""
    host = (urlsplit(address).hostname or "").lower()
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def body(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    *,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    stop: Sequence[str] = (),
    without: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The JSON of a streamed chat request; what has no effect is left out, and so is `without`."""
    found: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        # Always said, because servers' defaults differ.
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    if params.seed is not None:
        found["seed"] = params.seed
    if params.top_k:
        found["top_k"] = params.top_k
    if params.min_p:
        found["min_p"] = params.min_p
    if params.repetition_penalty != 1:
        found["repetition_penalty"] = params.repetition_penalty
    if params.presence_penalty:
        found["presence_penalty"] = params.presence_penalty
    if params.frequency_penalty:
        found["frequency_penalty"] = params.frequency_penalty
    if wanted := [text for text in stop if text]:
        found["stop"] = wanted
    if tools:
        found["tools"] = list(tools)
    return {name: value for name, value in found.items() if name not in without}


def choose(listed: Any, wanted: str | None, where: str) -> tuple[str, int | None]:
    """Which of the server's models, and its context if that is told.

    The one that is `wanted`, else the only one, else the only MiMo; UsageError otherwise.
    """
    data = listed.get("data") if isinstance(listed, dict) else None
    models = {
        str(entry["id"]): entry
        for entry in (data if isinstance(data, list) else ())
        if isinstance(entry, dict) and entry.get("id")
    }
    if wanted:
        return wanted, _size(models.get(wanted, {}))
    names = list(models)
    if len(names) != 1:
        names = [name for name in models if "mimo" in name.lower()]
    if len(names) == 1:
        return names[0], _size(models[names[0]])
    if not models:
        raise UsageError(
            f"{where} does not say which models it has", hint="name one with --remote-model"
        )
    some = ", ".join(shown(name, 60) for name in list(models)[:8])
    more = f" and {len(models) - 8} more" if len(models) > 8 else ""
    raise UsageError(
        f"{where} has {len(models)} models", hint=f"--remote-model names one: {some}{more}"
    )


def _size(entry: Mapping[str, Any]) -> int | None:
    meta = entry.get("meta")
    places = [entry.get(name) for name in SIZES]
    if isinstance(meta, dict):  # llama-server
        places += [meta.get("n_ctx"), meta.get("n_ctx_train")]
    sizes = [n for n in places if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return sizes[0] if sizes else None
