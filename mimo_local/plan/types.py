"""What a plan is asked with and what it answers: plain frozen data, bytes and seconds.

Imported by every module of the package; knows no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from mimo_local.errors import DiskSpaceError, MimoError, NotEnoughMemoryError
from mimo_local.plan.rates import GPU_FLOPS, Calibration
from mimo_local.plan.residents import OnDevice
from mimo_local.sizes import PackSizes

DRAFTER: Final = ("MTP drafter", "4-bit head for drafts")
"""What drafting takes, as the table names it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The machine to plan for: bytes, cores, peak rates in bytes/s (assumed unless measured)."""

    ram: int
    disk: int
    vram: int = 0
    cores: int = 8
    ram_rate: float = 70e9
    disk_rate: float = 7e9
    vram_rate: float = 1008e9
    pcie_rate: float = 25e9
    gpu_flops: float = GPU_FLOPS
    """Reached by a GPU in a long prompt's products, multiply-adds counted twice."""
    gpu: str = "RTX 4090"
    """The card whose rates these are."""
    core_flops: float = 60e9
    """Multiply-adds of one core in a long prompt's products, each counted twice."""
    measured: tuple[str, ...] = ()
    """Names of the rates that were measured here: "ram", "disk"; "gpu": the card is in here."""
    given: tuple[str, ...] = ()
    """Names of those somebody typed."""
    native: bool = True
    """The native kernels multiply weights as they are; without them products unpack a matrix."""
    pack_present: bool = False
    """The pack is already on this disk: its bytes need no free space."""
    reserve: int | None = None
    """Bytes of `ram` left alone; None: an eighth, at most 8 GB, and this program's own 0.5 GB."""
    vram_reserve: int | None = None
    """The same of `vram`; None: 2.5 GB."""
    calibration: Calibration | None = None
    """What the decode loop measured on this machine with this pack; goes before the rates."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the plan: how many of its bytes live where."""

    name: str
    nbytes: int
    vram: int = 0
    ram: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Bytes per part and tier, experts per tier, buffers; what the tiers' budgets are made of."""

    context: int
    kv_itemsize: int
    vram: Mapping[str, int]
    """Part -> bytes in VRAM, as many layers as lie there."""
    ram: Mapping[str, int]
    disk: Mapping[str, int]
    work: int
    """Activations of one chunk of rows, in RAM."""
    restarts: int
    """Copies of sliding layers' keys and values that a session can return to, in RAM."""
    reserve: int
    hidden_bytes: int
    """RAM for the hidden states of a long prompt."""
    hidden_budget: int
    """What a prompt's buffers may take before one of the three goes into a file. The other two then
    may take twice as much, so it is half of `hidden_bytes` where not all of the context fits."""
    hidden_tokens: int
    """Longest prompt whose hidden states fit."""
    device: OnDevice = field(default_factory=OnDevice)
    """What a GPU computes, and its buffers."""
    vram_experts: int = 0
    ram_experts: int = 0
    disk_experts: int = 0
    copies: int = 0
    """Experts in VRAM that lie in RAM too, so that one pushed out of VRAM costs no read."""
    staging_slots: int = 0
    """Expert slots that reads land in."""
    ram_slot: int = 0
    """Bytes of one slot in RAM."""
    short: int = 0
    """Bytes of RAM missing before the first expert; 0: it works."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decode:
    """One token's cost under one assumption about routing."""

    routing: str
    tokens_per_s: float
    disk_bytes: float
    """Read from disk per token, mean."""
    hit: float
    """Share of the chosen experts that lies in VRAM or RAM."""
    resident_s: float
    """Everything but experts: attention, dense layers, head, keys and values, overheads."""
    expert_s: float
    wait_s: float
    """What the disk adds to that."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A document's cost: `parts` passes of equally many tokens, each reads an expert once."""

    tokens: int
    parts: int
    seconds: float
    bound: str
    """What takes longest: "disk", "PCIe", "GPU" or "arithmetic" (the processor's)."""
    limits: Mapping[str, float]
    """Seconds each of them needs alone, most of them hidden behind the longest; "the rest" is what
    layers that no GPU computes take besides experts, and nothing hides it."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Estimated speeds of one placement; `decode` from the worst routing to the best."""

    decode: tuple[Decode, ...]
    depth: int
    """Tokens in the context while decoding."""
    prefill: Prefill
    load_s: float
    """Until the first token can be asked for."""
    fill_s: float
    """Reading what RAM and VRAM hold of experts; spread over the first answers."""

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Slowest and fastest decode."""
        speeds = [decode.tokens_per_s for decode in self.decode]
        return min(speeds), max(speeds)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a plan cannot work: what is missing in bytes, and what would help."""

    kind: Literal["memory", "disk"]
    message: str
    hint: str
    missing: int

    def error(self) -> MimoError:
        """The same as the error a command raises."""
        cls = NotEnoughMemoryError if self.kind == "memory" else DiskSpaceError
        return cls(self.message, hint=self.hint)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: where every byte lives, what the tiers may take, how fast that would be."""

    budget: Budget
    sizes: PackSizes
    placement: Placement
    table: tuple[Row, ...]
    problems: tuple[Problem, ...]
    prediction: Prediction | None
    """None if it does not fit."""
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the planned placement works at all."""
        return not self.problems

    @property
    def context(self) -> int:
        """Tokens that keys and values have room for."""
        return self.placement.context

    @property
    def expert_ram_bytes(self) -> int:
        """Budget of the RAM tier: the slots of experts that stay and those that reads land in."""
        found = self.placement
        slots = found.ram_experts + found.copies + found.staging_slots
        return slots * found.ram_slot

    @property
    def expert_vram_bytes(self) -> int:
        """Budget of the VRAM tier."""
        return self.placement.vram_experts * self.sizes.vram_slot

    @property
    def device(self) -> OnDevice:
        """What a GPU computes besides experts, and its buffers."""
        return self.placement.device

    @property
    def layers_on_device(self) -> tuple[bool, ...]:
        """For each layer whether its attention, norms and dense part are computed by a GPU."""
        return tuple(i < self.device.layers for i in range(len(self.sizes.layers)))

    @property
    def vram_bytes(self) -> int:
        """Most VRAM the model takes by this plan, the driver's own not counted."""
        resident = self.device.nbytes if self.device.layers else 0
        return resident + self.expert_vram_bytes

    @property
    def drafts(self) -> bool:
        """Whether the drafter lies in memory."""
        return any(DRAFTER[0] in tier for tier in (self.placement.vram, self.placement.ram))

    @property
    def spare_bytes(self) -> int:
        """RAM besides the main model: keys and values, drafting, activations, long prompts."""
        found = self.placement
        drafter = sum(found.ram.get(name, 0) for name in DRAFTER)
        sessions = self.session_bytes - self.session_vram_bytes
        return sessions + drafter + found.work + found.hidden_bytes + found.device.pinned

    @property
    def elsewhere_bytes(self) -> int:
        """Bytes of the pack besides experts and drafter that RAM is spared, as a GPU has them."""
        counted = ("KV cache", *DRAFTER)
        return self.sizes.resident - sum(
            nbytes for name, nbytes in self.placement.ram.items() if name not in counted
        )

    @property
    def session_bytes(self) -> int:
        """What sessions may take together: a context's keys and values, its restart points."""
        ram = self.placement.ram.get("KV cache", 0) + self.placement.restarts
        return ram + self.session_vram_bytes

    @property
    def session_vram_bytes(self) -> int:
        """Of these in VRAM: those of the layers that are computed there."""
        return self.device.kv + self.device.restarts

    @property
    def ram_bytes(self) -> int:
        """Most RAM the model takes by this plan: the budget, less what no further expert fits."""
        counted = ("KV cache", *DRAFTER)
        parts = sum(n for name, n in self.placement.ram.items() if name not in counted)
        return parts + self.spare_bytes + self.expert_ram_bytes

    @property
    def staging_slots(self) -> int:
        """Of the RAM tier's slots, those that reads land in."""
        return self.placement.staging_slots

    @property
    def hidden_budget_bytes(self) -> int:
        """RAM for a long prompt's hidden states before they spill to disk."""
        return self.placement.hidden_budget

    def check(self) -> None:
        """Raise the first problem as NotEnoughMemoryError or DiskSpaceError."""
        for problem in self.problems:
            raise problem.error()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json; every speed is an estimate."""
        return asdict(self) | {
            "fits": self.fits,
            "speeds": "estimated",
            "total": self.sizes.total,
            "context": self.context,
            "expert_ram_bytes": self.expert_ram_bytes,
            "expert_vram_bytes": self.expert_vram_bytes,
            "staging_slots": self.staging_slots,
            "hidden_budget_bytes": self.hidden_budget_bytes,
            "vram_bytes": self.vram_bytes,
            "session_vram_bytes": self.session_vram_bytes,
        }
