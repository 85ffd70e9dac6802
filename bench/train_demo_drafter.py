"""Train the demo model's three MTP layers on chats it writes with itself, and ship them in INT8.

    python bench/train_demo_drafter.py held-out --work DIR
    python bench/train_demo_drafter.py chats    --work DIR --seed 1   # and 2, ...: one per core
    python bench/train_demo_drafter.py train    --work DIR --head 0 --stop 280
    python bench/train_demo_drafter.py train    --work DIR --head 1 --like 0
    python bench/train_demo_drafter.py train    --work DIR --head 2 --like 0
    python bench/train_demo_drafter.py train    --work DIR --head 0
    python bench/train_demo_drafter.py evaluate --work DIR
    python bench/train_demo_drafter.py ship     --work DIR

Each step leaves files in DIR and goes on where it stopped. `train` uses the chats that are there
and looks for new ones after every pass, which come first; heads 1 and 2 begin as copies of a head 0
that has learned which token follows which, and from there on know nothing of each other.
`evaluate` asks the hand-written prompts of drafter_prompts.txt, which nothing is trained or chosen
on. `ship` writes mimo_local/demo_data/drafter.safetensors and docs/drafter.svg.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from drafter_data import Chat, read_chats, write_chats
from drafter_head import Head, backward

from mimo_local.demo import demo_folder
from mimo_local.demo.fetch import open_source
from mimo_local.demo.source import Source

HELD_OUT_TOKENS = 15_000
HELD_OUT_SEED = 900
PROMPT_SHARE = 0.25
"""Of the positions of a user's turn, so many are learned: drafting happens in answers."""
RANDOM_CHOICES = 1024
"""Tokens added at random to those any target of a batch names; the loss chooses among these."""
BEFORE_ANSWER = 64
"""Tokens kept before an answer: the system's turn teaches nothing, a long question little."""
SAVE_EVERY_S = 120.0


class Pool:
    """The chats on disk, mapped; those held out were written apart and are never trained on."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "chats"
        self.shards: dict[str, list[Chat]] = {}
        held_out = read_chats(work / "held-out").values()
        self.held_out = [chat for shard in held_out for chat in shard if chat["greedy"]]

    def due(self, passes: dict[str, int]) -> list[str]:
        """Shards for the next pass: the new ones, and where there are none, all.

        `passes`: how often each was trained on; new ones are counted as one pass behind.
        """
        self.shards |= read_chats(self.folder, self.shards)
        least = min(passes.values(), default=1)
        for name in self.shards:
            passes.setdefault(name, least - 1)
        least = min(passes.values())
        return [name for name in self.shards if passes[name] == least]

    @property
    def tokens(self) -> int:
        return sum(len(chat["ids"]) for shard in self.shards.values() for chat in shard)

    def batches(self, chats: list[Chat], size: int, rng: random.Random) -> list[list[Chat]]:
        """All chats once, those of similar length together: at most `size` padded tokens each."""
        ordered = sorted(chats, key=lambda chat: kept(chat) * rng.uniform(0.9, 1.1))
        out, batch, longest = [], list[Chat](), 0
        for chat in ordered:
            longest = max(longest, kept(chat))
            if batch and longest * (len(batch) + 1) > size:
                out.append(batch)
                batch, longest = [], kept(chat)
            batch.append(chat)
        out.append(batch)
        rng.shuffle(out)
        return out


def kept(chat: Chat) -> int:
    """Tokens of the chat that are trained on."""
    return len(chat["ids"]) - max(0, int(chat["answer"]) - BEFORE_ANSWER)


def cropped(chat: Chat) -> Chat:
    """The chat from BEFORE_ANSWER tokens before its answer; rotary positions are relative."""
    first = max(0, chat["answer"] - BEFORE_ANSWER)
    rows = {key: chat[key][first:] for key in ("ids", "hidden", "top_ids", "top_logits")}
    return {**chat, **rows, "answer": chat["answer"] - first}


class Batch:
    """Padded tensors of some chats as head k sees them, and which positions count."""

    def __init__(self, chats: list[Chat], k: int, share: float) -> None:
        """`share`: of the positions of the user's turns that count, at random."""
        chats = [cropped(chat) for chat in chats]
        t = max(len(chat["ids"]) for chat in chats) - 1 - k
        width = chats[0]["hidden"].shape[1]
        self.ids = torch.zeros(len(chats), t, dtype=torch.int64)
        self.hidden = torch.zeros(len(chats), t, width, dtype=torch.bfloat16)
        self.counted = torch.zeros(len(chats), t, dtype=torch.bool)
        targets, levels = [], []
        for row, chat in enumerate(chats):
            # Position i: token i + 1 + k is given, the trunk's choice after it is asked for.
            n = len(chat["ids"]) - 1 - k
            self.ids[row, :n] = chat["ids"][1 + k :]
            self.hidden[row, :n] = chat["hidden"][:n]
            predicts = torch.arange(n) + 2 + k
            keep = predicts >= chat["answer"]
            keep |= torch.rand(n) < share
            self.counted[row, :n] = keep
            targets.append(chat["top_ids"][1 + k :][keep])
            levels.append(chat["top_logits"][1 + k :][keep])
        self.target = torch.cat(targets).long()
        self.p = torch.cat(levels).float().softmax(-1)


class Trainer:
    """One head, its optimisers, and where it is in its schedule; all of it can be saved."""

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        self.k, self.args = args.head, args
        self.file = args.work / f"head-{self.k}.pt"
        self.log = args.work / f"head-{self.k}.jsonl"
        self.embed = source.tensor("model.embed_tokens.weight")
        self.choices = self.embed.bfloat16()
        self.head = Head(source.shape)
        self.head.start_from(source, args.head)
        matrices = [p for p in self.head.parameters() if p.ndim == 2]
        norms = [p for p in self.head.parameters() if p.ndim == 1]
        self.muon = torch.optim.Muon(
            matrices, lr=args.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(norms, lr=args.rate, weight_decay=0.0, betas=(0.9, 0.98))
        self.step, self.visits, self.seconds = 0, 0, 0.0
        self.passes: dict[str, int] = {}
        self.random = random.Random(args.head)
        start = self.file
        if args.like is not None and not start.exists():
            start = args.work / f"head-{args.like}.pt"
        if start.exists():
            state = torch.load(start, weights_only=False)
            self.head.load_state_dict(state["head"])
            self.muon.load_state_dict(state["muon"])
            self.adam.load_state_dict(state["adam"])
            self.step, self.visits, self.seconds = state["at"]
            self.passes = state["passes"]
        if self.log.exists():  # lines later than the checkpoint will be written again
            lines = self.log.read_text().splitlines(keepends=True)
            self.log.write_text("".join(x for x in lines if json.loads(x)["step"] <= self.step))

    def save(self) -> None:
        state = {
            "head": self.head.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "at": (self.step, self.visits, self.seconds),
            "passes": self.passes,
        }
        torch.save(state, self.file.with_suffix(".part"))
        self.file.with_suffix(".part").rename(self.file)

    def learn(self, chats: list[Chat]) -> float:
        """One step; its loss."""
        # Up in 40 steps, level, and down to a hundredth over the last `fall` of all steps.
        left = 1 - self.step / self.args.steps
        share = min(1.0, (self.step + 1) / 40, max(0.01, left / self.args.fall))
        for optimizer in (self.muon, self.adam):
            optimizer.param_groups[0]["lr"] = self.args.rate * share
            optimizer.zero_grad()
        batch = Batch(chats, self.k, PROMPT_SHARE)
        choices, target = self.narrowed(batch.target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.head(self.embed[batch.ids], batch.hidden)
        loss, _ = backward(y[batch.counted].bfloat16(), choices, target, batch.p)
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.muon.step()
        self.adam.step()
        self.step += 1
        self.visits += sum(map(kept, chats))
        return loss

    def narrowed(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Head rows a batch chooses among, and the targets as numbers of these rows."""
        extra = torch.randint(len(self.choices), (RANDOM_CHOICES,))
        ids, where = torch.cat([target.view(-1), extra]).unique(return_inverse=True)
        return self.choices[ids], where[: target.numel()].view_as(target)

    @torch.no_grad()
    def accepted(self, chats: list[Chat]) -> tuple[float, float]:
        """(share of answer tokens the head names as the trunk would, cross-entropy), whole head."""
        hits, loss, count = 0, 0.0, 0
        for start in range(0, len(chats), 2):
            batch = Batch(chats[start : start + 2], self.k, 0.0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.head(self.embed[batch.ids], batch.hidden)[batch.counted].bfloat16()
            logits = (y @ self.choices.T).float()
            hits += int((logits.argmax(-1) == batch.target[:, 0]).sum())
            logp = logits.gather(1, batch.target) - logits.logsumexp(-1, keepdim=True)
            loss -= float((batch.p * logp).sum())
            count += len(y)
        return hits / count, loss / count

    def run(self, pool: Pool) -> None:
        """To the last step; a line to the log with every measurement."""
        for chats, losses in self.steps(pool):
            rate = self.visits / self.seconds
            found, loss = self.accepted(chats)
            line = {
                "head": self.k, "step": self.step, "visits": self.visits, "tokens": pool.tokens,
                "seconds": round(self.seconds), "loss": round(sum(losses) / len(losses), 4),
                "held_out_loss": round(loss, 4), "held_out": round(found, 4),
            }  # fmt: skip
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, f"{rate:.0f} tokens/s", flush=True)

    def steps(self, pool: Pool) -> Iterator[tuple[list[Chat], list[float]]]:
        """Trains; now and then what to measure on, and the losses since."""
        losses: list[float] = []
        saved = time.monotonic()
        end = min(self.args.steps, self.args.stop or self.args.steps)
        while self.step < end:
            due = pool.due(self.passes)
            train = [chat for name in due for chat in pool.shards[name]]
            for chats in pool.batches(train, self.args.batch, self.random):
                began = time.process_time()
                losses.append(self.learn(chats))
                self.seconds += time.process_time() - began
                if time.monotonic() - saved > SAVE_EVERY_S:
                    saved = time.monotonic()
                    self.save()
                if self.step % self.args.every == 0 or self.step == end:
                    yield pool.held_out, losses
                    losses = []
                if self.step == end:
                    break
            for name in due:
                self.passes[name] += 1
        self.save()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("chats", "held-out", "train", "evaluate", "ship"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where the demo model was fetched to")
    parser.add_argument("--seed", type=int, default=1, help="chats: one per process")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="chats: to write in all")
    parser.add_argument("--slots", type=int, default=96, help="chats: written at once")
    parser.add_argument("--head", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--like", type=int, help="train: begin with another head's checkpoint")
    parser.add_argument("--steps", type=int, default=640, help="train: of head and its beginning")
    parser.add_argument("--stop", type=int, help="train: the step to stop at for now")
    parser.add_argument("--batch", type=int, default=4096, help="train: tokens of a step")
    parser.add_argument("--rate", type=float, default=0.005)
    parser.add_argument("--fall", type=float, default=0.4, help="train: part of the steps")
    parser.add_argument("--every", type=int, default=50, help="train: steps between measurements")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed * 10 + args.head)
    source = open_source(demo_folder(args.cache) / "download")
    chats = args.work / "chats"
    if args.what == "held-out":
        folder = args.work / args.what
        write_chats(source, folder, tokens=HELD_OUT_TOKENS, batch=64, seed=HELD_OUT_SEED)
    elif args.what == "chats":
        write_chats(source, chats, tokens=args.tokens, batch=args.slots, seed=args.seed)
    elif args.what == "train":
        Trainer(source, args).run(Pool(args.work))
    else:
        import drafter_report

        results: dict[str, Any] = drafter_report.evaluate(source, args.work, args.cache)
        if args.what == "ship":
            drafter_report.ship(source, args.work, results)
        print(json.dumps(results))


if __name__ == "__main__":
    main()
