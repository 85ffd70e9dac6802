"""What `mimo doctor` says about NVIDIA cards: lines to show, what is wrong, and the fix.

Judges the facts of `gpu_facts`; asks nothing itself, so that every machine can be written down in a
test. Knows no terminal and no model. Called by `doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

from mimo_local.gpu_facts import Answer, Around, Card, Probe, User
from mimo_local.sizes import GB, gb

DRIVERS: Final = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> the first driver that runs programs built for it."""
TORCH_13: Final = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
TORCH_12: Final = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
BUSY: Final = 1.5 * GB
"""VRAM taken by others: a desktop takes 0.3 to 1.2 GB."""
LANE: Final = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
"""GB/s of one lane by PCIe generation, before protocol: 85 % of it is what copies reach."""
SLOW: Final = 0.6
"""Of what the bus should do: below this, measured copies are called slow."""


class Trouble(NamedTuple):
    """As `doctor.Problem`."""

    level: Literal["broken", "warning"]
    message: str
    fix: str


class Found(NamedTuple):
    """Lines (label, value) of the section, and what is wrong."""

    lines: tuple[tuple[str, str], ...]
    troubles: tuple[Trouble, ...]


def present(answer: Answer, around: Around) -> bool:
    """Whether there is, or should be, an NVIDIA card: else nothing is said or tried."""
    return answer.kind != "missing" or around.on_bus > 0


def examine(
    answer: Answer, around: Around, build: str, probe: Probe | None, users: Sequence[User] = ()
) -> Found:
    """The whole screen. `build`: of torch, as `CUDA 13.0`; `probe` None: nothing was tried."""
    troubles = [*_driver(answer, around), *_build(answer, build)]
    lines = [("driver", _driver_line(answer))]
    for card in answer.cards:
        lines += _card_lines(card, many=len(answer.cards) > 1)
        troubles += _bus(card)
    if any(user.nbytes for user in users):
        lines.append(("in use by", _users_line(users)))
    troubles += _room(answer, users)
    lines.append(("torch", build))
    if probe is not None:
        lines += _probe_lines(probe)
        troubles += _probed(answer, probe)
    if around.wsl:
        lines += WSL
    return Found(tuple(lines), tuple(troubles))


# ---- the driver and torch's build ----------------------------------------------------------------


def _driver_line(answer: Answer) -> str:
    if answer.cards:
        return answer.cards[0].driver or "unknown"
    return {
        "missing": "not installed",
        "hangs": "does not answer",
        "none": "sees no card",
    }.get(answer.kind, answer.text)


def _driver(answer: Answer, around: Around) -> Iterator[Trouble]:
    """Why there are no cards, if there are none."""
    match answer.kind:
        case "missing" if around.container:
            yield Trouble(
                "warning",
                "an NVIDIA card is on the bus, but this container was not given it",
                "start it with `--gpus all`; the host needs the NVIDIA Container Toolkit",
            )
        case "missing":
            held = " (nouveau holds the card)" if around.nouveau else ""
            yield Trouble(
                "warning",
                f"an NVIDIA card is on the bus, but its driver is not installed{held}",
                "install NVIDIA's driver 580 or later (on Ubuntu `sudo ubuntu-drivers install`), "
                "then restart",
            )
        case "hangs":
            yield Trouble(
                "broken",
                "the NVIDIA driver does not answer",
                "restart the machine; look for `Xid` or `NVRM` in `sudo dmesg`",
            )
        case "none":
            yield Trouble(
                "warning",
                "the NVIDIA driver is there but sees no card",
                "check that the card sits firmly and has its power cables; in a virtual machine or "
                "container, that it was passed through",
            )
        case "failed":
            yield _failed(answer, around)


def _failed(answer: Answer, around: Around) -> Trouble:
    """What the driver's tool said when it failed."""
    text = answer.text.lower()
    if "version mismatch" in text:
        return Trouble(
            "broken",
            "the NVIDIA driver was updated and the old one is still loaded",
            "restart the machine",
        )
    if "permission" in text or around.locked:
        names = ", ".join(f"/dev/{name}" for name in around.locked[:3]) or "the card's devices"
        return Trouble(
            "broken",
            f"this user may not open {names}",
            "`sudo usermod -aG video,render $USER`, then log in again",
        )
    if "lost" in text or "device handle" in text:
        return Trouble(
            "broken",
            "the card fell off the bus",
            "restart; if it comes back, check power cables, riser and slot",
        )
    fix = (
        "update the NVIDIA driver in Windows, have none in WSL; then `wsl --shutdown`"
        if around.wsl
        else "install NVIDIA's driver 580 or later anew, then restart; with Secure Boot its module "
        "has to be signed"
    )
    return Trouble("broken", f"nvidia-smi says: {answer.text}", fix)


def _build(answer: Answer, build: str) -> Iterator[Trouble]:
    """Whether torch was built for this driver."""
    if not answer.cards:
        return
    if not build.startswith("CUDA "):
        yield Trouble(
            "warning", f"there is a card, but torch is built for {build}", _install(answer)
        )
        return
    driver = _driver_number(answer)
    major = build.removeprefix("CUDA ").partition(".")[0]
    needed = DRIVERS.get(int(major)) if major.isdigit() else None
    if needed is not None and driver and driver < needed:
        yield Trouble(
            "broken",
            f"driver {answer.cards[0].driver} is too old for torch's {build}: it needs {needed}",
            f"update the driver to {DRIVERS[13]} or later, or `{TORCH_12}`"
            if driver >= DRIVERS[12]
            else f"update the driver to {DRIVERS[13]} or later",
        )


def _driver_number(answer: Answer) -> int:
    """The first part of the driver's version, 0 if it has none."""
    first = answer.cards[0].driver.partition(".")[0] if answer.cards else ""
    return int(first) if first.isdigit() else 0


def _install(answer: Answer) -> str:
    driver = _driver_number(answer)
    if DRIVERS[12] <= driver < DRIVERS[13]:
        return f"`{TORCH_12}`"
    return f"`{TORCH_13}`" + ("" if driver else f" (needs driver {DRIVERS[13]})")


# ---- the cards -----------------------------------------------------------------------------------


def _card_lines(card: Card, *, many: bool) -> list[tuple[str, str]]:
    label = f"card {card.index}" if many else "card"
    kind = "" if card.capability is None else f", compute capability {_dotted(card.capability)}"
    lines = [(label, card.name + kind)]
    memory = f"{gb(card.total)}, {gb(card.free)} free"
    lines.append(("VRAM", memory))
    if card.lanes_now:
        # An idle card lowers its generation to save power; its lanes stay.
        idle = f" (now {card.gen_now}, as idle cards do)" if card.gen_now < card.gen_max else ""
        lanes = f"{card.lanes_now} of {card.lanes_max} lanes"
        lines.append(("bus", f"{lanes}, PCIe {card.gen_max or 'unknown'}{idle}"))
    return lines


def _bus(card: Card) -> Iterator[Trouble]:
    if card.capability is not None and card.capability < (8, 0):
        yield Trouble(
            "warning",
            f"{card.name} has no bfloat16 in hardware (compute capability "
            f"{_dotted(card.capability)}, 8.0 has it)",
            "expect slow products; `mimo bench --gpu-selftest` measures them",
        )
    if 0 < card.lanes_now < card.lanes_max:
        rate = LANE.get(card.gen_max, 0.0) * 0.85
        speeds = f": {rate * card.lanes_now:.0f} GB/s instead of {rate * card.lanes_max:.0f}"
        yield Trouble(
            "warning",
            f"{card.name} has {card.lanes_now} of its {card.lanes_max} PCIe lanes"
            + (speeds if rate else ""),
            "long prompts send all experts over this bus: put the card into the slot next to the "
            "processor, and see in the board's manual which M.2 slots take its lanes",
        )


def _users_line(users: Sequence[User]) -> str:
    named = [f"{user.name} {gb(user.nbytes)}" for user in users[:3] if user.nbytes]
    more = len([user for user in users if user.nbytes]) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _room(answer: Answer, users: Sequence[User]) -> Iterator[Trouble]:
    for card in answer.cards:
        if card.used > BUSY:
            names = ", ".join(user.name for user in users[:3] if user.nbytes)
            yield Trouble(
                "warning",
                f"{gb(card.used)} of {card.name}'s memory are taken"
                + (f", by {names} among others" if names else ""),
                "close programs that use the card: what is free is what experts get",
            )


# ---- what torch and bitsandbytes made of it ------------------------------------------------------


def _probe_lines(probe: Probe) -> list[tuple[str, str]]:
    lines = []
    if probe.available:
        works = [name for name, why in probe.checks.items() if not why]
        fails = [name for name, why in probe.checks.items() if why]
        lines.append(("works", ", ".join(works) or "nothing"))
        if fails:
            lines.append(("does not", ", ".join(fails)))
    if probe.rates:
        speeds = ", ".join(f"{rate / GB:.1f} GB/s {way}" for way, rate in probe.rates.items())
        lines.append(("copies", speeds))
    return lines


def _probed(answer: Answer, probe: Probe) -> Iterator[Trouble]:
    if probe.failed:
        yield Trouble(
            "broken",
            f"the card could not be tried: {probe.failed}",
            "run `python -m mimo_local.gpu_probe 0` to see all it says",
        )
        return
    if not probe.available:
        if probe.cuda and answer.cards:
            yield Trouble(
                "broken", f"torch cannot use the card: {probe.why}",
                "unset CUDA_VISIBLE_DEVICES if it is set; restart after a driver update",
            )  # fmt: skip
        return
    if not _runs(probe):
        newest = max(probe.archs, default="none")
        yield Trouble(
            "broken",
            f"torch has no code for compute capability {_dotted(probe.capability)} "
            f"(it goes up to {newest})",
            f"`{TORCH_13}` for newer cards, `{TORCH_12}` for older ones",
        )
    for name, why in probe.checks.items():
        if why:
            yield _failed_check(name, why)
    yield from _slow_bus(answer, probe)


def _runs(probe: Probe) -> bool:
    """Machine code runs on its own major version from its minor on; PTX on all later cards."""
    major, minor = probe.capability
    for arch in probe.archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        have = (int(digits[:-1]), int(digits[-1]))
        if have[0] == major and have[1] <= minor:
            return True
        if kind == "compute" and have <= (major, minor):
            return True
    return not probe.archs


def _failed_check(name: str, why: str) -> Trouble:
    if name == "Triton":
        compiler = "compiler" in why.lower()
        return Trouble(
            "warning",
            f"8-bit products and experts in VRAM take a slow way: {why}",
            "install gcc (on Ubuntu `sudo apt install gcc python3-dev`)"
            if compiler
            else "`pip install triton` (Linux)",
        )
    if name.endswith("products"):
        return Trouble(
            "broken",
            f"{name} do not work on the card: {why}",
            "`pip install -U bitsandbytes`; `python -m bitsandbytes` says what it misses",
        )
    if name == "pinned memory":
        return Trouble(
            "broken",
            f"memory cannot be pinned: {why}",
            "raise the limit of locked memory (`ulimit -l`); in WSL give it more memory",
        )
    return Trouble("broken", f"{name} do not work on the card: {why}", "restart the machine")


def _slow_bus(answer: Answer, probe: Probe) -> Iterator[Trouble]:
    """Copies measured much slower than the lanes should carry."""
    card = next((card for card in answer.cards if card.name == probe.name), None)
    rate = probe.rates.get("to the card", 0.0)
    if card is None or not rate or not card.lanes_now:
        return
    should = LANE.get(card.gen_max, 0.0) * 0.85 * card.lanes_now * GB
    if rate < SLOW * should:
        yield Trouble(
            "warning",
            f"copies to the card run at {rate / GB:.1f} GB/s, its bus should carry "
            f"{should / GB:.0f}",
            "close what else uses the bus; see in the firmware's settings that the slot is not "
            "held at a lower PCIe generation",
        )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


WSL: Final = [
    ("WSL memory", "half of the PC's, unless `memory=` in Windows' .wslconfig says otherwise"),
    ("WSL packs", "keep them inside WSL: /mnt/c is read over a network protocol"),
    (
        "WSL VRAM",
        "NVIDIA control panel, `CUDA - Sysmem Fallback Policy`: `Prefer No Sysmem Fallback`",
    ),
]
"""Without the last, Windows moves VRAM to RAM in silence when it runs short."""
