"""Which member of the family a model is, by the facts of its config: a name for people.

Knows names only; nothing computes differently for them. Called by `loading`, `doctor` and `mimo
plan`.
"""

from __future__ import annotations

from mimo_local.config import ModelConfig

_SIZES = {(48, 4096, 256): "Flash", (70, 6144, 384): "Pro"}


def member(config: ModelConfig) -> str | None:
    """MiMo-V2-Flash, MiMo-V2.5, MiMo-V2.6-Pro and so on; None for others, like the demo.

    V2.5 and V2.6 differ in their router's precision. A base model has the config of its chat model.
    """
    size = _SIZES.get((config.n_layers, config.hidden_size, config.n_experts))
    if size is None:
        return None
    if config.model_type == "mimo_v2_flash":
        return f"MiMo-V2-{size}"
    if config.router_dtype == "bfloat16":
        return f"MiMo-V2.6-{size}"
    return "MiMo-V2.5" if size == "Flash" else f"MiMo-V2.5-{size}"


def named(name: str, config: ModelConfig) -> str:
    """`name`, with the member's in brackets if there is one and it does not say so itself."""
    found = member(config)
    return name if found is None or found in name else f"{name} ({found})"
