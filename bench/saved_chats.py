"""How quick saved chats are with 20,000 messages: listing, opening, searching, saving an answer.

Text is drawn from 20,000 made-up words as often as words of a language are (Zipf), a quarter of the
chats from Chinese characters: words that stand in nearly every message are the worst case of a
search. Needs no model. Last line: JSON, milliseconds of this process (median of 15).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mimo_local.chat import Message
from mimo_local.history import History

HAN = "合同审查付款条款违约责任甲方乙方本协议签订日期论文阅读方法结果讨论翻译术语表会议纪要代码"


def words(source: random.Random) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(20_000)]


def fill(history: History, source: random.Random, vocabulary: list[str], messages: int) -> float:
    """Chats of 50 messages; seconds."""
    weights = [1 / (i + 1) for i in range(len(vocabulary))]
    started = time.perf_counter()
    for chat in range(messages // 50):
        entries = []
        for i in range(50):
            if chat % 4 == 0:
                text = "".join(source.choices(HAN, k=source.randint(20, 800)))
            else:
                text = " ".join(source.choices(vocabulary, weights, k=source.randint(10, 250)))
            entries.append({"role": ("user", "assistant")[i % 2], "content": text})
        history.import_chats(entries)
    return time.perf_counter() - started


def median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(15):
        started = time.process_time()  # other work on the machine does not count
        work()
        times.append(time.process_time() - started)
    return round(statistics.median(times) * 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    wanted = parser.parse_args().messages
    source = random.Random(1)
    vocabulary = words(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.db"
        with History.open(path) as history:
            seconds = fill(history, source, vocabulary, wanted)
            print(f"{wanted} messages saved in {seconds:.1f} s, {path.stat().st_size / 1e6:.0f} MB")
            queries = {
                "the commonest word": vocabulary[0],
                "a common word": vocabulary[500],
                "a rare word": vocabulary[15_000],
                "two words": f"{vocabulary[500]} {vocabulary[3]}",
                "one letter": "a",
                "two letters": vocabulary[7][:2],
                "Chinese word": "合同",
                "Chinese character": "审",
                "only punctuation": "->",
            }
            found = {
                "list": median_ms(history.chats),
                "open": median_ms(lambda: history.messages(7)),
            }
            for name, query in queries.items():
                found[f"search, {name}"] = median_ms(lambda query=query: history.search(query))
            chat = history.new_chat()
            answer = history.add(chat, Message("assistant", ""), parent=None)
            text = " ".join(source.choices(vocabulary, k=1000))
            found["save a streaming answer of 1000 words"] = median_ms(
                lambda: history.update(answer, Message("assistant", text))
            )
            started = time.process_time()
            history.remove(3)
            found["remove a chat"] = round((time.process_time() - started) * 1e3, 2)
    for name, value in found.items():
        print(f"{name:<40} {value:8.2f} ms")
    print(json.dumps({"messages": wanted, "fill_s": round(seconds, 2), "ms": found}))


if __name__ == "__main__":
    main()
