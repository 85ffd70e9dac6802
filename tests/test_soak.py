"""A mixed load in a process of its own takes the memory that was planned, not more and not less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_local import kernels, random_weights

BENCH = Path(__file__).parent.parent / "bench"
SHAPE = {
    "hidden_size": 1024, "num_attention_heads": 16, "swa_num_attention_heads": 16,
    "num_key_value_heads": 4, "swa_num_key_value_heads": 8, "head_dim": 64, "swa_head_dim": 64,
    "v_head_dim": 64, "swa_v_head_dim": 64, "intermediate_size": 2048,
    "moe_intermediate_size": 1024, "n_routed_experts": 64, "num_experts_per_tok": 4,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
"""Large enough for its buffers to show beside what Python and torch take: experts of 1.7 MB."""


@pytest.mark.skipif(kernels.get() is None, reason="the plan is for the native kernels")
def test_a_mixed_load_takes_the_planned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setitem(random_weights.SHAPES, "soak", SHAPE)
    import random_pack

    random_pack.write(tmp_path / "pack", 4, 512, shape="soak")
    command = [
        *(sys.executable, BENCH / "soak.py", "-m", tmp_path / "pack", "--ram", "320MB"),
        *("--context", "2048", "--minutes", "0.06"),
    ]
    env = os.environ | {"MIMO_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["requests"] >= 16
    assert found["disk_bytes"] > 0, "everything fits: there was nothing to hold down"
    assert 0.95 <= found["buffers_over_planned"] <= 1.05, found
