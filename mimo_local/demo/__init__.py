"""The embedded demo: a real 135 M chat model (SmolLM2-135M-Instruct) as a MiMo-V2-Flash.

`demo_pack()` is the whole surface: it fetches the weights once, rewrites them (rewrite.py says
why that changes nothing), converts them to a pack and returns its folder. fetch.py, gguf.py,
source.py and tokenizer_files.py bring the original; build.py puts it together. Called by cli, api
and benchmark.
"""

from __future__ import annotations

from mimo_local.demo.build import DEMO_VERSION, VARIANTS, demo_folder, demo_pack

MODEL_NAME = "SmolLM2-135M-Instruct"

__all__ = ["DEMO_VERSION", "MODEL_NAME", "VARIANTS", "demo_folder", "demo_pack"]
