"""The quality report: what weights lost, both models on the same texts, what is kept and judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoints import tiny_config, write_fp8
from demo_fixtures import tiny_metadata

from mimo_local import cli
from mimo_local.demo.tokenizer_files import files_from_gguf
from mimo_local.errors import CancelledError, ExitCode, MimoError, PackError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.passing import PassingStore
from mimo_local.experts.store import ExpertStore
from mimo_local.fidelity import run, side
from mimo_local.fidelity.kept import Kept, State
from mimo_local.fidelity.scores import Scores
from mimo_local.model import Model, Segment
from mimo_local.weights import PackWeights, open_weights
from quant import measure, quality
from quant.convert import Recipe, convert
from quant.formats import get_format
from quant.measure import Loss, Sums, Tally, relative_rms
from quant.pack import Pack
from quant.quality import Figures, Reading, Report

CONFIG = tiny.config(hidden=64, moe_intermediate=64, intermediate=64, vocab=288, window=9)
TOKENS = 40
"""Of each text: several windows."""


def with_tokenizer(folder: Path) -> Path:
    for name, text in files_from_gguf(tiny_metadata(), folder, eos=2).items():
        if name != "generation_config.json":
            (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(tiny.write(tmp_path_factory.mktemp("src"), CONFIG, mtp_layers=1))


@pytest.fixture(scope="module")
def nf4(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("nf4") / "pack", Recipe()).path


def copy_of(pack: Path, to: Path) -> Path:
    to.mkdir()
    for file in pack.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# ---- weights -------------------------------------------------------------------------------------


def test_every_row_counts_once_and_runs_stand_for_the_rest() -> None:
    assert list(measure.sampled(32)) == [(slice(0, 32), 1.0)]
    runs = list(measure.sampled(1000))
    assert runs[0][0].start == 0 and runs[-1][0].stop == 1000
    assert sum(times * (rows.stop - rows.start) for rows, times in runs) == pytest.approx(1000)
    assert all(rows.stop <= 33 for rows, _ in measure.sampled(33))


def test_a_tally_sums_pieces_and_joins_a_layers_experts() -> None:
    fmt, tally = get_format("nf4"), Tally()
    g = torch.Generator().manual_seed(0)
    mats = [torch.randn(30, 128, generator=g) * s for s in (1.0, 5.0)]
    mats[1][3, 7] = 400.0  # an outlier costs its whole block
    names = [f"model.layers.4.mlp.experts.{e}.up_proj.weight" for e in (3, 11)]
    stored = [fmt.unpack(fmt.pack(w)) for w in mats]
    for name, w in zip(names, mats, strict=True):
        for rows in (slice(0, 20), slice(20, 30)):
            tally.add(name, fmt, w[rows], fmt.pack(w[rows]))
    tally.add("model.norm.weight", get_format("f32"), torch.ones(8), {"weight": torch.ones(8)})
    (loss,) = tally.take()
    assert (loss.name, loss.role) == ("model.layers.4.mlp.experts.*.up_proj.weight", "experts")
    assert (loss.matrices, loss.worst_name) == (2, names[1])
    assert loss.rms == pytest.approx(relative_rms(torch.cat(mats), torch.cat(stored)), rel=1e-5)
    assert loss.worst == pytest.approx(relative_rms(mats[1], stored[1]), rel=1e-5)
    assert tally.take() == []


def test_nothing_lost_and_nothing_there() -> None:
    assert Sums().rms == 0.0
    assert relative_rms(torch.zeros(4), torch.zeros(4)) == 0.0
    assert relative_rms(torch.zeros(4), torch.ones(4)) == 1.0


def test_a_conversion_reports_what_its_pack_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every row looked at, the figures are those of the finished pack, experts included."""
    monkeypatch.setattr(measure, "RUN", 1000)
    found = quality.read(convert(source, tmp_path / "pack", Recipe()))
    assert found is not None and found.reading is None
    weights, state = open_weights(tmp_path / "pack"), tiny.state_dict(CONFIG, mtp_layers=1)
    assert isinstance(weights, PackWeights)
    by_name = {loss.name: loss for loss in found.losses}
    name = "model.layers.1.self_attn.o_proj.weight"
    kept = weights.linear(name)
    assert by_name[name].rms == pytest.approx(
        relative_rms(state[name], kept.format.unpack(kept.parts)), rel=1e-4
    )
    experts = [weights.expert(2, e).down for e in range(8)]
    names = [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(8)]
    each = [
        relative_rms(state[n], x.format.unpack(x.parts))
        for n, x in zip(names, experts, strict=True)
    ]
    loss = by_name["model.layers.2.mlp.experts.*.down_proj.weight"]
    assert (loss.matrices, loss.format) == (8, "nf4")
    assert loss.worst == pytest.approx(max(each), rel=1e-4)
    assert loss.worst_name == names[each.index(max(each))]
    assert by_name["model.mtp.layers.0.eh_proj.weight"].role == "mtp"
    assert "model.layers.1.mlp.gate.weight" in by_name  # kept exact, and said so
    assert by_name["model.layers.1.mlp.gate.weight"].rms == 0


def test_an_interrupted_conversion_reports_the_same(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", Recipe())
    asked = iter(range(20))
    with pytest.raises(CancelledError):
        convert(source, tmp_path / "cut", Recipe(), cancel=lambda: next(asked, None) is None)
    assert not (tmp_path / "cut" / quality.FILE).exists()
    convert(source, tmp_path / "cut", Recipe()).verify()
    texts = [(tmp_path / name / quality.FILE).read_bytes() for name in ("whole", "cut")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(version=2),
        lambda d: d["pack"].update(fingerprint="0" * 64),
        lambda d: d["losses"][0].update(rms=float("nan")),
        lambda d: d["losses"][0].update(rms="0.1"),
        lambda d: d["losses"][0].update(worst_name="a\x1b[2Jb"),
        lambda d: d["losses"][0].update(role="king"),
        lambda d: d["losses"][0].update(format=["nf4"]),
        lambda d: d["losses"][0].pop("worst"),
        lambda d: d.update(losses=3),
        lambda d: d.update(reading={"kernels": "x", "source": None, "texts": [], "drift": []}),
    ],
)
def test_a_report_that_is_not_this_packs_is_none(
    nf4: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    pack = copy_of(nf4, tmp_path / "pack")
    data = json.loads((pack / quality.FILE).read_text())
    spoil(data)
    (pack / quality.FILE).write_text(json.dumps(data))
    with Pack.open(pack) as opened:
        opened.verify()
        assert quality.read(opened) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000])
def test_rubbish_is_no_report(nf4: Path, tmp_path: Path, data: bytes) -> None:
    pack = copy_of(nf4, tmp_path / "pack")
    (pack / quality.FILE).write_bytes(data)
    with Pack.open(pack) as opened:
        assert quality.read(opened) is None


# ---- two models' logits --------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("block", [1, 7, 50])
def test_scores_of_blocks_are_those_of_whole_logits(block: int, spread: float) -> None:
    g = torch.Generator().manual_seed(int(spread))
    exact = torch.randn(20, 50, generator=g) * spread
    other = exact + torch.randn(20, 50, generator=g) * 0.3
    targets = torch.randint(0, 50, (20,), generator=g)
    scores = Scores(targets, two=True)
    for a, b in zip(other.split(block, 1), exact.split(block, 1), strict=True):
        scores.add(a, b)
    p, q = exact.double().log_softmax(1), other.double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1)
    rows = slice(3, 20)
    found = scores.figures(rows)
    nll = [-x.gather(1, targets[:, None])[rows].mean().item() for x in (q, p)]
    assert found.positions == 17
    assert found.perplexity == pytest.approx(math.exp(nll[0]), rel=1e-5)
    assert found.source_perplexity == pytest.approx(math.exp(nll[1]), rel=1e-5)
    assert found.kl == pytest.approx(kl[rows].mean().item(), rel=1e-5, abs=1e-12)
    assert found.kl_99 == pytest.approx(kl[rows].quantile(0.99).item(), rel=1e-5, abs=1e-12)
    same = (exact.argmax(1) == other.argmax(1))[rows].double().mean().item()
    assert found.top1 == pytest.approx(same, rel=1e-5)
    more = (-q + p).gather(1, targets[:, None])[rows, 0]
    assert found.change == pytest.approx(torch.expm1(more.mean()).item(), rel=1e-4, abs=1e-9)


def test_the_same_logits_are_no_distance_apart() -> None:
    z = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)) * 40
    scores = Scores(torch.zeros(5, dtype=torch.int64), two=True)
    scores.add(z, z)
    found = scores.figures(slice(0, 5))
    assert (found.kl, found.change, found.top1) == (0, 0, 1)


def test_logits_that_are_no_numbers_are_told_apart() -> None:
    z = torch.zeros(2, 4)
    for pack, source, whose in (
        (z, z, None),
        (z + math.nan, z, "pack"),
        (z, z + math.inf, "source"),
        (z - math.inf, None, "pack"),
    ):
        scores = Scores(torch.tensor([0, 3]), two=source is not None)
        scores.add(pack, source)
        assert scores.broken() == whose


# ---- through the layers --------------------------------------------------------------------------


def test_a_pass_reads_as_the_engine_does(source: Path, nf4: Path, way: str) -> None:
    """Every text's logits are those of the same model loaded whole."""
    ids = [run.Ids.read(nf4, None, n, 4096) for n in (TOKENS, 17)]
    for folder, exact in ((nf4, False), (source, True)):
        for texts in ids:
            weights = open_weights(folder)
            mine = side.Side(weights, texts.lengths, exact=exact)
            x = mine.embed(texts.rows)
            for spec in weights.config.layers:
                x = mine.through(spec, x, lambda share: None)
            found = torch.cat(list(mine.logits(mine.normed(x))), 1)
            model = Model(weights, ExpertStore(weights))
            dtype = torch.float32 if exact else torch.bfloat16
            wanted = torch.cat(
                [
                    model.logits(
                        model.forward([Segment(torch.tensor(t), model.new_cache(dtype=dtype))])
                    )
                    for t in texts.texts
                ]
            )
            close = 1e-3 if exact or way == "torch" else 0.06  # the kernels round activations
            assert relative_rms(wanted, found) < close


@pytest.mark.parametrize("exact", [False, True])
def test_passing_experts_are_the_held_ones(nf4: Path, exact: bool, way: str) -> None:
    weights, layer = open_weights(nf4), 2
    g = torch.Generator().manual_seed(2)
    x = torch.randn(30, 64, generator=g)
    ids = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(30)]).int()
    ids[4, 1] = -1
    w = torch.rand(30, 2, generator=g)
    shares: list[float] = []
    passing = PassingStore(weights, exact=exact)
    passing.on_expert = shares.append
    found = passing.sweep(layer, x, ids, w)
    wanted = ExpertStore(weights).run_torch(layer, x, ids, w)
    assert relative_rms(wanted, found) < (1e-5 if exact or way == "torch" else 0.03)
    assert shares[-1] == 1.0 and shares == sorted(shares)


def test_exact_weights_are_no_distance_apart(
    source: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keys and values in bfloat16, as packs have them, flip a router's close decisions here.
    monkeypatch.setattr(side, "kv_dtype", lambda wish, kind: torch.float32)
    pack = convert(source, tmp_path / "pack", Recipe.uniform("f32")).path
    found = run.measure(pack, source, tokens=TOKENS).reading
    assert found is not None and found.source == "its checkpoint"
    assert set(found.texts) == {"chinese", "code", "english", "all"}
    total = found.texts["all"]
    assert total.positions == 3 * (TOKENS - 1)
    assert total.kl is not None and total.top1 == 1 and total.change is not None
    assert total.kl < 1e-6 and abs(total.change) < 1e-4
    assert len(found.drift) == 4 and max(found.drift) < 1e-4


def test_fewer_bits_are_further_away(tmp_path: Path) -> None:
    """Without routers: of random ones the smallest error flips some choice."""
    config = tiny.config(mlp="dddd", hidden=64, intermediate=64, v_head_dim=16, vocab=288)
    src = with_tokenizer(tiny.write(tmp_path / "src", config))
    found = {}
    for fmt in ("bf16", "int8", "nf4"):
        pack = convert(src, tmp_path / fmt, Recipe.uniform(fmt)).path
        reading = run.measure(pack, src, tokens=TOKENS).reading
        assert reading is not None
        found[fmt] = (reading.texts["all"].kl or 0, reading.drift[-1])
    for fewer, more in (("nf4", "int8"), ("int8", "bf16")):
        assert found[fewer][0] > 3 * found[more][0] > 0
        assert found[fewer][1] > 2 * found[more][1] > 0


def test_against_another_pack_or_an_fp8_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=320, partial_rotary_factor=0.334, rope_theta=1e4,
                         swa_rope_theta=1e4, sliding_window=8, sliding_window_size=8,
                         max_position_embeddings=512, attention_value_scale=0.7)  # fmt: skip
    write_fp8(tmp_path / "src", config)
    with_tokenizer(tmp_path / "src")
    packs = {f: convert(tmp_path / "src", tmp_path / f, Recipe.for_format(f)) for f in
             ("bf16", "nf4")}  # fmt: skip
    old = quality.read(packs["nf4"])
    (tmp_path / "nf4" / quality.FILE).unlink()  # as an older version made it
    by_source = run.measure(tmp_path / "nf4", tmp_path / "src", tokens=20)
    assert by_source.reading is not None and by_source.reading.source == "its checkpoint"
    assert old is not None
    mine, theirs = ({x.name: x for x in r.losses} for r in (by_source, old))
    assert mine.keys() == theirs.keys()
    for name, loss in mine.items():
        assert replace(loss, rms=0, worst=0) == replace(theirs[name], rms=0, worst=0)
        assert (loss.rms, loss.worst) == pytest.approx((theirs[name].rms, theirs[name].worst), 1e-4)
    by_pack = run.measure(tmp_path / "nf4", tmp_path / "bf16", tokens=20).reading
    assert by_pack is not None and by_pack.source == "another pack"
    ours, exact = by_pack.texts["all"].kl, by_source.reading.texts["all"].kl
    assert ours == pytest.approx(exact, rel=0.2)


def test_alone_a_pack_has_a_perplexity_and_keeps_what_was_measured(
    source: Path, nf4: Path, tmp_path: Path
) -> None:
    pack = copy_of(nf4, tmp_path / "pack")
    text = tmp_path / "own.txt"
    text.write_text("the inner tale " * 8)
    alone = run.measure(pack, text=text)
    assert alone.reading is not None and alone.reading.source is None
    assert set(alone.reading.texts) == {"own", "all"} and alone.reading.texts["own"].kl is None
    assert run.stored_report(pack) == replace(alone, reading=None)  # of other texts
    beside = Reading("k", "its checkpoint", alone.reading.texts, [])
    with Pack.open(pack) as opened:
        quality.write(opened, replace(alone, reading=beside))
        opened.verify()
    run.measure(pack, tokens=20)
    kept = run.stored_report(pack)
    assert kept is not None and kept.reading == beside


def test_a_better_witness_stays(source: Path, nf4: Path, tmp_path: Path, short: Path) -> None:
    """Beside its own checkpoint > beside something else > alone; losses only of its own."""
    pack = copy_of(nf4, tmp_path / "pack")
    (pack / quality.FILE).unlink()
    other = convert(source, tmp_path / "int8", Recipe.for_format("int8")).path
    kept = []
    for beside in (None, other, None, source, other, None):
        found = run.measure(pack, beside)
        assert found.losses or beside is None
        report = run.stored_report(pack)
        assert report is not None and report.reading is not None
        kept.append((report.reading.source, bool(report.losses)))
    assert kept == [
        (None, False),
        ("another pack", False),
        ("another pack", False),
        *[("its checkpoint", True)] * 3,
    ]


def test_a_pack_that_cannot_be_written_to_is_measured_all_the_same(
    nf4: Path, tmp_path: Path, short: Path
) -> None:
    pack = copy_of(nf4, tmp_path / "pack")
    (pack / quality.FILE).unlink()
    (pack / quality.FILE).mkdir()
    notes: list[str] = []
    assert run.measure(pack, note=notes.append).reading is not None
    assert "not written into the pack" in notes[0]


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped text of a few words."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "english.txt").write_text("a short one, for speed")
    monkeypatch.setattr(run, "TEXTS", tmp_path / "texts")
    return tmp_path / "texts"


# ---- stopping and going on -----------------------------------------------------------------------


def stop_at(layer: int) -> Callable[[Progress], None]:
    def told(event: Progress) -> None:
        if event.stage == f"measuring layer {layer}":
            raise KeyboardInterrupt

    return told


def test_stopped_it_goes_on_where_it_was(
    source: Path, nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, keep = copy_of(nf4, tmp_path / "pack"), tmp_path / "keep"
    whole = run.measure(pack, source, tokens=TOKENS, keep=keep)
    assert not list(keep.glob("*"))
    with pytest.raises(CancelledError, match="2 layers were read") as stopped:
        run.measure(pack, source, tokens=TOKENS, keep=keep, on_progress=stop_at(2))
    assert "run the same command again" in stopped.value.hint
    seen: list[int] = []
    real = side.Side.through

    def through(self: side.Side, spec: Any, *args: Any) -> torch.Tensor:
        seen.append(spec.index)
        return real(self, spec, *args)

    monkeypatch.setattr(side.Side, "through", through)
    told: list[Progress] = []
    assert run.measure(pack, source, tokens=TOKENS, keep=keep, on_progress=told.append) == whole
    assert seen == [2, 2, 3, 3]
    assert [e.done for e in told] == sorted(e.done for e in told)
    assert told[-1].done == told[-1].total
    assert not list(keep.glob("*"))


def test_of_another_text_nothing_is_taken_up(nf4: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    with pytest.raises(CancelledError):
        run.measure(nf4, tokens=20, keep=keep, on_progress=stop_at(3))
    told: list[Progress] = []
    run.measure(nf4, tokens=21, keep=keep, on_progress=told.append)
    assert told[0].stage == "measuring layer 0"
    assert len(list(keep.glob("*"))) == 1


def test_a_damaged_or_impossible_file_is_as_none(tmp_path: Path) -> None:
    kept = Kept(tmp_path, ["x"])
    state = State(3, [torch.ones(2, 4)], [0.5], [])
    assert kept.save(state) and kept.path is not None
    back = kept.load()
    assert back is not None and back.layers == 3 and torch.equal(back.hidden[0], state.hidden[0])
    data = kept.path.read_bytes()
    for bad in (b"", data[:30], data[:-3], b"\xff" * 64):
        kept.path.write_bytes(bad)
        assert kept.load() is None
    (tmp_path / "file").write_text("")
    assert not Kept(tmp_path / "file", ["x"]).save(state)
    assert not Kept(None, ["x"]).save(state)


def test_without_a_place_to_keep_it_says_so(nf4: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CancelledError) as stopped:
        run.measure(nf4, tokens=20, keep=tmp_path / "file", on_progress=stop_at(1))
    assert "from the start" in stopped.value.hint


# ---- what cannot be measured ---------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(source: Path, nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no pack"):
        run.measure(source, nf4)
    other = tiny.write(tmp_path / "other", CONFIG | {"vocab_size": 290})
    with pytest.raises(UsageError, match="not of one model"):
        run.measure(nf4, other)
    (tmp_path / "short.txt").write_text("e")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for text, said in (
        ("short.txt", "fewer than two"),
        ("binary.txt", "cannot read"),
        ("none.txt", "cannot read"),
    ):
        with pytest.raises(UsageError, match=said):
            run.measure(nf4, text=tmp_path / text)


def test_a_damaged_pack_is_named(source: Path, nf4: Path, tmp_path: Path) -> None:
    pack = copy_of(nf4, tmp_path / "pack")
    (pack / "experts-002.safetensors").write_bytes(b"")
    with pytest.raises(PackError, match=r"experts-002"):
        run.measure(pack, source)


def test_a_model_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    state = tiny.state_dict(CONFIG)
    state["model.norm.weight"] = state["model.norm.weight"] * math.nan
    src = with_tokenizer(tiny.write(tmp_path / "src", CONFIG, state=state))
    with pytest.raises(MimoError, match="NaN"):
        run.measure(convert(src, tmp_path / "pack").path, tokens=10)


def test_another_checkpoint_is_said(nf4: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "other", CONFIG, seed=1)
    found = run.measure(nf4, other, tokens=10)
    assert found.reading is not None and found.reading.source == "another checkpoint"
    assert any("made of" in warning for warning in quality.warnings(found))


# ---- judging -------------------------------------------------------------------------------------


def report(fmt: str, worst: float = 0.01, **figures: Any) -> Report:
    loss = Loss("model.layers.1.x", "attention", fmt, 1, worst / 2, worst, "model.layers.1.x")
    usual = {"positions": 9, "perplexity": 20.0, "source_perplexity": 19.9, "change": 0.001,
             "change_error": 0.001, "kl": 0.001, "kl_99": 0.1, "top1": 0.99}  # fmt: skip
    return Report([loss], Reading("k", "x", {"all": Figures(**{**usual, **figures})}, []))


def test_the_usual_gives_no_warning() -> None:
    for fmt in quality.USUAL_LOSS:
        assert quality.warnings(report(fmt, quality.USUAL_LOSS[fmt])) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (report("int8", 0.2), "outliers"),
        (report("int8", kl=0.05), "KL 0.05"),
        (report("nf4", kl=0.9), "KL 0.9"),
        (report("int8", top1=0.8), "top-1 agreement 80.0%"),
        (report("nf4", change=0.5), "perplexity +50.0%"),
        (report("nf4", source_perplexity=5000.0), "the source itself"),
        (report("nf4", perplexity=5000.0, source_perplexity=None, kl=None), "the pack itself"),
    ],
)
def test_each_range_has_its_warning(found: Report, said: str) -> None:
    (warning,) = quality.warnings(found)
    assert said in warning


def test_a_change_within_its_own_error_is_none() -> None:
    assert quality.warnings(report("int8", change=0.02, change_error=0.006)) == []
    assert len(quality.warnings(report("int8", change=0.02, change_error=0.004))) == 1


def test_four_bits_may_lose_what_eight_may_not() -> None:
    assert quality.warnings(report("nf4", kl=0.05, top1=0.8, change=0.05)) == []
    assert len(quality.warnings(report("int8", kl=0.05, top1=0.8, change=0.05))) == 3


@pytest.mark.parametrize("loss", [("gauss", False), ("outliers", True)])
def test_the_ranges_tell_outliers_from_what_is_usual(loss: tuple[str, bool]) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 4096, generator=g)
    if loss[0] == "outliers":
        w[torch.rand(w.shape, generator=g) < 0.002] *= 20
    for name in ("nf4", "int8"):
        fmt, tally = get_format(name), Tally()
        tally.add("model.layers.0.self_attn.q_proj.weight", fmt, w, fmt.pack(w))
        assert bool(quality.warnings(Report(tally.take()))) == loss[1], name


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_tables_or_json(
    source: Path, nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = copy_of(nf4, tmp_path / "pack")
    assert cli.main(["measure", str(pack), str(source), "--tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert "| experts" in out and "| english" in out and "its checkpoint" in out
    assert max(map(len, out.splitlines())) <= 100 and "…" not in out
    assert "warning: the source itself" in err  # random weights
    assert cli.main(["measure", str(pack), "--stored", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["reading"] is None and data["losses"]
    (pack / quality.FILE).unlink()
    assert cli.main(["measure", str(pack), "--stored"]) == ExitCode.USAGE
    assert "has no quality report" in capsys.readouterr().err


def test_a_conversion_ends_with_its_table(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    short: Path,
) -> None:
    args = ["quantize", str(source), str(tmp_path / "pack"), "--format", "int8", "--yes"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'pack'}\n"
    assert "| experts" in err and "perplexity" not in err
    assert cli.main([*args, "--measure"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'pack'}\n" and "| english" in err
    found = run.stored_report(tmp_path / "pack")
    assert found is not None and found.reading is not None
    assert cli.main(["measure", str(tmp_path / "pack"), "--stored"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[1] for line in lines if line.startswith(("| english", "| all"))]
    assert rows == ["english", "all"]


def test_calibrated_experts_may_lose_more_of_their_weights_and_nothing_else_may() -> None:
    def with_loss(role: str, fmt: str, worst: float, method: str) -> Report:
        loss = Loss("model.layers.1.x", role, fmt, 1, worst / 2, worst, "model.layers.1.x")
        return Report([loss], None, method)

    heard = "nf4 by error feedback, from 99 tokens"
    assert quality.warnings(with_loss("experts", "nf4", 0.17, heard)) == []
    for role, fmt, worst, method in (
        ("experts", "nf4", 0.17, ""),
        ("experts", "nf4", 0.26, heard),
        ("attention", "nf4", 0.17, heard),
        ("experts", "int8", 0.17, heard),
    ):
        (warning,) = quality.warnings(with_loss(role, fmt, worst, method))
        assert "outliers" in warning
