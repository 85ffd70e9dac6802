"""shape_bench: the whole measurement on a caricature of the model; its figures, its ends."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_local import cli, hardware, kernels
from mimo_local.cli import shapes
from mimo_local.errors import ExitCode, NotEnoughMemoryError, UsageError
from mimo_local.events import Progress
from mimo_local.shape_bench import Figures, Options, ShapeBench, _round

torch.set_num_threads(1)
TINY = Options(
    shape="tiny", vocab=256, threads=(1,), contexts=(40, 80), prefill=(20, 40), quick=True,
    probe=8 << 20,
)  # fmt: skip


def measured(folder: Path, options: Options = TINY) -> dict[str, Any]:
    bench = ShapeBench(options, folder)
    bench.run()
    found = bench.to_dict(hardware.detect(folder))
    return json.loads(json.dumps(found, allow_nan=False))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(tmp_path_factory.mktemp("disk"))


def test_the_promised_keys_hold_numbers(found: dict[str, Any]) -> None:
    for key in ("stream_gb_s", "matmul_tops", "disk_gb_s"):
        assert found["limits"][key] > 0
    for key in ("tok_s", "gb_s", "share_of_limit"):
        assert found["decode"][key] > 0
        assert key == "tok_s" or found["decode"]["experts"][key] > 0
    assert [entry["tokens"] for entry in found["prefill"]] == [20, 40]
    assert [entry["rows"] for entry in found["verify"]] == [1, 2, 3, 4]
    assert [entry["context"] for entry in found["attention"]] == [40, 80]
    assert all(e["tok_s"] > 0 and e["tops"] > 0 for e in found["prefill"])
    assert all(e["ms"] > 0 and e["independent_ms"] > 0 for e in found["verify"])
    assert all(e["ms"] > 0 and e["share_of_limit"] > 0 for e in found["attention"])
    assert found["isa"] == kernels.describe()
    assert found["threads"] == 1
    assert found["config"]["layers"] == 2
    assert found["interrupted"] is False


def test_rates_are_bytes_and_operations_over_the_time(found: dict[str, Any]) -> None:
    config, decode = found["config"], found["decode"]
    nbytes = sum(config["bytes_per_token"].values())
    assert decode["bytes"] == nbytes
    assert decode["gb_s"] == pytest.approx(nbytes / decode["ms"] / 1e6, rel=2e-3)
    assert decode["tok_s"] == pytest.approx(1e3 / decode["ms"], rel=2e-3)
    experts = decode["experts"]
    assert experts["bytes"] == 4 * config["expert_bytes"] == config["bytes_per_token"]["experts"]
    assert experts["gb_s"] == pytest.approx(experts["bytes"] / experts["ms"] / 1e6, rel=2e-3)
    active = dict(config["weights_per_token"])
    head = active.pop("head")
    for entry in found["prefill"]:
        operations = 2 * (entry["tokens"] * sum(active.values()) + head)  # one row of logits
        assert entry["tops"] == pytest.approx(operations / entry["ms"] / 1e9, rel=2e-3)
        assert entry["tok_s"] == pytest.approx(1e3 * entry["tokens"] / entry["ms"], rel=2e-3)
    for entry in found["attention"]:
        assert entry["bytes"] == entry["context"] * (48 + 32) * 2
        assert entry["gb_s"] == pytest.approx(entry["bytes"] / entry["ms"] / 1e6, rel=2e-3)
    assert all(found["verify"][0][key] == 1 for key in found["verify"][0] if "ratio" in key)


def test_the_share_is_of_what_memory_gave_in_the_same_moments(tmp_path: Path) -> None:
    bench = ShapeBench(TINY, tmp_path)

    class Memory:
        """Slows down by half; so does what is measured."""

        rates = iter([8.0, 4.0, 4.0, 2.0])

        def sample(self) -> float:
            return next(self.rates)

    bench.memory = Memory()  # type: ignore[assignment]
    times = iter([9.0, 1 / 3, 1 / 2, 2 / 3])  # a warm-up, then 1, 2/3 and 1/2 of 3 bytes a second
    seconds, share = bench._paired(int(1e9), lambda: next(times), steps=1)
    assert seconds == 1 / 2
    assert share == pytest.approx(sorted([3 / 6, 2 / 4, 1.5 / 3])[1])


def test_several_thread_counts_and_the_most_on_top(tmp_path: Path) -> None:
    options = Options(
        shape="tiny", vocab=256, threads=(1, 2), contexts=(), prefill=(), quick=True, probe=8 << 20,
        layers=1,
    )  # fmt: skip
    seen: list[Progress] = []
    before = torch.get_num_threads()
    bench = ShapeBench(options, tmp_path, on_progress=seen.append)
    bench.run()
    found = bench.to_dict(hardware.detect(tmp_path))
    assert [run["threads"] for run in found["runs"]] == [2, 1]
    assert found["decode"] == found["runs"][0]["decode"]
    assert found["threads"] == 2
    assert "experts" not in found["decode"], "layer 0 is dense"
    assert torch.get_num_threads() == before
    steps = [event for event in seen if event.unit == "steps"]
    assert (steps[-1].done, steps[-1].total) == (8, 8)
    assert [event.done for event in steps] == list(range(9))


@pytest.mark.parametrize("stop_at", ["experts", "limits", "decode", "attention", "prefill"])
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, stop_at: str) -> None:
    def stop(event: Progress) -> None:
        if stop_at in event.stage:
            raise KeyboardInterrupt

    bench = ShapeBench(TINY, tmp_path, on_progress=stop)
    bench.run()
    found = json.loads(json.dumps(bench.to_dict(hardware.detect(tmp_path))))
    assert found["interrupted"] is True
    order = ["experts", "limits", "decode", "attention", "prefill"]
    reached = order.index(stop_at)
    assert (found["limits"]["stream_gb_s"] is not None) is (reached > 1)
    assert (found["decode"] is not None) is (reached > 2)
    assert (found["attention"] != []) is (reached > 3)
    assert found["prefill"] == []
    assert isinstance(shapes.text(found), str)


def test_a_prompt_that_would_take_minutes_is_left_out(tmp_path: Path) -> None:
    bench = ShapeBench(TINY, tmp_path)
    figures = Figures(1, prefill=[{"tok_s": 100.0}])
    bench._prefill(figures, 8192)
    assert len(figures.prefill) == 1
    assert bench.skipped == ["prefill 8192 with --threads 1: about 82 s"]


@pytest.mark.parametrize(
    "wrong",
    [{"threads": (0,)}, {"threads": (257,)}, {"contexts": (0,)}, {"prefill": (300_000,)},
     {"layers": 0}, {"layers": 49}, {"vocab": 255}, {"shape": "other"}, {"experts": "q4"}],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_made(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        ShapeBench(Options(**wrong), tmp_path)


def test_four_digits() -> None:
    assert [_round(x) for x in (123456.0, 0.123456, 0.0)] == [123500.0, 0.1235, 0.0]
    assert math.isfinite(_round(1e-300))


# -- the command -----------------------------------------------------------------------------------

COMMAND = ["bench", "--shape", "tiny", "--vocab", "256", "-t", "1"]
COMMAND += ["--context", "40", "--prefill", "20", "--quick"]


def test_the_command_prints_tables_and_last_one_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIMO_HOME", str(tmp_path))
    assert cli.main(COMMAND) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found["config"]["vocab"] == 256
    table = "\n".join(out[:-1])
    for text in (
        "RAM GB/s",
        "decode, experts only",
        "attention, 40 keys",
        "prefill 20",
        "of limit",
    ):
        assert text in table
    assert "…" not in table
    assert str(tmp_path) not in out[-1]


def test_an_interrupted_command_still_ends_with_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: ShapeBench, figures: Figures, tokens: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("MIMO_HOME", str(tmp_path))
    monkeypatch.setattr(ShapeBench, "_prefill", stop)
    assert cli.main(COMMAND) == ExitCode.INTERRUPTED
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["interrupted"] is True
    assert found["attention"][0]["context"] == 40
    assert "stopped" in captured.err


@pytest.mark.parametrize(
    "args",
    ["--layers 2", "--quick", "--shape real -m somewhere", "--shape real --layers 99",
     "--shape real --threads 0", "--shape real --threads 257", "--shape real --vocab 100",
     "--shape real --experts q5", "--shape real --context 1,x", "--shape unreal"],
)  # fmt: skip
def test_wrong_usage_is_two_and_says_what_next(
    args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *args.split()]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "\n\nhint: " in err
    assert not out


def test_too_little_memory_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mimo_local.shape_bench.available_memory", lambda: 1 << 30)
    if kernels.get() is not None:
        assert cli.main(["bench", "--shape", "real"]) == ExitCode.MEMORY
        err = capsys.readouterr().err
        assert "--layers" in err and "1.1 GB are free" in err
    with pytest.raises(NotEnoughMemoryError):
        ShapeBench(Options(layers=20), tmp_path).run()


def test_without_kernels_real_shapes_are_refused_and_tiny_ones_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "No kernels here.")
    assert cli.main(["bench", "--shape", "real"]) == ExitCode.NATIVE
    assert "No kernels here." in capsys.readouterr().err
    found = measured(tmp_path)
    assert found["isa"] == kernels.REFERENCE
    assert found["decode"]["tok_s"] > 0
    assert found["limits"]["stream_gb_s"] > 0


def test_help_and_refusals_need_no_torch() -> None:
    code = (
        "import sys\nfrom mimo_local.cli import main\n"
        "main(['bench', '--help'])\nmain(['bench', '--layers', '2'])\n"
        "print('HEAVY', sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr
