"""A pack of the real model's first layers with random weights, written in seconds.

    python bench/random_pack.py OUT --layers 3 [--vocab 1024] [--experts nf4] [--rest int8]

What `mimo bench --shape real` makes in memory, as a folder on disk: for everything that needs
files, such as experts that do not fit into memory. Called by bench/beyond_ram.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mimo_local import random_weights
from mimo_local.errors import MimoError
from mimo_local.random_weights import RandomWeights, shape_config
from mimo_local.weights import EXPERT_PARTS, shapes
from quant.formats import Parts
from quant.inventory import role_of
from quant.layout import TensorSpec, plan_experts
from quant.writer import PackWriter


def write(
    folder: Path,
    layers: int,
    vocab: int,
    *,
    experts: str = "nf4",
    rest: str = "int8",
    shape: str = "real",
) -> int:
    """Write the pack, whole or without its manifest; bytes written."""
    weights = RandomWeights(shape_config(layers, vocab, shape=shape), experts=experts, rest=rest)
    config, writer = weights.config, PackWriter(folder)
    records = [writer.blob("config.json", config_json(layers, vocab, shape))]
    specs = [
        TensorSpec(name, format_of(weights, name, size), size)
        for name, size in shapes(config, experts=False)
    ]

    def produce(spec: TensorSpec) -> Iterator[Parts]:
        if spec.format == "f32":
            yield {"weight": weights.tensor(spec.name)}
        else:
            yield weights.linear(spec.name).parts

    records.append(writer.tensors("rest.safetensors", specs, produce))
    narrow, wide = config.moe_intermediate_size, config.hidden_size
    matrices = dict(
        zip(EXPERT_PARTS, ((narrow, wide), (narrow, wide), (wide, narrow)), strict=True)
    )
    for spec in config.layers:
        if spec.mlp == "moe":
            file = f"experts-{spec.index:02d}.safetensors"
            planned = plan_experts(file, spec.index, config.n_experts, experts, matrices)

            def expert(e: int, layer: int = spec.index) -> dict[str, Parts]:
                made = weights.expert(layer, e)
                linears = (made.gate, made.up, made.down)
                return {n: x.parts for n, x in zip(EXPERT_PARTS, linears, strict=True)}

            records.append(writer.experts(spec.index, planned, expert))
    writer.finish({"source": "random weights"}, records)
    return sum(int(record["bytes"]) for record in records)


def format_of(weights: RandomWeights, name: str, shape: tuple[int, ...]) -> str:
    """The format a tensor outside the experts is stored in."""
    if len(shape) < 2 or role_of(name, shape) == "exact":
        return "f32"
    return "int8" if name.endswith("embed_tokens.weight") else weights.rest.name


def config_json(layers: int, vocab: int, shape: str) -> bytes:
    """The real config.json cut to its first layers and ids below `vocab`."""
    path = Path(random_weights.__file__).with_name("real_config.json")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    data |= random_weights.SHAPES[shape] | {"vocab_size": vocab, "num_hidden_layers": layers}
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        data[key] = data[key][:layers]
    return json.dumps(data, indent=1).encode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--experts", default="nf4")
    parser.add_argument("--rest", default="int8")
    args = parser.parse_args(argv)
    try:
        nbytes = write(args.out, args.layers, args.vocab, experts=args.experts, rest=args.rest)
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    print(json.dumps({"pack": str(args.out), "bytes": nbytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
