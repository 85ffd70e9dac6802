"""The comparison with llama.cpp, without llama.cpp: slices as data, protocol, order, arithmetic."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import engine_worker  # noqa: E402
import llamacpp_build  # noqa: E402
import llamacpp_slice  # noqa: E402
import paired  # noqa: E402
import vs_llamacpp as vs  # noqa: E402

from mimo_local.errors import MimoError, UsageError  # noqa: E402


class FakeEngine:
    """Counts what it is fed; its clock is the number of ids seen."""

    vocab = 100

    def __init__(self) -> None:
        self.fed: list[tuple[list[int], str]] = []
        self.resets = 0
        self.threads = 0
        self.now = 0.0

    def info(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def set_threads(self, n: int) -> None:
        self.threads = n

    def reset(self) -> None:
        self.resets += 1
        self.fed.clear()

    def feed(self, ids: Sequence[int], outputs: str) -> None:
        self.fed.append((list(ids), outputs))
        self.now += len(ids) * 1e-3

    def clock(self) -> float:
        return self.now


def answer(engine: FakeEngine, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    server = engine_worker.Server(engine, clock=engine.clock)
    return [server.answer(request) for request in requests]


@given(n=st.integers(1, 40), depth=st.integers(1, 300), chunk=st.integers(1, 64))
def test_a_worker_times_what_it_is_asked_and_nothing_else(n: int, depth: int, chunk: int) -> None:
    engine = FakeEngine()
    filled, decoded, verified, prompt = answer(
        engine,
        {"op": "fill", "n": depth, "chunk": chunk},
        {"op": "decode", "n": n},
        {"op": "verify", "n": n},
        {"op": "prefill", "n": n, "outputs": "all"},
    )
    assert filled == {}
    assert decoded["ms"] == pytest.approx([1.0] * n)  # one id each
    assert verified["ms"] == pytest.approx([n])
    assert prompt["ms"] == pytest.approx([n])
    assert engine.resets == 2  # fill and prefill start afresh, decode and verify go on
    assert [outputs for _, outputs in engine.fed] == ["all"]


def test_fill_feeds_every_id_once_and_decode_goes_on_behind_it() -> None:
    engine = FakeEngine()
    answer(engine, {"op": "fill", "n": 70, "chunk": 32}, {"op": "decode", "n": 2})
    assert [len(ids) for ids, _ in engine.fed] == [32, 32, 6, 1, 1]
    assert all(0 <= i < engine.vocab for ids, _ in engine.fed for i in ids)


def test_two_engines_are_fed_the_same_ids() -> None:
    one, two = FakeEngine(), FakeEngine()
    requests = [{"op": "fill", "n": 9}, {"op": "decode", "n": 3}, {"op": "verify", "n": 4}]
    answer(one, *requests)
    answer(two, *requests)
    assert one.fed == two.fed


def test_the_protocol_is_one_line_each_way_and_errors_are_replies() -> None:
    engine, replies = FakeEngine(), io.StringIO()
    lines = [{"op": "info"}, {"op": "threads", "n": 3}, {"op": "decode", "n": 0}, {"op": "dance",
             "n": 1}, {"op": "quit"}, {"op": "info"}]  # fmt: skip
    engine_worker.serve(engine, io.StringIO("".join(json.dumps(x) + "\n" for x in lines)), replies)
    found = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert found[:2] == [{"engine": "fake"}, {}]
    assert engine.threads == 3
    assert "n = 0" in found[2]["error"] and "dance" in found[3]["error"] and found[3]["hint"]
    assert len(found) == 4  # nothing after quit


CHILD = """
import json, os, sys, time
sys.path.insert(0, {bench!r})
import engine_worker

class Engine:
    vocab = 10
    def info(self): return {{"engine": "child", "pid": os.getpid()}}
    def set_threads(self, n): raise RuntimeError("no threads here")
    def reset(self): pass
    def feed(self, ids, outputs):
        if len(ids) == 7:
            print("dying on purpose", file=sys.stderr, flush=True)
            os._exit(3)
        if len(ids) == 8:
            time.sleep(60)

print(json.dumps(Engine().info()), flush=True)
engine_worker.serve(Engine(), sys.stdin, sys.stdout)
"""


def child(tmp_path: Path) -> engine_worker.Worker:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(bench=str(BENCH)), encoding="utf-8")
    command = [sys.executable, str(script)]
    return engine_worker.Worker("child", command, tmp_path / "log", patience_s=60)


def state(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return text.rsplit(")", 1)[1].split()[0]


def test_a_worker_process_is_stopped_while_it_is_not_asked(tmp_path: Path) -> None:
    with child(tmp_path) as worker:
        assert worker.info["engine"] == "child"
        assert len(worker.ms("decode", 3)) == 3
        if Path("/proc").is_dir():
            wait = time.monotonic() + 5
            while state(worker.info["pid"]) != "T" and time.monotonic() < wait:
                time.sleep(0.01)
            assert state(worker.info["pid"]) == "T"
        with pytest.raises(MimoError, match="no threads here"):
            worker.ask("threads", 2)
        assert worker.ms("verify", 2)  # an error of one request does not end it
    assert worker.process.poll() == 0


def test_a_worker_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with child(tmp_path) as worker:
        with pytest.raises(MimoError, match=r"status 3.*dying on purpose") as caught:
            worker.ask("verify", 7)
        assert str(tmp_path / "log") in caught.value.hint


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    with child(tmp_path) as worker:
        worker.patience_s = 0.2
        with pytest.raises(MimoError, match="was killed: no answer in 0 s"):
            worker.ask("verify", 8)
    assert worker.process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that way")
def test_a_stopped_worker_does_not_outlive_its_parent(tmp_path: Path) -> None:
    parent = (
        "import os, signal, sys, time; sys.path.insert(0, sys.argv[1]); import engine_worker\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    engine_worker.die_with_parent()\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "os.waitpid(pid, os.WUNTRACED)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, str(BENCH)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait = time.monotonic() + 5
    ended = ("Z", "X", "gone")  # on a busy machine it is seen running its end first
    while state(int(done.stdout)) not in ended and time.monotonic() < wait:
        time.sleep(0.01)
    assert state(int(done.stdout)) in ended


class FakeWorker:
    """Answers with a fixed time, slower every time; writes down who was asked what."""

    def __init__(self, name: str, ms: float, log: list[tuple[str, str, int]]) -> None:
        self.name, self.step, self.log, self.calls = name, ms, log, 0
        self.disturbed: set[int] = set()
        self.others = 0.0

    def ask(self, op: str, n: int = 1, **more: object) -> Mapping[str, Any]:
        self.log.append((self.name, op, n))
        return {}

    def ms(self, op: str, n: int = 1, **more: object) -> list[float]:
        self.ask(op, n)
        self.calls += 1
        self.others = 0.5 if self.calls in self.disturbed else 0.01
        value = self.step * self.calls
        return [1e6, *[value] * (n - 1)] if op == "decode" else [value]


def test_engines_are_asked_in_turn_and_the_order_alternates() -> None:
    log: list[tuple[str, str, int]] = []
    workers = {paired.THEIRS: FakeWorker("B", 30.0, log), paired.OURS: FakeWorker("A", 10.0, log)}
    row = paired.measure(workers, paired.Case("pp", 128), threads=2, rounds=4)
    timed = [name for name, op, _ in log if op == "prefill"]
    assert timed == ["B", "A", "B", "A", "A", "B", "B", "A", "A", "B"]  # first two: warm-up
    assert row.samples[paired.OURS] == [20.0, 30.0, 40.0, 50.0]
    assert row.ratios == pytest.approx([3.0] * 4)  # pairs: the drift cancels
    assert row.to_dict()["ratio"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert ("A", "threads", 2) in log and not [x for x in log if x[1] == "fill"]


def test_a_disturbed_round_is_taken_again_and_what_cannot_be_is_told() -> None:
    log: list[tuple[str, str, int]] = []
    theirs, ours = FakeWorker("B", 30.0, log), FakeWorker("A", 10.0, log)
    ours.disturbed = {3}  # the first call is the warm-up, so this is the second round
    workers = {paired.THEIRS: theirs, paired.OURS: ours}
    row = paired.measure(workers, paired.Case("pp", 8), threads=2, rounds=3)
    assert row.samples[paired.OURS] == [20.0, 40.0, 50.0] and row.ratios == pytest.approx([3.0] * 3)
    assert row.others == 0.01 and "DISTURBED" not in paired.table_line(row)
    theirs.disturbed = set(range(100))
    row = paired.measure(workers, paired.Case("pp", 8), threads=2, rounds=2)
    assert len(row.ratios) == 2 and row.to_dict()["others"] == 0.5
    assert "DISTURBED: others took 50%" in paired.table_line(row)


def test_what_others_take_is_noticed() -> None:
    if not Path("/proc/stat").is_file():
        pytest.skip("without /proc nothing is known of others")
    others = engine_worker.Others()
    child = subprocess.run(
        [sys.executable, "-c", "import time; t = time.process_time\nwhile t() < 0.4: pass"],
        check=True,
    )
    assert child.returncode == 0 and others.share() > 0.0


def test_decode_starts_at_its_depth_and_leaves_out_the_first_token() -> None:
    log: list[tuple[str, str, int]] = []
    workers = {paired.OURS: FakeWorker("A", 5.0, log)}
    row = paired.measure(workers, paired.Case("tg", 8, 2048), threads=1, rounds=2)
    assert log[:3] == [("A", "threads", 1), ("A", "fill", 2048), ("A", "decode", 9)]
    assert row.samples[paired.OURS] == [10.0, 15.0]  # never the 1e6 of the first
    assert row.ratios == [] and "ratio" not in row.to_dict()
    assert row.to_dict()["engines"][paired.OURS]["tok_s"] == 80.0
    assert "tg8 @ d2048" in paired.table_line(row)


@given(
    theirs=st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9),
    factor=st.floats(0.1, 10.0),
)
def test_the_ratio_is_the_median_of_pairs(theirs: list[float], factor: float) -> None:
    samples = {paired.THEIRS: theirs, paired.OURS: [x / factor for x in theirs]}
    row = paired.Row(paired.Case("pp", 4), 1, samples)
    assert row.ratios == pytest.approx([factor] * len(theirs))
    assert row.to_dict()["ratio"]["median"] == pytest.approx(factor, abs=6e-4)


def test_a_layer_costs_the_difference_of_two_slices() -> None:
    case = paired.Case("pp", 512)
    two = [paired.Row(case, 2, {paired.THEIRS: [100.0], paired.OURS: [50.0]})]
    four = [paired.Row(case, 2, {paired.THEIRS: [300.0], paired.OURS: [100.0]})]
    (cost,) = paired.layer_cost(two, four, 2)
    assert cost["ms"] == {paired.THEIRS: 100.0, paired.OURS: 25.0} and cost["ratio"] == 4.0
    (nothing,) = paired.layer_cost(four, two, 1)  # noise larger than the layer: no ratio to tell
    assert "ratio" not in nothing


def test_far_back_costs_the_difference_of_two_depths() -> None:
    near = paired.Row(
        paired.Case("tg", 8), 2, {paired.THEIRS: [20.0, 22.0], paired.OURS: [10.0, 10.0]}
    )
    far = paired.Row(
        paired.Case("tg", 8, 8192), 2, {paired.THEIRS: [27.0, 27.0], paired.OURS: [12.0, 12.0]}
    )
    prompt = paired.Row(paired.Case("pp", 8), 2, {paired.OURS: [1.0]})
    (cost,) = paired.depth_cost([prompt, near, far])
    assert cost["test"] == "tg8 @ d8192"
    assert cost["ms"] == {paired.THEIRS: 6.0, paired.OURS: 2.0} and cost["ratio"] == 3.0
    assert paired.depth_cost([far]) == []


def test_the_best_of_their_formats_is_the_one_to_beat() -> None:
    def run(experts: str, theirs: float) -> dict[str, Any]:
        row = paired.Row(
            paired.Case("tg", 16), 2, {paired.THEIRS: [theirs, theirs], paired.OURS: [10.0, 12.0]}
        )
        return {"layers": 2, "experts": experts, "format": "nf4", "rows": [row]}

    (best,) = paired.best_of([run("q4_0", 33.0), run("mxfp4", 22.0), run("q4_k", 44.0)])
    assert (best["experts"], best["test"], best["threads"]) == ("mxfp4", "tg16", 2)
    assert best["ms"] == {paired.THEIRS: 22.0, paired.OURS: 11.0}
    assert best["ratio"] == pytest.approx(2.017, abs=1e-3)


@given(
    st.lists(st.integers(0, 3000), max_size=3), st.lists(st.integers(0, 64), max_size=2),
    st.lists(st.integers(0, 8), max_size=2), st.integers(0, 9000), st.integers(1, 9),
)  # fmt: skip
def test_the_context_holds_every_case(
    prompts: list[int], generate: list[int], verify: list[int], depth: int, rounds: int
) -> None:
    if not any(prompts + generate + verify):
        with pytest.raises(UsageError):
            paired.plan_cases(prompts, generate, verify, [depth])
        return
    cases = paired.plan_cases(prompts, generate, verify, [depth])
    context = paired.context_for(cases, rounds)
    log: list[tuple[str, str, int]] = []
    for case in cases:
        log.clear()
        paired.measure({paired.OURS: FakeWorker("A", 1.0, log)}, case, threads=1, rounds=rounds)
        used = [n for _, op, n in log if op != "threads"]
        assert (max if case.kind == "pp" else sum)(used) <= context
    assert context % 256 == 0


# ---- slices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_a_slice_has_the_real_models_shapes(layers: int) -> None:
    config = llamacpp_slice.real_config(layers, 1024)
    named = {t.name: t for t in llamacpp_slice.tensors(config, "q4_k")}
    assert named["token_embd.weight"].shape == named["output.weight"].shape == (1024, 4096)
    assert named["blk.0.ffn_down.weight"].shape == (4096, 16384)
    assert "blk.0.ffn_gate_inp.weight" not in named and "blk.0.attn_sinks.weight" not in named
    for spec in config.layers:
        blk, kv = f"blk.{spec.index}.", 4 if spec.attention == "full" else 8
        assert named[blk + "attn_q.weight"].shape == (64 * 192, 4096)
        assert named[blk + "attn_k.weight"].shape == (kv * 192, 4096)
        assert named[blk + "attn_v.weight"].shape == (kv * 128, 4096)
        assert named[blk + "attn_output.weight"].shape == (4096, 64 * 128)
        assert (blk + "attn_sinks.weight" in named) == (spec.attention == "sliding")
        if spec.index:
            assert named[blk + "ffn_down_exps.weight"].shape == (256, 4096, 2048)
            assert named[blk + "ffn_gate_inp.weight"].shape == (256, 4096)
    assert [s.attention for s in config.layers[:2]] == ["full", "sliding"]


@pytest.mark.parametrize(
    ("kind", "bits"), [("q4_0", 4.5), ("q4_k", 4.5), ("iq4_nl", 4.5), ("mxfp4", 4.25)]
)
def test_a_layers_experts_have_the_formats_bytes(kind: str, bits: float) -> None:
    tensors = llamacpp_slice.tensors(llamacpp_slice.real_config(2, 1024), kind)
    experts = [t for t in tensors if "exps" in t.name]
    assert {t.kind for t in experts} == {kind} and len(experts) == 3
    assert sum(t.nbytes for t in experts) == 256 * 3 * 4096 * 2048 * bits / 8


def test_a_slices_metadata_says_the_same_as_the_config() -> None:
    config = llamacpp_slice.real_config(6, 512)
    found = llamacpp_slice.metadata(config)
    assert found["attention.head_count_kv"] == [4, 8, 8, 8, 8, 4]
    assert found["attention.sliding_window_pattern"] == [False, True, True, True, True, False]
    assert found["attention.sliding_window"] == 129  # keys seen, the token itself included
    assert found["rope.dimension_count"] == 64
    assert (found["rope.freq_base"], found["rope.freq_base_swa"]) == (5e6, 1e4)
    assert (found["expert_count"], found["expert_used_count"]) == (256, 8)
    assert (found["attention.key_length"], found["attention.value_length"]) == (192, 128)
    assert found["vocab_size"] == 512 and found["feed_forward_length"] == 16384


def test_a_one_layer_slice_is_refused() -> None:
    with pytest.raises(SystemExit, match="2 to 48 layers, not 1"):
        llamacpp_slice.real_config(1, 1024)


def decoded(kind: str, blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Weights of Q8_0 and Q4_0 blocks by their definition."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, 2:]
    if kind == "q8_0":
        return scale * codes.view(np.int8)
    return scale * (np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_random_blocks_are_sane_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_slice, "POOL_BLOCKS", 4096)
    monkeypatch.setattr(llamacpp_slice, "PIECE", 64)
    pool = llamacpp_slice.Pool(kind, np.random.default_rng(1))
    out, size = io.BytesIO(), llamacpp_slice.BLOCKS[kind][1]
    pool.write(out, 1000 * size)
    blocks = np.frombuffer(out.getvalue(), np.uint8).reshape(1000, size)
    weights = decoded(kind, blocks)
    assert weights.std() == pytest.approx(1 / 64, rel=0.05)
    assert abs(weights.mean()) < weights.std() / 5
    assert len({bytes(b) for b in blocks}) > 900  # blocks are distinct, not one repeated


# ---- building llama.cpp ---------------------------------------------------------------------


@settings(max_examples=20)
@given(st.sets(st.sampled_from(llamacpp_build.TOOLS), min_size=1))
def test_missing_tools_are_named(missing: set[str]) -> None:
    with pytest.raises(MimoError) as caught:
        llamacpp_build.require_tools(lambda tool: None if tool in missing else f"/bin/{tool}")
    named = caught.value.message.removeprefix("building llama.cpp needs ").split(", ")
    assert set(named) == missing and "apt install" in caught.value.hint
    llamacpp_build.require_tools(lambda tool: f"/bin/{tool}")


def test_sources_lose_gits_links_and_become_new(tmp_path: Path) -> None:
    vendor = tmp_path / "vendor" / "llama.cpp"
    vendor.mkdir(parents=True)
    (vendor / ".git").write_text("gitdir: ../../.git/modules/x", encoding="utf-8")
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "x").write_bytes(b"x")
    source = vendor / "CMakeLists.txt"
    source.write_text("project(x)", encoding="utf-8")
    os.utime(source, (1e9, 1e9))
    llamacpp_build.prepare(tmp_path)
    assert not (tmp_path / ".git").exists() and not (vendor / ".git").exists()
    assert time.time() - source.stat().st_mtime < 60


def test_the_build_is_clangs_and_native() -> None:
    env = llamacpp_build.build_environment(3)
    assert (env["CC"], env["CXX"], env["CMAKE_BUILD_PARALLEL_LEVEL"]) == ("clang", "clang++", "3")
    assert "-DGGML_NATIVE=ON" in env["CMAKE_ARGS"].split()
    lower = llamacpp_build.build_environment(3, "avx2")["CMAKE_ARGS"].split()
    assert "-DGGML_AVX512=OFF" in lower and "-DGGML_NATIVE=ON" not in lower


def test_an_empty_environment_is_not_taken_for_llama_cpp(tmp_path: Path) -> None:
    assert not llamacpp_build.usable(tmp_path)


# ---- command line ---------------------------------------------------------------------------


def test_arguments() -> None:
    args = vs.parse(["--layers", "3,2", "--experts", "Q4_0,mxfp4", "-p", "128", "-t", "1,2"])
    assert (args.layers, args.experts, args.prompts) == ([2, 3], ["q4_0", "mxfp4"], [128])
    assert (args.threads, args.generate, args.verify, args.depths) == ([1, 2], [16], [2, 4], [0])
    demo = vs.parse(["--demo"])
    assert (demo.prompts, demo.generate, demo.verify) == ([128, 512], [64], [0])
    everything = vs.parse(["--all", "--isa", "avx2"])
    assert everything.layers == [2, 3] and set(everything.experts) == set(vs.EXPERT_TYPES)
    assert (everything.prompts, everything.depths) == ([128, 512, 2048], [0, 8192])
    assert everything.venv.name == "llamacpp-avx2" and args.venv.name == "llamacpp"
    part = vs.parse(["--all", "--layers", "2", "-p", "128"])
    assert (part.layers, part.prompts, part.depths) == ([2], [128], [0, 8192])
    assert vs.demo_args(everything).depths == [0] and vs.demo_args(demo) is demo


@pytest.mark.parametrize(
    "argv", [["--layers", "1"], ["-r", "0"], ["-t", "0"], ["--experts", "q3"], ["-p", "many"]]
)
def test_bad_arguments_end_with_status_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        vs.parse(argv)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_every_expert_type_has_a_format_of_ours() -> None:
    assert set(vs.NEAREST) == set(llamacpp_slice.EXPERT_TYPES)


def test_an_error_is_told_with_its_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> Path:
        raise MimoError("no clang", hint="install clang")

    monkeypatch.setattr(llamacpp_build, "ensure", broken)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main's handler is for main alone
    where = ["--venv", str(tmp_path / "venv"), "--slices", str(tmp_path / "slices")]
    assert vs.main(["--setup", *where]) == 1
    assert capsys.readouterr().err == "error: no clang\nhint: install clang\n"


def test_the_last_line_is_one_document() -> None:
    row = paired.Row(
        paired.Case("tg", 16), 2, {paired.THEIRS: [60.0, 62.0], paired.OURS: [40.0, 40.0]}
    )
    runs = [{"layers": 3, "experts": "q4_0", "rows": [row]}]
    found = json.loads(json.dumps(vs.document(vs.parse([]), runs)))
    (run,) = found["runs"]
    assert run["rows"][0]["test"] == "tg16"
    assert run["rows"][0]["engines"][paired.THEIRS]["ms"] == 61.0
    assert run["rows"][0]["ratio"] == {"median": 1.525, "min": 1.5, "max": 1.55}
