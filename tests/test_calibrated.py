"""NF4 by importance: weighted search, error feedback, what was heard, and conversions with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from demo_fixtures import tiny_metadata
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import cli, kernels
from mimo_local.demo.tokenizer_files import files_from_gguf
from mimo_local.errors import CancelledError, ExitCode, NativeError, PackError, UsageError
from mimo_local.events import Progress
from mimo_local.fidelity import budget, calibration
from mimo_local.fidelity.calibration import FILE, Calibration, texts_for
from mimo_local.fidelity.side import Side
from mimo_local.weights import open_weights
from quant.calibrated import Importance, importance_of, pack_nf4, upper_factor
from quant.checkpoint import Checkpoint
from quant.convert import Recipe, convert
from quant.formats import Parts, get_format
from quant.fp8 import Fp8Rows
from quant.pack import Pack

torch.set_num_threads(1)
NF4 = get_format("nf4")
CONFIG = tiny.config(hidden=64, moe_intermediate=64, intermediate=64, vocab=288, window=9)
TOKENS = 24
KINDS = ("normal", "heavy", "outliers", "sparse", "large")


def matrix(kind: str, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * 0.02
    if kind == "heavy":
        w *= torch.randn(rows, cols, generator=g).square()
    elif kind == "outliers":
        w[:, ::61] *= 40
    elif kind == "sparse":
        w[:, :64] = 0
        w[::3] = 0
    elif kind == "large":
        w *= 1e7
    return w


def energies(cols: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.exp(spread * torch.randn(cols, generator=torch.Generator().manual_seed(seed)))


def block_errors(w: torch.Tensor, parts: Parts, columns: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every block, in double."""
    lost = (NF4.unpack(parts).double() - w.double()).square() * columns.double()
    return lost.view(-1, 64).sum(1)


@pytest.fixture(params=["native", "twin"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "twin":
        monkeypatch.setattr(kernels, "get", lambda: None)
    elif kernels.get() is None:
        pytest.skip("no native library here")
    yield request.param


# ---- what is heard, as importance ----------------------------------------------------------------


def test_importance_is_the_share_of_the_mean_with_a_floor() -> None:
    found = importance_of(torch.tensor([0.0, 1.0, 3.0]))
    assert found is not None
    assert found.tolist() == pytest.approx([0.01, 0.76, 2.26])


@pytest.mark.parametrize(
    "energy",
    [
        torch.zeros(64),
        torch.ones(64),
        torch.full((64,), math.nan),
        torch.full((64,), math.inf),
        -torch.ones(64),
    ],
)
def test_what_tells_no_columns_apart_is_no_importance(energy: torch.Tensor) -> None:
    assert importance_of(energy) is None


@given(st.lists(st.floats(width=32), min_size=64, max_size=64))
def test_no_rubbish_gets_through(values: list[float]) -> None:
    found = importance_of(torch.tensor(values))
    if found is not None:
        assert bool(found.isfinite().all()) and float(found.min()) >= 0.0099
        w = matrix("normal", 3, 64)
        assert bool(NF4.unpack(pack_nf4(w, Importance(found))).isfinite().all())


@pytest.mark.parametrize("broken", ["zero", "nan", "inf"])
def test_moments_nothing_can_be_made_of_give_no_factor(broken: str) -> None:
    moments = torch.eye(64)
    if broken == "zero":
        moments.zero_()
    else:
        moments[3, 4] = math.nan if broken == "nan" else math.inf
    assert upper_factor(moments, 99) is None


@pytest.mark.parametrize("rows", [1, 20, 5000])
def test_the_factor_is_of_the_shrunk_inverse_whatever_the_rank(rows: int) -> None:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 0  # a column nobody speaks in
    moments = x.T @ x
    upper = upper_factor(moments, rows)
    assert upper is not None and torch.equal(upper, upper.triu())
    h = moments.double() * rows / (64 + rows)
    h.diagonal().copy_(moments.double().diagonal())
    h = h / h.diagonal().mean() + 0.01 * torch.eye(64)
    u = upper.double()
    assert torch.allclose(u.T @ u @ h, torch.eye(64).double(), atol=1e-4)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rows", [32, 128, 2048])
def test_feedback_from_few_rows_is_hardly_worse_than_none(rows: int, together: bool) -> None:
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(32, 256, generator=g) / 32**0.5 * together
    scale = torch.exp(torch.randn(256, generator=g))
    seen, other = (
        (torch.randn(n, 256, generator=g) + torch.randn(n, 32, generator=g) @ mix) * scale
        for n in (rows, 2048)
    )
    w, columns = matrix("normal", 96, 256, 2), importance_of(seen.square().mean(0))
    assert columns is not None

    def lost(known: Importance) -> float:
        found = NF4.unpack(pack_nf4(w, known))
        return float((other @ (found - w).T).norm() / (other @ w.T).norm())

    plain = lost(Importance(columns))
    fed = lost(Importance(columns, upper_factor(seen.T @ seen, rows)))
    assert fed < (plain if together else 1.04 * plain)


# ---- weighted search -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS), spread=st.sampled_from([0.1, 1.0, 3.0]), seed=st.integers(0, 99)
)
def test_weighted_search_is_never_worse_in_the_weighted_error(
    kind: str, spread: float, seed: int
) -> None:
    w = matrix(kind, 5, 192, seed)
    columns = importance_of(energies(192, spread, seed))
    assert columns is not None
    before = block_errors(w, NF4.pack(w), columns)
    after = block_errors(w, pack_nf4(w, Importance(columns)), columns)
    assert (after <= before * (1 + 1e-5) + 1e-30).all()


def test_it_gains_where_columns_differ(way: str) -> None:
    w = matrix("normal", 64, 512)
    columns = importance_of(energies(512, 1.0))
    assert columns is not None
    before = block_errors(w, NF4.pack(w), columns).sum()
    parts = pack_nf4(w, Importance(columns))
    assert block_errors(w, parts, columns).sum() < 0.8 * before
    negative = (parts["scales"] < 0).float().mean()
    assert 0.3 < negative < 0.7  # the side with more values goes where it helps


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_and_twin_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.get() is None:
        pytest.skip("no native library here: the twin is all there is")
    w, columns = matrix(kind, 33, 320, 3), importance_of(energies(320, 1.0, 3))
    x = torch.randn(99, 320, generator=torch.Generator().manual_seed(4))
    upper = upper_factor(x.T @ x, len(x))
    assert columns is not None and upper is not None
    for known in (Importance(columns), Importance(columns, upper)):
        native = pack_nf4(w, known)
        with monkeypatch.context() as without:
            without.setattr(kernels, "get", lambda: None)
            twin = pack_nf4(w, known)
        # Float sums in another order: near ties may fall the other way.
        assert (native["scales"] != twin["scales"]).float().mean() <= 0.02
        assert (native["codes"] != twin["codes"]).float().mean() <= 0.02


def test_every_table_gives_the_same_bits() -> None:
    library = kernels.get()
    if library is None:
        pytest.skip("no native library here")
    w, columns = matrix("heavy", 9, 256, 5), importance_of(energies(256, 2.0, 5))
    assert columns is not None
    upper = upper_factor(torch.diag(columns) + 0.3, 256)
    assert upper is not None
    found = []
    for isa in ("scalar", "avx2", "avx_vnni", "avx512"):
        try:
            k = library.with_isa(isa)
        except NativeError:
            continue
        codes, scales = torch.empty(9, 128, dtype=torch.uint8), torch.empty(9, 4).half()
        k.quantize(
            kernels.NF4, w.data_ptr(), 9, 256, codes.data_ptr(), scales.data_ptr(), True,
            importance_ptr=columns.data_ptr(),
        )  # fmt: skip
        found.append((codes, scales))
        lost = torch.empty(9, 64)
        codes, scales = torch.zeros(9, 32, dtype=torch.uint8), torch.empty(9, 1).half()
        k.call(
            "nf4_feedback", w.data_ptr(), 256, upper.data_ptr(), 256, 9, codes.data_ptr(), 32,
            scales.data_ptr(), 2, lost.data_ptr(),
        )  # fmt: skip
        found.append((codes, scales, lost))
    for i in range(2):
        for other in found[i + 2 :: 2]:
            assert all(torch.equal(a, b) for a, b in zip(found[i], other, strict=True))


def test_fp8_is_packed_as_its_values(way: str) -> None:
    codes = (matrix("normal", 6, 128) * 2000).to(torch.float8_e4m3fn)
    stored = Fp8Rows(codes, torch.tensor([[1e-3]]), torch.zeros(6, dtype=torch.int32), 128)
    columns = importance_of(energies(128, 1.0))
    upper = upper_factor(torch.eye(128) + 0.2, 128)
    assert columns is not None
    for known in (Importance(columns), Importance(columns, upper)):
        found, wanted = pack_nf4(stored, known), pack_nf4(stored.values(), known)
        assert all(torch.equal(found[part], wanted[part]) for part in wanted)


def test_nan_is_refused() -> None:
    w, columns = matrix("normal", 4, 64), energies(64, 1.0)
    w[2, 5] = math.nan
    for known in (Importance(columns), Importance(columns, upper_factor(torch.eye(64), 64))):
        with pytest.raises((NativeError, PackError), match="NaN"):
            pack_nf4(w, known)


# ---- error feedback ------------------------------------------------------------------------------


def test_feedback_lowers_the_error_of_outputs_on_tokens_it_has_not_seen(way: str) -> None:
    g = torch.Generator().manual_seed(6)
    mix = torch.randn(128, 128, generator=g) + 2 * torch.eye(128)
    seen, other = (torch.randn(600, 128, generator=g) @ mix for _ in range(2))
    w = matrix("normal", 48, 128, 6)
    columns = importance_of(seen.square().mean(0))
    assert columns is not None

    def lost(parts: Parts) -> float:
        return float((other @ (NF4.unpack(parts) - w).T).norm() / (other @ w.T).norm())

    weighted = lost(pack_nf4(w, Importance(columns)))
    fed = lost(pack_nf4(w, Importance(columns, upper_factor(seen.T @ seen, 600))))
    assert fed < 0.9 * weighted


def test_feedback_takes_rows_in_any_pieces_and_views(way: str) -> None:
    w = matrix("normal", 24, 192, 7)
    x = torch.randn(300, 192, generator=torch.Generator().manual_seed(7))
    known = Importance(energies(192, 0.5), upper_factor(x.T @ x, len(x)))
    whole, room = pack_nf4(w, known), torch.zeros(24 * 99, dtype=torch.uint8)
    views = {
        "codes": room[: 24 * 96].view(24, 96),
        "scales": torch.empty(24, 3, dtype=torch.float16),
    }
    for rows in (slice(0, 5), slice(5, 24)):
        pack_nf4(w[rows], known, out={name: part[rows] for name, part in views.items()})
    # A product of fewer rows may add up in another order.
    assert (views["codes"] != whole["codes"]).float().mean() <= 0.02


# ---- conversions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write(tmp_path_factory.mktemp("src"), CONFIG, mtp_layers=1)
    for name, text in files_from_gguf(tiny_metadata(), folder, eos=2).items():
        if name != "generation_config.json":
            (folder / name).write_text(text)
    return folder


def calibrated(
    source: Path, target: Path, method: Any = "feedback", hear: Callable[[Progress], None] = print
) -> Pack:
    opened = Checkpoint.open(source)
    learnt = Calibration.of_checkpoint(opened, target, method, tokens=TOKENS)
    return convert(opened, target, Recipe(), calibration=learnt, on_progress=hear)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("whole") / "pack"
    calibrated(source, target)
    return bytes_of(target)


def test_a_pack_says_how_it_was_calibrated_and_keeps_nothing_else(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert FILE not in whole and "pack.json" in whole
    pack = calibrated(source, tmp_path / "pack", "columns")
    assert pack.manifest["calibration"]["method"] == "columns"
    plain = convert(source, tmp_path / "plain")
    assert "calibration" not in plain.manifest
    for name in ("model.safetensors", "layer-001.safetensors", "mtp.safetensors"):
        assert bytes_of(pack.path)[name] == bytes_of(plain.path)[name] == whole[name]
    for name in ("experts-001.safetensors", "experts-003.safetensors"):
        assert len({bytes_of(p.path)[name] for p in (pack, plain)} | {whole[name]}) == 3


def test_experts_are_told_apart_by_what_they_heard(source: Path, tmp_path: Path) -> None:
    learnt = Calibration.of_checkpoint(Checkpoint.open(source), tmp_path, tokens=TOKENS)
    x = learnt.side.embed(learnt.ids)
    for spec in learnt.weights.config.layers[:2]:
        x = learnt.side.through(spec, x, lambda share: None)
    heard = learnt.listener.heard
    assert heard is not None and heard.layer == 1
    assert torch.allclose(heard.moments, heard.moments.T) and heard.moments.diagonal().min() > 0
    silent = [e for e in range(8) if not heard.inner[e].any()]
    for e in range(8):
        found = heard.of(e, "down_proj", "feedback")
        assert (found is None) == (e in silent)
        first = heard.of(e, "gate_proj", "feedback")
        assert first is not None and first.upper is not None


@pytest.mark.parametrize("at", [1, 4, 9, 15])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, at: int
) -> None:
    count = 0

    def stop(event: Progress) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt

    target = tmp_path / "pack"
    try:
        calibrated(source, target, hear=stop)
    except KeyboardInterrupt:
        calibrated(source, target)
    assert bytes_of(target) == whole


@pytest.mark.parametrize("damage", ["gone", "rubbish", "cut"])
def test_without_its_file_it_reads_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    target, calls = tmp_path / "pack", 0
    opened = Checkpoint.open(source)

    def cancel() -> bool:
        nonlocal calls
        calls += 1
        return (target / FILE).exists() and (target / "experts-001.safetensors").exists()

    learnt = Calibration.of_checkpoint(opened, target, tokens=TOKENS)
    with pytest.raises(CancelledError):
        convert(opened, target, Recipe(), calibration=learnt, cancel=cancel)
    kept = target / FILE
    data = kept.read_bytes()
    kept.unlink()
    if damage != "gone":
        kept.write_bytes(b"rubbish" if damage == "rubbish" else data[: len(data) // 2])
    calibrated(source, target)
    assert bytes_of(target) == whole


def test_another_calibration_does_not_mix(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    calibrated(source, target, "columns")
    with pytest.raises(UsageError, match="another calibration"):
        calibrated(source, target)
    with pytest.raises(UsageError, match="another calibration"):
        convert(source, target)


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "src", CONFIG)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        Calibration.of_checkpoint(Checkpoint.open(folder), tmp_path / "pack")


# ---- a budget of bits ----------------------------------------------------------------------------


def losses_of(source: Path) -> list[budget.LayerLoss]:
    return budget.probe(Checkpoint.open(source), Recipe())


def test_the_probe_hears_every_mixture_layer_and_the_same_twice(source: Path) -> None:
    losses = losses_of(source)
    assert [loss.layer for loss in losses] == [1, 2, 3]
    assert all(0.001 < loss.loss < 0.2 for loss in losses)
    layout = NF4.nbytes(64, 64) * 3 * 8
    assert losses[0].more == get_format("int8").nbytes(64, 64) * 3 * 8 - layout
    assert losses == losses_of(source)


@given(bits=st.floats(5.5, 9.5))
@settings(max_examples=20, deadline=None)
def test_a_budget_is_kept_and_used_up(source: Path, bits: float) -> None:
    opened, recipe = Checkpoint.open(source), Recipe()
    more = 3 * 8 * (get_format("int8").nbytes(64, 64) - NF4.nbytes(64, 64))
    rates = {1: 0.02, 2: 0.05, 3: 0.03}
    losses = [budget.LayerLoss(layer, loss, more) for layer, loss in rates.items()]
    if bits < budget.mean_bits(opened, recipe):
        with pytest.raises(UsageError, match="cannot be kept"):
            budget.check(opened, recipe, bits)
        return
    found = budget.spend(opened, recipe, bits, losses)
    assert budget.mean_bits(opened, found) <= bits
    assert found.wide in ((), (2,), (2, 3), (1, 2, 3))  # most loss first
    if len(found.wide) < 3:
        other = next(layer for layer in rates if layer not in found.wide)
        wider = dataclasses.replace(found, wide=(*found.wide, other))
        assert budget.mean_bits(opened, wider) > bits


def test_a_mixed_pack_is_made_said_and_found_again(source: Path, tmp_path: Path) -> None:
    opened, target = Checkpoint.open(source), tmp_path / "pack"
    least = budget.mean_bits(opened, Recipe())
    recipe = budget.spend(opened, Recipe(), least + 1, losses_of(source))
    assert 1 <= len(recipe.wide) <= 2
    assert budget.chosen_before(target, Recipe(), least + 1) is None
    pack = convert(opened, target, recipe)
    assert pack.manifest["recipe"]["wide"] == list(recipe.wide)
    for layer in (1, 2, 3):
        assert pack.expert_layout(layer).format == recipe.experts_of(layer)
    assert budget.chosen_before(target, Recipe(), least + 1) == recipe
    assert budget.chosen_before(target, Recipe(), least + 1.1) is None
    side = Side(open_weights(target), [20], exact=False)
    x = side.embed(torch.arange(20))
    exact = Side(open_weights(source), [20], exact=True)
    y = exact.embed(torch.arange(20))
    for spec in side.config.layers:
        x = side.through(spec, x, lambda share: None)
        y = exact.through(spec, y, lambda share: None)
    assert float((x - y).norm() / y.norm()) < 0.4


@pytest.mark.parametrize("bits", [math.nan, 0.0, -1.0, 3.0, 17.0, math.inf])
def test_absurd_budgets_are_refused(source: Path, bits: float) -> None:
    with pytest.raises(UsageError, match="cannot be kept"):
        budget.check(Checkpoint.open(source), Recipe(), bits)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_calibrates_within_a_budget(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(calibration, "PIECE", TOKENS)
    monkeypatch.setattr(calibration, "texts_for", lambda *args: texts_for(*args[:2], TOKENS))
    target = tmp_path / "pack"
    bits = budget.mean_bits(Checkpoint.open(source), Recipe()) + 1
    command = ["quantize", str(source), str(target), "--calibrate", "--bits", f"{bits:.2f}"]
    assert cli.main(command) == ExitCode.OK
    said = capsys.readouterr().err
    assert "| layer | experts' error | stored as |" in said and "bits a weight" in said
    assert f"calibration reads {4 * TOKENS} tokens: about" in said
    assert "nf4 by error feedback" in said
    first = bytes_of(target)
    assert cli.main(command) == ExitCode.OK
    assert "experts' error" not in capsys.readouterr().err  # known from the pack
    assert bytes_of(target) == first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--calibrate", "--no-search"], "exclude each other"),
        (["--format", "int8", "--bits", "8.5"], "--bits widens experts at nf4"),
        (["--bits", "2"], "cannot be kept"),
    ],
)
def test_what_goes_not_together_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    target = tmp_path / "pack"
    assert cli.main(["quantize", str(source), str(target), *options]) == ExitCode.USAGE
    assert said in capsys.readouterr().err and not target.exists()


@pytest.mark.parametrize("rows", [1, 4, 16, 80])
def test_products_take_scales_of_either_sign(rows: int) -> None:
    library = kernels.get()
    if library is None:
        pytest.skip("no native library here")
    w, columns = matrix("normal", 96, 512, 8), importance_of(energies(512, 1.0, 8))
    assert columns is not None
    parts = pack_nf4(w, Importance(columns))
    assert (parts["scales"] < 0).any() and (parts["scales"] > 0).any()
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(8))
    wanted = x.double() @ NF4.unpack(parts).double().T
    for isa in ("scalar", "avx2", "avx_vnni", "avx512", "amx"):
        try:
            k = library.with_isa(isa)
        except NativeError:
            continue
        y = torch.empty(rows, 96)
        k.matmul(NF4.matrix(parts), x.data_ptr(), 512, rows, y.data_ptr(), 96)
        assert float((y - wanted).norm() / wanted.norm()) < 0.015, isa


def test_bitsandbytes_reads_scales_of_either_sign() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w, columns = matrix("normal", 8, 128, 9), importance_of(energies(128, 1.0, 9))
    assert columns is not None
    parts = pack_nf4(w, Importance(columns))
    assert (parts["scales"] < 0).any()
    _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    state.absmax = parts["scales"].float().flatten()
    read = functional.dequantize_4bit(parts["codes"].reshape(-1, 1), state)
    assert torch.equal(read, NF4.unpack(parts))
