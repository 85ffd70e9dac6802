"""sizes: the byte account of the real model, and the same prices as the formats that write."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimo_local import sizes
from mimo_local.cache import KVCache
from mimo_local.config import ModelConfig
from mimo_local.errors import UsageError
from mimo_local.random_weights import shape_config
from quant.formats import FORMATS
from quant.recipe import FORMAT_NAMES, Recipe

REAL = ModelConfig.from_dict(
    json.loads((Path(sizes.__file__).with_name("real_config.json")).read_text())
)


def weights(kind: str) -> int:
    return sum(r * c * n for k, r, c, n in sizes.matrices(REAL) if k == kind)


def test_the_real_model_counts_to_its_published_sizes() -> None:
    assert weights("embedding") == weights("head") == 624_951_296
    assert weights("dense") == 201_326_592
    assert weights("experts") == 302_795_194_368
    # Attention of 9 full and 39 sliding layers; the sliding ones' 64 sinks are counted as exact.
    assert weights("attention") == 802_160_640 + 3_680_504_256 - 39 * 64
    mtp_exact = 3 * (5 * 4096 + 64)
    assert weights("mtp") == 987_820_224 - mtp_exact
    assert sizes.exact_weights(REAL) == 49_295_104 + 397_312 + 39 * 64 + mtp_exact
    main = sum(weights(k) for k in ("embedding", "head", "dense", "experts", "attention"))
    assert main + sizes.exact_weights(REAL) - mtp_exact == 308_778_780_864


def test_one_token_multiplies_about_fifteen_billion_weights() -> None:
    mtp_exact = 3 * (5 * 4096 + 64)
    assert sizes.active_weights(REAL) - mtp_exact == 9_462_349_824 + 5_358_635_200


def test_the_kv_cache_of_the_real_model() -> None:
    rings = 39 * 5120 * 129
    assert rings == 25_758_720
    for tokens in (129, 8192, 32768, 262144):
        assert sizes.kv_bytes(REAL, tokens) == 23_040 * tokens + rings
    assert sizes.kv_bytes(REAL, 1) == 23_040 + 39 * 5120, "rings start empty"
    assert sizes.kv_bytes(REAL, 8192, 4) == 2 * sizes.kv_bytes(REAL, 8192)


def test_int8_halves_full_layers_but_for_the_scales_and_leaves_rings() -> None:
    rings, tokens = 39 * 5120 * 129, 32_768
    assert sizes.kv_bytes(REAL, tokens, 1) == 9 * 4 * (192 + 128 + 2 * 4) * tokens + rings
    assert sizes.restart_bytes(REAL, 1) == sizes.restart_bytes(REAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_bytes_planned_are_those_a_cache_takes(dtype: torch.dtype) -> None:
    config, names = shape_config(5, 512, shape="tiny"), {torch.float32: "f32"}
    itemsize = sizes.KV_ITEMSIZES[names.get(dtype, "bf16" if dtype == torch.bfloat16 else "int8")]
    assert itemsize == dtype.itemsize
    cache = KVCache(config, dtype=dtype, capacity_hint=1000)
    more = sizes.kv_bytes(config, 1000, itemsize) - sizes.kv_bytes(config, 17, itemsize)
    full = cache.nbytes["full"]
    assert full * (1000 - 17) == more * 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_restart_points_are_what_a_session_holds(dtype: torch.dtype) -> None:
    config = shape_config(5, 512, shape="tiny")
    cache, itemsize = KVCache(config, dtype=dtype), dtype.itemsize
    cache.length = 17 + sizes.RING_SLACK  # all that a ring keeps
    held = cache.nbytes["swa"] + (sizes.RESTARTS + 1) * cache.snapshot().nbytes
    row = sizes.kv_bytes(config, 101, itemsize) - sizes.kv_bytes(config, 100, itemsize)
    rings = sizes.kv_bytes(config, 17, itemsize) - 17 * row
    assert rings + sizes.restart_bytes(config, itemsize) == pytest.approx(held, rel=0.01)
    assert sizes.restart_bytes(REAL) / 1e6 == pytest.approx(240, abs=5)


@pytest.mark.parametrize(
    ("fmt", "expert", "total_gb"),
    [
        ("nf4", 13_369_344, 168.0),
        ("mxfp4", 13_369_344, 168.0),
        ("int8", 25_198_592, 310.3),
        ("bf16", 50_331_648, 612.7),
    ],
)
def test_expert_and_pack_bytes(fmt: str, expert: int, total_gb: float) -> None:
    pack = sizes.PackSizes.estimate(REAL, Recipe(experts=fmt))
    assert (pack.expert, pack.experts) == (expert, 12_032)
    assert pack.total / 1e9 == pytest.approx(total_gb, abs=0.1)
    assert pack.expert % sizes.ALIGN == 0


def test_prices_are_those_of_the_formats_that_write_the_bytes() -> None:
    for name, fmt in FORMATS.items():
        for rows, cols in ((1, 64), (7, 128), (192, 576), (2048, 4096)):
            assert sizes.matrix_bytes(name, rows, cols) == fmt.nbytes(rows, cols), name


def test_a_recipe_has_a_format_for_every_kind_of_matrix() -> None:
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert names == {*sizes.KINDS, "experts", "search", "bits", "wide"}
    assert tuple(FORMATS) == FORMAT_NAMES


def test_planning_needs_no_torch() -> None:
    code = "import sys, mimo_local.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UsageError, match="q4_k") as caught:
        sizes.matrix_bytes("q4_k", 64, 64)
    assert "nf4" in caught.value.hint


@given(rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_fewer_bits_never_cost_more(rows: int, cols: int) -> None:
    nf4, int8, bf16, f32 = (
        sizes.matrix_bytes(f, rows, cols) for f in ("nf4", "int8", "bf16", "f32")
    )
    assert nf4 <= int8
    assert bf16 < f32
    if cols >= 4:  # below that INT8's scale per row weighs more than the row
        assert int8 <= bf16


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.0 MB"),
        (13_369_344, "13.4 MB"),
        (988_477_440, "988 MB"),
        (999_900_000, "1.0 GB"),
        (167_986_301_440, "168.0 GB"),
        (1_000_000_000_000, "1.00 TB"),
    ],
)
def test_bytes_are_written_as_on_a_label(nbytes: int, text: str) -> None:
    assert sizes.gb(nbytes) == text
