"""The VRAM tier: the experts wanted most, on a device, multiplied there beside the CPU's share.

An expert's codes are copied as they are in RAM, its NF4 scales widened to float32 as bitsandbytes
wants them; 4-bit products go through `gemm_4bit`, 8-bit ones through torch. Who comes in is
`policy.AgedFrequency`'s to say, and slowly: a copy takes the bus from everybody. Results differ
from the CPU's in the last digits, because activations are rounded otherwise. Runs on any torch
device, the CPU included. Called by `tiered`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from mimo_local.device import Mark, Stream, host_buffer, is_accelerator
from mimo_local.errors import UsageError
from mimo_local.experts.policy import AgedFrequency, Key
from mimo_local.weights import Expert, QuantLinear
from quant.layout import ExpertLayout

PER_LAYER: Final = 1
"""Uploads of a layer's experts in a step at most: 14 MB take 0.6 ms of a 25 GB/s bus."""
STAGING: Final = 2
"""Host buffers that copies go through: one is filled while the other is on the bus."""
HALF_LIFE: Final = 32.0
"""Steps after which a touch counts half: by replay as good as recency with a fifteenth of the
uploads (bench/routing_policies.py)."""
MATRICES: Final = ("gate", "up", "down")
FORMATS: Final = ("nf4", "int8")


@dataclass(frozen=True, slots=True)
class _Shape:
    """One matrix W (rows, cols) of an expert, as it lies on the device."""

    rows: int
    cols: int
    format: str

    @property
    def codes(self) -> int:
        return self.rows * self.cols // (2 if self.format == "nf4" else 1)

    @property
    def scales(self) -> int:
        return self.rows * self.cols // 64 if self.format == "nf4" else self.rows

    @property
    def nbytes(self) -> int:
        return self.codes + 4 * self.scales


class VramTier:
    """Slots on a device; each holds one expert."""

    def __init__(
        self,
        layouts: Mapping[int, ExpertLayout],
        budget: int,
        device: torch.device | str,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`budget`: bytes of device memory. `dtype` of the activations there: bfloat16 on an
        accelerator, float32 on the CPU unless given. UsageError for a format no device multiplies.
        """
        import bitsandbytes  # noqa: F401  (1 s: registers its operators with torch)

        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if is_accelerator(self.device) else torch.float32)
        self.shapes = _shapes(layouts)
        self.slot_bytes = sum(shape.nbytes for shape in self.shapes.values())
        count = max(0, min(budget // self.slot_bytes, sum(x.count for x in layouts.values())))
        self.policy = AgedFrequency(count, half_life=HALF_LIFE, margin=1.25, per_layer=PER_LAYER)
        self._codes = {
            name: torch.empty((count, s.codes), dtype=torch.uint8, device=self.device)
            for name, s in self.shapes.items()
        }
        self._scales = {
            name: torch.empty((count, s.scales), dtype=torch.float32, device=self.device)
            for name, s in self.shapes.items()
        }
        self._slot: dict[Key, int] = {}
        self._free = list(range(count - 1, -1, -1))
        self._arrived = [Mark(self.device) for _ in range(count)]
        self._used = [Mark(self.device) for _ in range(count)]
        self._copies, self._compute = Stream(self.device), Stream(self.device, current=True)
        self._staging = [_Staging(self.shapes, self.device) for _ in range(min(STAGING, count))]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the slots take."""
        return self.slot_bytes * self.policy.capacity

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def touch(self, key: Key) -> bool:
        """Whether the expert is here; counts towards coming in if it is not."""
        return self.policy.touch(key)

    def consider(self, key: Key, expert: Expert, busy: Sequence[Key] = ()) -> bool:
        """Take in an expert that lies in RAM, if it has earned it; whether it was taken."""
        if key in self._slot or not self._staging or not self.policy.admits(key, busy):
            return False
        try:
            victim = self.policy.insert(key, busy)
        except ValueError:
            return False
        slot = self._free.pop() if victim is None else self._slot.pop(victim)
        self._upload(slot, expert)
        self._slot[key] = slot
        return True

    def end_of_step(self) -> None:
        """All layers of a step have been run."""
        self.policy.end_of_step()

    def launch(self, layer: int, x: torch.Tensor, rows: Mapping[int, Sequence[int]]) -> Pending:
        """Start the experts of `layer` that are here: expert -> rows of x (n, D) f32 on the host.

        Returns at once; the results are in `Pending.collect`.
        """
        order = [i for mine in rows.values() for i in mine]
        sent = host_buffer((len(order), x.shape[1]), self.dtype, self.device)
        sent.copy_(x[order])
        here = sent.to(self.device, non_blocking=True)
        out = torch.empty_like(here)
        at = 0
        for e, mine in rows.items():
            slot = self._slot[layer, e]
            self._arrived[slot].hold(self._compute)
            out[at : at + len(mine)] = self._mlp(slot, here[at : at + len(mine)])
            self._used[slot].set()
            at += len(mine)
        back = host_buffer(tuple(out.shape), self.dtype, self.device)
        back.copy_(out, non_blocking=True)
        done = Mark(self.device)
        done.set()
        return Pending(order, back, done, (sent, here, out))

    def _mlp(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        gate = self._product(slot, "gate", x)
        return self._product(slot, "down", F.silu(gate).mul_(self._product(slot, "up", x)))

    def _product(self, slot: int, name: str, x: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[name]
        codes, scales = self._codes[name][slot], self._scales[name][slot]
        if shape.format == "nf4":
            y: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
                x, codes.view(-1, 1), [shape.rows, shape.cols], scales, 64, "nf4"
            )
            return y
        w = codes.view(torch.int8).view(shape.rows, shape.cols).to(x.dtype)
        return F.linear(x, w).mul_(scales.to(x.dtype))

    def _upload(self, slot: int, expert: Expert) -> None:
        staging = self._staging[self._turn % len(self._staging)]
        self._turn += 1
        staging.fill(expert)
        with self._copies.use():
            # What the device still computes from this slot comes first.
            self._used[slot].hold(self._copies)
            for name in MATRICES:
                self._codes[name][slot].copy_(staging.codes[name], non_blocking=True)
                self._scales[name][slot].copy_(staging.scales[name], non_blocking=True)
            self._arrived[slot].set()
            staging.sent.set()


@dataclass(frozen=True, slots=True)
class Pending:
    """Results on their way back to the host."""

    order: list[int]
    back: torch.Tensor
    done: Mark
    keep: tuple[torch.Tensor, ...]
    """What the device reads until then."""

    def collect(self, out: torch.Tensor) -> None:
        """Wait, and put the results into the rows of `out` f32 they belong to."""
        self.done.wait()
        out[self.order] = self.back.to(out.dtype)


class _Staging:
    """Host memory an expert is copied through."""

    def __init__(self, shapes: Mapping[str, _Shape], device: torch.device) -> None:
        self.codes = {n: host_buffer((s.codes,), torch.uint8, device) for n, s in shapes.items()}
        self.scales = {
            n: host_buffer((s.scales,), torch.float32, device) for n, s in shapes.items()
        }
        self.sent = Mark(device)

    def fill(self, expert: Expert) -> None:
        """Once the last copy from here is over: this expert's bytes."""
        self.sent.wait()
        for name in MATRICES:
            linear: QuantLinear = getattr(expert, name)
            self.codes[name].copy_(linear.parts["codes"].reshape(-1).view(torch.uint8))
            self.scales[name].copy_(linear.parts["scales"].reshape(-1))


def _shapes(layouts: Mapping[int, ExpertLayout]) -> dict[str, _Shape]:
    """The three matrices; all layers have to store them alike."""
    found: dict[str, _Shape] = {}
    for layout in layouts.values():
        if layout.format not in FORMATS:
            raise UsageError(
                f"experts stored as {layout.format} cannot be multiplied in VRAM",
                hint=f"make a pack with `--format {FORMATS[0]}`, or leave VRAM out with `--vram 0`",
            )
        wide = layout.parts["down_proj.codes"][1][0]
        narrow = layout.parts["gate_proj.codes"][1][0]
        sizes = {"gate": (narrow, wide), "up": (narrow, wide), "down": (wide, narrow)}
        mine = {name: _Shape(*size, layout.format) for name, size in sizes.items()}
        if found and mine != found:
            raise UsageError(
                "the layers of this pack store their experts in different ways",
                hint="leave VRAM out with `--vram 0`",
            )
        found = mine
    return found
