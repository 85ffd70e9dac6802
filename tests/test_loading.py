"""loading with a device: who computes what, what people are told, what happens without memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch

from mimo_local import hardware, loading, placing
from mimo_local.device import HOST, Devices
from mimo_local.engine import Engine
from mimo_local.errors import MimoError, NotEnoughMemoryError, UsageError
from mimo_local.events import Done, Token
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.store import ExpertStore
from mimo_local.experts.tiered import TieredStore
from mimo_local.hardware import Gpu
from mimo_local.model import Segment
from mimo_local.placing import Card, Placed
from mimo_local.plan.residents import hidden_bytes
from mimo_local.prefill import Room
from mimo_local.runs import recent
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings
from mimo_local.sizes import GB
from mimo_local.weights import PackWeights, open_weights
from quant.convert import convert

GPU = Card(0, Gpu("NVIDIA GeForce RTX 4090", 24 * GB, 22 * GB))
IDS = torch.arange(40)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    more = {"experts": 32, "top_k": 2, "hidden": 64, "moe_intermediate": 64}
    d = tiny.config("fsfs", "dmmm", **more, num_nextn_predict_layers=1)
    convert(tiny.write(folder / "source", d, mtp_layers=1), folder / "pack")
    return folder / "pack"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that torch would see."""

    def found(settings: Settings) -> tuple[Card | None, str]:
        return (None, "") if settings.device == "cpu" else (GPU, "")

    monkeypatch.setattr(placing, "find_card", found)


def on_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the card goes the accelerator's way on the CPU."""
    place = placing.place

    def placed(path: Path, weights: PackWeights, settings: Settings, dtype: torch.dtype) -> Placed:
        found = place(path, weights, dataclasses.replace(settings, device="cuda"), dtype)
        assert found.devices == Devices.all_on("cuda:0", 4)
        return dataclasses.replace(found, devices=Devices.all_on(HOST, 4, pretend=True))

    monkeypatch.setattr(placing, "place", placed)


def logits(found: loading.Loaded) -> torch.Tensor:
    cache = found.new_cache()
    return found.model.logits(found.model.forward([Segment(IDS, cache)]))


def test_a_pack_on_a_device_answers_as_on_the_host(
    pack: Path, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = loading.load(Settings(model=pack, context=64, device="cpu"))
    assert isinstance(host.model.experts, ExpertStore) and host.plan is not None
    assert not host.plan.device.layers and "layers," in host.description
    on_pretended(monkeypatch)
    there = loading.load(Settings(model=pack, context=64))
    assert isinstance(there.model.experts, DeviceStore)
    assert there.plan is not None and there.plan.layers_on_device == (True,) * 4
    assert there.model.experts.nbytes["vram"] > 0
    assert there.kernel.startswith("cpu + ")
    assert there.model.experts.prompts is not None
    assert there.model.device_budget == there.plan.device.hidden > 0
    assert there.description.endswith(
        "; RTX 4090: 4 of 4 layers, head, drafter, room for 96 experts"
    )
    a, b = logits(host), logits(there)
    # Activations are rounded to 8 bits here and not there, and a router's choice may tip over;
    # `test_device_model` compares numbers. Logits of another prompt would be 1.4 apart.
    assert (a - b).norm() < 0.35 * a.norm()
    assert there.session_bytes == host.session_bytes, "wherever they lie"
    assert 0 < there.plan.session_vram_bytes < there.session_bytes


def test_an_engine_on_a_device_answers_and_remembers(
    pack: Path, card: None, monkeypatch: pytest.MonkeyPatch, user_home: Path
) -> None:
    on_pretended(monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=12)
    answers = []
    with Engine.load(Settings(model=pack, context=64)) as engine:
        for _ in range(2):
            events = list(engine.submit(None, IDS.tolist(), params))
            answers.append([event.id for event in events if isinstance(event, Token)])
            done = events[-1]
            assert isinstance(done, Done) and done.stats.kernel.startswith("cpu + ")
    # Not the same ids: an expert that has come into VRAM meanwhile rounds otherwise.
    assert [len(answer) for answer in answers] == [12, 12] and answers[0][0] == answers[1][0]
    assert done.stats.cached_tokens == 39, "what the device held of the first was used"
    (run, _) = recent(user_home / "data", 10)
    assert run.kernel.startswith("cpu + ") and run.predicted[0].tokens_per_s > 0


@pytest.mark.parametrize("rows", [256, 1000, 5000])
def test_a_prompt_passes_in_as_many_rows_as_planned(pack: Path, card: None, rows: int) -> None:
    weights = open_weights(pack)
    found = placing.place(pack, weights, Settings(device="cuda", context=64), torch.bfloat16).plan
    assert found is not None
    assert found.device.hidden == hidden_bytes(weights.config, found.device.rows)
    budget = hidden_bytes(weights.config, rows)
    for n in (1, rows - 1, rows, rows + 1, 3 * rows, 10 * rows + 7):
        assert Room(1, False).on_device(n, 64, 2, budget).passes == -(-n // rows)


def test_ram_is_planned_without_what_lies_on_the_device(
    pack: Path, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_pretended(monkeypatch)
    whole = loading.load(Settings(model=pack, context=64)).plan
    assert whole is not None
    elsewhere, sizes = whole.elsewhere_bytes, whole.sizes
    assert elsewhere == sizes.resident - sizes.embedding
    limit = whole.spare_bytes + sizes.embedding + 24 * sizes.expert
    found = loading.load(Settings(model=pack, context=64, ram=limit, vram=2 * GB))
    store = found.model.experts
    assert isinstance(store, DeviceStore) and isinstance(store.inner, TieredStore)
    assert found.plan is not None
    assert abs(store.inner.ram.budget - found.plan.expert_ram_bytes) <= 2 * sizes.expert
    store.close()


def test_layers_and_experts_that_stay_are_named(pack: Path, card: None) -> None:
    weights = open_weights(pack)
    settings = Settings(model=pack, context=64, device="cuda")
    found = placing.place(pack, weights, settings, torch.bfloat16)
    assert found.devices == Devices.all_on("cuda:0", 4)
    assert found.note == "RTX 4090: 4 of 4 layers, head, drafter, room for 96 experts"
    off = placing.place(pack, weights, dataclasses.replace(settings, draft="off"), torch.bfloat16)
    assert "drafter" not in off.note and off.devices.drafter == HOST
    small = dataclasses.replace(settings, vram=int(1.5 * GB) + 300_000)
    with pytest.raises(UsageError, match="not even one layer") as caught:
        placing.place(pack, weights, small, torch.bfloat16)
    assert "--context" in caught.value.hint
    auto = placing.place(pack, weights, dataclasses.replace(small, device="auto"), torch.bfloat16)
    assert auto.devices.accelerator is None and "not even one layer" in auto.note


def test_a_model_that_a_gpu_would_slow_down_stays_and_that_is_said(pack: Path, card: None) -> None:
    found = loading.load(Settings(model=pack, context=64))
    assert found.model.devices.accelerator is None
    assert found.description.endswith(
        "; GPU not used: slower for this model (`--device cuda` does)"
    )


def test_a_card_that_cannot_be_used_is_named_where_people_look(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(hardware, "gpus", lambda: (GPU.gpu,))
    found = loading.load(Settings(model=pack, context=64))
    assert "GPU not used: PyTorch" in found.description
    with pytest.raises(UsageError, match="without CUDA"):
        loading.load(Settings(model=pack, context=64, device="cuda"))


def test_a_checkpoint_stays_on_the_host(pack: Path, card: None) -> None:
    source = pack.with_name("source")
    assert loading.load(Settings(model=source, context=64)).plan is None
    with pytest.raises(UsageError, match="checkpoint runs on the CPU"):
        loading.load(Settings(model=source, context=64, device="cuda"))


@pytest.mark.parametrize("where", ["Model", "VramTier"])
def test_vram_that_runs_out_while_loading_is_an_error_with_a_way_out(
    pack: Path, card: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    on_pretended(monkeypatch)
    monkeypatch.setattr(loading, where, full)
    with pytest.raises(NotEnoughMemoryError, match="GPU's memory ran out") as caught:
        loading.load(Settings(model=pack, context=64))
    assert "--vram 20GB" in caught.value.hint and "--device cpu" in caught.value.hint


def test_other_faults_are_not_taken_for_it(
    pack: Path, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    on_pretended(monkeypatch)
    monkeypatch.setattr(loading, "Model", broken)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        loading.load(Settings(model=pack, context=64))
    assert not isinstance(caught.value, MimoError)
