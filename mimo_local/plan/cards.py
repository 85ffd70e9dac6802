"""How fast graphics cards read and multiply, by their makers' figures: for plans, never measured.

Found by the name the driver gives, or by their memory where only that is known. Pure data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from mimo_local.sizes import GB


@dataclass(frozen=True, slots=True)
class Card:
    """One card's peak rates."""

    name: str
    vram: int
    """GB on the box."""
    vram_rate: float
    """GB/s."""
    tflops: float
    """Float32 of its shaders. Half of what its tensor cores do in bfloat16 with float32 sums, which
    is what long products reach of it."""
    pcie_rate: float = 25.0
    """GB/s: 16 lanes of the fourth generation; twice that of the fifth, half with 8 lanes."""


CARDS: Final = (
    # Longer names first: "RTX 4070 Ti SUPER" is no "RTX 4070".
    Card("RTX PRO 6000", 96, 1792, 125.0, 50.0),
    Card("RTX 6000 Ada", 48, 960, 91.1),
    Card("RTX A6000", 48, 768, 38.7),
    Card("L40S", 48, 864, 91.6),
    Card("H100", 80, 3350, 495.0, 50.0),
    Card("A100", 80, 2039, 156.0),
    Card("RTX 5090", 32, 1792, 104.8, 50.0),
    Card("RTX 5080", 16, 960, 56.3, 50.0),
    Card("RTX 5070 Ti", 16, 896, 43.9, 50.0),
    Card("RTX 5070", 12, 672, 30.9, 50.0),
    Card("RTX 5060 Ti", 16, 448, 23.7),
    Card("RTX 5060", 8, 448, 19.2),
    Card("RTX 4090", 24, 1008, 80.0),
    Card("RTX 4080 SUPER", 16, 736, 52.2),
    Card("RTX 4080", 16, 717, 48.7),
    Card("RTX 4070 Ti SUPER", 16, 672, 44.1),
    Card("RTX 4070 Ti", 12, 504, 40.1),
    Card("RTX 4070 SUPER", 12, 504, 35.5),
    Card("RTX 4070", 12, 504, 29.1),
    Card("RTX 4060 Ti", 16, 288, 22.1, 12.5),
    Card("RTX 4060", 8, 272, 15.1, 12.5),
    Card("RTX 3090 Ti", 24, 1008, 40.0),
    Card("RTX 3090", 24, 936, 35.6),
    Card("RTX 3080 Ti", 12, 912, 34.1),
    Card("RTX 3080", 10, 760, 29.8),
    Card("RTX 3070", 8, 448, 20.3),
    Card("RTX 3060 Ti", 8, 448, 16.2),
    Card("RTX 3060", 12, 360, 12.7),
)
_BY_SIZE: Final = ("RTX 4060", "RTX 3060", "RTX 4080", "RTX 4090", "RTX 5090", "RTX A6000", "A100")
"""What a card of that size, or a little less, most likely is like: the slower of the usual ones."""


def named(name: str) -> Card | None:
    """The card a driver calls so; None if it is not known, or a notebook's, which is slower."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    if "laptop" in words or "max q" in words:
        return None
    padded = f" {words} "
    found = [card for card in CARDS if f" {card.name.lower()} " in padded]
    return max(found, key=lambda card: len(card.name), default=None)


def like(vram: int) -> Card:
    """A usual card with so many bytes of memory."""
    usual = [card for name in _BY_SIZE for card in CARDS if card.name == name]
    return next((card for card in usual if vram <= 1.1 * card.vram * GB), usual[-1])
