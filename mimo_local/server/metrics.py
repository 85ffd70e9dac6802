"""What the server counts, in Prometheus' words: requests, tokens, seconds, bytes, tiers, drafts.

Knows figures of answers, not how they are made. `service` feeds it, `/metrics` shows it.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mimo_local.events import Stats

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Edges of the histograms: from a small model's answer to a book being read."""


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(
        self, waiting: Callable[[], int], running: Callable[[], int], connections: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests", "path", "status")
        self.answers = self._counter("answers", "answers that ended", "reason")
        self._tokens = self._counter("tokens", "tokens: prompt, cached or completion", "kind")
        self._wanted = self._counter("experts", "experts wanted, by where they were", "tier")
        self._disk = self._counter("expert_disk_bytes", "bytes of experts read from disk")
        self._wait = self._counter("expert_wait_seconds", "seconds waited for the disk")
        self._drafts = self._counter("drafts", "drafted tokens that were looked at", "result")
        self._passes = self._counter("draft_passes", "passes of the model while drafting")
        self.seconds = self._histogram("request_seconds", "seconds from asking to the end")
        self.first_token = self._histogram("first_token_seconds", "seconds to the first token")
        self._gauge("queue_length", "answers waiting for their turn").set_function(waiting)
        self._gauge("running", "answers being made").set_function(running)
        self._gauge("connections", "open connections").set_function(connections)
        self._kv = self._gauge("kv_bytes", "key/value cache of the session that answered last")
        self._ram = self._gauge("expert_ram_bytes", "memory of the RAM tier")
        self._vram = self._gauge("expert_vram_bytes", "memory of the VRAM tier")
        self._decode = self._gauge("decode_tokens_per_second", "of the last answer")
        self._prefill = self._gauge("prefill_tokens_per_second", "of the last prompt")
        self.loaded = self._gauge("model_loaded", "1 when the model can answer")
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(kind)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mimo_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"mimo_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"mimo_{name}", text, registry=self._registry, buckets=SECONDS)

    def ended(self, reason: str, stats: Stats | None, seconds: float) -> None:
        """An answer ended; `stats`: None if it failed."""
        self.answers.labels(reason).inc()
        self.seconds.observe(seconds)
        if stats is None:
            return
        self._tokens.labels("prompt").inc(stats.prompt_tokens)
        self._tokens.labels("cached").inc(stats.cached_tokens)
        self._tokens.labels("completion").inc(stats.completion_tokens)
        self._kv.set(stats.cache_bytes)
        self._decode.set(stats.decode_tokens_per_s)
        self._prefill.set(stats.prefill_tokens_per_s)
        if (e := stats.experts) is not None:
            tiers = {"vram": e.vram_hits, "ram": e.ram_hits, "staged": e.staged_hits}
            for tier, count in {**tiers, "disk": e.misses}.items():
                self._wanted.labels(tier).inc(count)
            self._disk.inc(e.disk_bytes)
            self._wait.inc(e.wait_s)
            self._ram.set(e.ram_bytes)
            self._vram.set(e.vram_bytes)
        if (d := stats.draft) is not None:
            self._passes.inc(d.passes)
            accepted = sum(d.accepted)
            self._drafts.labels("accepted").inc(accepted)
            self._drafts.labels("rejected").inc(sum(d.judged) - accepted)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)
