"""MiMo-V2-Flash on one desktop. The public surface is `load`, imported when first used.

Kept lazy on purpose: `mimo --help` and `import mimo_local` must not pay torch's 2-3 seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_local.api import LocalModel, load

__all__ = ["LocalModel", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("LocalModel", "load"):
        from mimo_local import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
