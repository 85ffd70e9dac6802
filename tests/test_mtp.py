"""The MTP layers against formulas written out for this test, whatever the drafter has kept."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import mtp
from mimo_local.cache import KVCache
from mimo_local.draft_cache import DraftCache
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.mtp import Drafter, packed_smaller
from mimo_local.weights import open_weights

WINDOW = 9
MTP = 3


pytestmark = pytest.mark.usefixtures("way")


class Reference:
    """Spec of one MTP layer, a row at a time: no caches, no shared code."""

    def __init__(self, d: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        self.d, self.state = d, {name: t.double() for name, t in state.items()}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.d["layernorm_epsilon"]).rsqrt()
        return x * scale * self.state[name + ".weight"]

    def turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """x (heads, dim): the first r dims rotated, dim i with i + r / 2."""
        r = int(x.shape[-1] * self.d["partial_rotary_factor"])
        r -= r % 2
        out = x.clone()
        for i in range(r // 2):
            angle = position / self.d["swa_rope_theta"] ** (2 * i / r)
            a, b = x[:, i], x[:, i + r // 2]
            out[:, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i + r // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def logits(self, k: int, hidden: torch.Tensor, ids: list[int], at: int) -> torch.Tensor:
        """hidden (n, D), `ids` (both from position 0 on) -> (V,) of layer k at position `at`."""
        d, p = self.d, f"model.mtp.layers.{k}."
        heads, groups = d["swa_num_attention_heads"], d["swa_num_key_value_heads"]
        dk, dv = d["swa_head_dim"], d["swa_v_head_dim"]
        positions = range(max(0, at + 1 - WINDOW), at + 1)
        streams, keys, values = {}, {}, {}
        for i in positions:
            embedded = self.state["model.embed_tokens.weight"][ids[i + 1 + k]]
            both = torch.cat(
                (self.norm(embedded, p + "enorm"), self.norm(hidden[i].double(), p + "hnorm"))
            )
            streams[i] = self.state[p + "eh_proj.weight"] @ both
            x = self.norm(streams[i], p + "input_layernorm")
            k_ = (self.state[p + "self_attn.k_proj.weight"] @ x).view(groups, dk)
            keys[i] = self.turned(k_, i)
            v = self.state[p + "self_attn.v_proj.weight"] @ x
            values[i] = (d["attention_value_scale"] or 1.0) * v.view(groups, dv)
        u = streams[at]
        x = self.norm(u, p + "input_layernorm")
        q = self.turned((self.state[p + "self_attn.q_proj.weight"] @ x).view(heads, dk), at)
        out = torch.zeros(heads, dv, dtype=torch.float64)
        for head in range(heads):
            g = head // (heads // groups)
            scores = torch.stack([q[head] @ keys[i][g] / math.sqrt(dk) for i in positions]).exp()
            mass = scores.sum()
            sink = self.state.get(p + "self_attn.attention_sink_bias")
            if sink is not None:
                mass = mass + sink[head].exp()
            for score, i in zip(scores, positions, strict=True):
                out[head] += score / mass * values[i][g]
        u = u + self.state[p + "self_attn.o_proj.weight"] @ out.flatten()
        x = self.norm(u, p + "pre_mlp_layernorm")
        gate = self.state[p + "mlp.gate_proj.weight"] @ x
        up = self.state[p + "mlp.up_proj.weight"] @ x
        u = u + self.state[p + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        head_name = "model.embed_tokens.weight" if d["tie_word_embeddings"] else "lm_head.weight"
        return self.state[head_name] @ self.norm(u, p + "final_layernorm")


class Sequence:
    """A sequence read by the model, with what the drafter keeps of it and what it should know."""

    def __init__(self, model: Model, drafter: Drafter, reference: Reference) -> None:
        self.model, self.drafter, self.reference = model, drafter, reference
        self.cache: KVCache = model.new_cache()
        self.cache.draft = self.state = drafter.new_cache(torch.float32, self.cache.slack)
        self.ids: list[int] = []
        self.hidden = torch.zeros(0, model.config.hidden_size)

    def read(self, ids: list[int], tail: int | None = None) -> None:
        segment = Segment(torch.tensor(ids), self.cache)
        hidden = self.model.forward([segment])
        self.ids += ids
        self.hidden = torch.cat([self.hidden, hidden])
        self.state.add(hidden if tail is None else hidden[-tail:], self.cache.length)

    def back(self, n: int) -> None:
        self.cache.truncate(n)
        self.ids, self.hidden = self.ids[:n], self.hidden[:n]

    def check(self, drawn: int, *, deep: int = MTP) -> None:
        """Drafts after one more id are the reference's, with their probabilities."""
        known = [*self.ids, drawn]
        at = len(self.ids) - 1
        for k, (found, p) in enumerate(self.drafter.drafts(self.cache, known)):
            logits = self.reference.logits(k, self.hidden, known + self.drafted(k), at)
            wanted = logits.softmax(-1)
            assert p == pytest.approx(float(wanted.max()), rel=2e-3)
            assert float(wanted[found]) == pytest.approx(float(wanted.max()), rel=2e-3)
            self.made = [*self.drafted(k), found]
            if k + 1 == deep:
                return
        else:
            assert deep == MTP

    def drafted(self, k: int) -> list[int]:
        return self.made[:k] if k else []


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no sinks, tied, groups": {"swa_sink": False, "tied": True, "swa_heads": 8, "swa_kv_heads": 4},
    "other heads, no value scale": {"swa_head_dim": 32, "swa_v_head_dim": 8, "value_scale": None},
}


@pytest.fixture(params=CONFIGS)
def sequence(request: pytest.FixtureRequest, tmp_path: Path) -> Sequence:
    d = tiny.config(window=WINDOW, num_nextn_predict_layers=MTP, **CONFIGS[request.param])
    state = tiny.state_dict(d, seed=4, mtp_layers=MTP)
    weights = open_weights(tiny.write(tmp_path, d, state=state))
    model = Model(weights, ExpertStore(weights))
    return Sequence(model, Drafter(weights, model, small_head=False), Reference(d, state))


def some(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(64), k=n)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 10, 30, 75])
def test_after_a_prompt(sequence: Sequence, n: int) -> None:
    sequence.read(some(n))
    sequence.check(5)
    sequence.check(6)  # another id in the same place: nothing of the first one is left
    assert [ring.length for ring in sequence.state.rings] == [max(0, n - 1 - k) for k in range(MTP)]


def test_token_by_token_and_in_steps_of_several_with_some_taken_back(sequence: Sequence) -> None:
    dice = random.Random(1)
    sequence.read(some(20))
    for _ in range(25):
        sequence.check(dice.randrange(64), deep=dice.randint(1, MTP))
        n = dice.randint(1, 4)
        sequence.read(some(n, seed=dice.randrange(99)))
        sequence.back(sequence.cache.length - dice.randrange(n))


def test_pauses_of_any_length_cost_nothing_but_the_work(sequence: Sequence) -> None:
    sequence.read(some(12))
    sequence.check(1)
    for pause in (1, 5, 9, 40, 90):
        for i in range(pause):
            sequence.read(some(1, seed=i))
        sequence.check(2)


def test_the_last_window_of_a_prompt_is_enough(sequence: Sequence) -> None:
    sequence.read(some(60), tail=WINDOW)
    sequence.check(3)
    sequence.read(some(3), tail=None)
    sequence.check(4)


def test_a_rewind_forgets_what_came_from_ids_that_are_gone(sequence: Sequence) -> None:
    sequence.read(some(30))
    sequence.check(3)
    sequence.back(29)  # the id at 30, which rings were made with, never came
    sequence.read([7])
    sequence.check(8)
    sequence.back(27)
    sequence.read([1])
    sequence.check(2)


def test_a_snapshot_brings_back_a_whole_window(sequence: Sequence) -> None:
    sequence.read(some(40))
    kept = sequence.cache.snapshot()
    sequence.check(3)
    for i in range(50):
        sequence.read(some(1, seed=i))
    sequence.check(4)
    sequence.cache.restore(kept)
    sequence.ids, sequence.hidden = sequence.ids[:40], sequence.hidden[:40]
    sequence.check(5)
    sequence.read([6])
    sequence.check(7)


def test_without_hidden_states_there_are_no_drafts(sequence: Sequence) -> None:
    sequence.read(some(10))
    sequence.model.forward([Segment(torch.tensor([1]), sequence.cache)])
    assert not list(sequence.drafter.drafts(sequence.cache, [*sequence.ids, 1, 2]))
    sequence.cache.clear()
    assert not list(sequence.drafter.drafts(sequence.cache, [2]))


def test_a_row_read_alone_begins_where_nothing_is_known(sequence: Sequence) -> None:
    """Only the last row of a prompt is known: drafts are made from what there is."""
    sequence.read(some(30), tail=1)
    assert len(list(sequence.drafter.drafts(sequence.cache, [*sequence.ids, 1]))) == MTP
    assert sequence.state.first == 29


def test_memory_stays_the_same(sequence: Sequence) -> None:
    before = sequence.state.nbytes
    sequence.read(some(200))
    sequence.check(1)
    assert sequence.state.nbytes == before
    assert sequence.cache.nbytes["draft"] == before


def test_a_smaller_head_is_the_head_to_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = tiny.config(hidden=128, vocab=5000, num_nextn_predict_layers=MTP)
    weights = open_weights(tiny.write(tmp_path, d, mtp_layers=MTP))
    head = weights.linear("lm_head.weight")
    assert packed_smaller(head) is head  # in the processor's cache it is no faster
    monkeypatch.setattr(mtp, "SMALL_HEAD", 1000)
    small = packed_smaller(head)
    wanted, got = head.format.unpack(head.parts), small.format.unpack(small.parts)
    assert small.nbytes < head.nbytes / 6
    assert float((got - wanted).norm() / wanted.norm()) < 0.1
    narrow = open_weights(tiny.write(tmp_path / "narrow", tiny.config())).linear("lm_head.weight")
    assert packed_smaller(narrow) is narrow  # 32 columns


def test_a_draft_cache_needs_mtp_layers(tmp_path: Path) -> None:
    config = open_weights(tiny.write(tmp_path, tiny.config())).config
    with pytest.raises(ValueError, match="no MTP layers"):
        DraftCache(config, dtype=torch.float32)
