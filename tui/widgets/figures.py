"""Figures and foreign text made fit for a terminal: pure functions used by the widgets."""

from __future__ import annotations

from mimo_local.events import DraftFigures, ExpertFigures, FinishReason, Prefill, Stats
from tui.messages import Pace

# C0 (without tab and newline), DEL and C1 become visible signs: text from a user or a model must
# never reach the terminal as an escape sequence.
_CONTROLS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


def plain(text: str) -> str:
    """The text with every control character made visible; CR LF counts as one newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rate(tokens_per_s: float) -> str:
    """`0.42 tok/s`, `5.1 tok/s`, `1234 tok/s`."""
    digits = 2 if tokens_per_s < 1 else 1 if tokens_per_s < 100 else 0
    return f"{tokens_per_s:.{digits}f} tok/s"


def count(n: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def amount(done: int, total: int, unit: str) -> str:
    """`1.2 / 3.4 GB` for bytes, `12 / 30 layers` for anything else; no total, no slash."""
    if unit != "bytes":
        return f"{done:,} / {total:,} {unit}" if total > 0 else f"{done:,} {unit}"
    size = max(done, total)
    divisor, name = next(
        (d, n)
        for d, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
        if size >= d or d == 1
    )
    digits = 0 if divisor == 1 else 1
    text = f"{done / divisor:.{digits}f}"
    return f"{text} / {total / divisor:.{digits}f} {name}" if total > 0 else f"{text} {name}"


def percent(part: int, whole: int) -> int:
    """Whole per cent, rounded down: 100 means all of it."""
    return 0 if whole <= 0 else min(100, 100 * part // whole)


def reading_line(p: Prefill) -> str:
    """The status line while the prompt is processed."""
    text = f"reading the prompt · {percent(p.done, p.total)}% of {count(p.total, 'token')}"
    if p.tokens_per_s > 0 and p.done < p.total:
        text += f" · {duration((p.total - p.done) / p.tokens_per_s)} left"
    return text


def answering_line(pace: Pace) -> str:
    """The status line while an answer is generated."""
    what = "thinking" if pace.tokens == pace.thinking_tokens else "answering"
    text = f"{what} · {count(pace.tokens, 'token')}"
    return text + (f" · {rate(pace.tokens_per_s)}" if pace.tokens_per_s else "")


ENDINGS: dict[FinishReason, str] = {
    "stop": "",
    "cancelled": "stopped",
    "length": "cut at the token limit (--max-tokens)",
    "context": "the context is full: /clear starts anew",
}


def answer_foot(reason: FinishReason, stats: Stats, pace: Pace) -> str:
    """The line under an answer: how it ended unless by itself, tokens, speed, time."""
    parts = [ENDINGS[reason], count(stats.completion_tokens or pace.tokens, "token")]
    if stats.decode_tokens_per_s:
        parts.append(rate(stats.decode_tokens_per_s))
    if stats.prefill_s or stats.decode_s:
        parts.append(duration(stats.prefill_s + stats.decode_s))
    return " · ".join(part for part in parts if part)


def saved_foot(stats: Stats) -> str:
    """The line under an answer of an earlier session."""
    parts = [count(stats.completion_tokens, "token")]
    if stats.decode_tokens_per_s:
        parts.append(rate(stats.decode_tokens_per_s))
    return " · ".join(parts)


def stats_table(stats: Stats, *, kernel: str) -> str:
    """What `/stats` shows; `kernel` is used if the figures name none."""
    return "\n".join(
        (
            f"prompt    {count(stats.prompt_tokens, 'token')}, {stats.cached_tokens:,} from cache"
            f" · {duration(stats.prefill_s)} · {rate(stats.prefill_tokens_per_s)}",
            f"answer    {count(stats.completion_tokens, 'token')}"
            f" · {duration(stats.decode_s)} · {rate(stats.decode_tokens_per_s)}",
            f"context   {stats.context_used:,} of {count(stats.context_limit, 'token')}"
            f" · cache {amount(stats.cache_bytes, 0, 'bytes')}",
            *([drafts_row(stats.draft)] if stats.draft is not None else ()),
            *([experts_row(stats, stats.experts)] if stats.experts is not None else ()),
            f"kernel    {stats.kernel or kernel}",
        )
    )


def drafts_row(d: DraftFigures) -> str:
    """What drafting did: tokens a pass of the model gave, drafts made and right, why."""
    row = f"drafts    {d.tokens_per_pass:.2f} tokens a pass"
    if d.drafted:
        row += f" · {percent(sum(d.accepted), sum(d.judged))}% of {sum(d.judged):,} right"
    return row + (f" · {d.note}" if d.note else "")


def tiers_of(e: ExpertFigures) -> tuple[tuple[str, str, int], ...]:
    """(name, sign, experts that came from there), from the fastest tier to the slowest."""
    return (
        ("VRAM", "█", e.vram_hits),
        ("RAM", "▓", e.ram_hits),
        ("ahead", "▒", e.staged_hits),
        ("disk", "░", e.misses),
    )


def tier_shares(e: ExpertFigures) -> str:
    """`RAM 62% · disk 38%`; nothing if no expert was asked for."""
    return " · ".join(f"{name} {percent(n, e.wanted)}%" for name, _, n in tiers_of(e) if n)


def tier_bar(e: ExpertFigures, width: int) -> str:
    """The same as signs that need no colour, `width` of them; nothing if there is nothing."""
    bar, before = "", 0
    for _, sign, n in tiers_of(e):
        before += n
        bar += sign * (round(width * before / e.wanted) - len(bar)) if e.wanted else ""
    return bar


def experts_row(stats: Stats, e: ExpertFigures) -> str:
    """Where the experts came from: hits per tier, bytes from disk, memory of the tiers."""
    shares = tier_shares(e)
    per_token = amount(round(stats.disk_bytes_per_token), 0, "bytes")
    memory = amount(e.ram_bytes + e.vram_bytes, 0, "bytes")
    row = f"experts   {shares or 'none asked for'} · {per_token} from disk a token · {memory} held"
    return row + (f"\nnote      {e.note}" if e.note else "")
