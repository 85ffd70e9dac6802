"""The same answers from any OpenAI-compatible server: an SGLang or vLLM cluster, or `mimo serve`.

`Remote.open(settings)` stands in for an `Engine`: its streams have the same events. The server
applies the chat template, so it is given messages (`submit_messages`), not ids. Imports no torch;
httpx2 comes with the first connection. Called by chat, summarize, cli and tui.
"""

from __future__ import annotations

from mimo_local.remote.backend import Remote

__all__ = ["Remote"]
