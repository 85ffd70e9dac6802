"""ModelConfig and LayerSpec: the facts of one model, read from its config.json and then frozen.

The only reader of config.json's keys. It understands the hub's spelling (`hybrid_layer_pattern`,
`swa_*`) and transformers' own (`layer_types`, `rope_parameters`); where a file carries both they
must agree. Knows no tensors. Called by whoever opens weights, plans memory or describes a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mimo_local.config_values import Values, read_json
from mimo_local.errors import ConfigError

KNOWN_MODEL_TYPES = ("mimo_v2_flash", "mimo_v2")

Attention: TypeAlias = Literal["full", "sliding"]
Mlp: TypeAlias = Literal["dense", "moe"]
RouterDtype: TypeAlias = Literal["float32", "bfloat16"]

# The hub config of V2-Flash names neither: the checkpoint ships 3 MTP layers, and its chat ends
# turns with <|im_end|> (151645) or <|endoftext|> (151643).
_DEFAULT_MTP_LAYERS = 3
_REAL_VOCAB = 152_576
_REAL_EOS = (151_645, 151_643)
_MAX_LAYERS = 1024
_NO_EXPERTS: dict[str, Any] = {
    "n_experts": 0,
    "experts_per_token": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "moe_intermediate_size": 0,
    "router_dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Shape facts of one layer."""

    index: int
    attention: Attention
    heads: int
    kv_heads: int
    head_dim: int
    """Of queries and keys."""
    v_head_dim: int
    rotary_dim: int
    """Leading dims of each query and key head that are rotated."""
    rope_theta: float
    window: int | None
    """Keys a query sees, itself included; None where it sees all."""
    has_sink: bool
    mlp: Mlp
    intermediate: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of one model. Zero experts where no layer is a mixture."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rms_eps: float
    value_scale: float
    n_experts: int
    experts_per_token: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    moe_intermediate_size: int
    router_dtype: RouterDtype
    """In which the router's weights are stored; its product is float32 in both cases: see
    `ops.route`."""
    intermediate_size: int
    max_context: int
    tie_embeddings: bool
    eos_ids: tuple[int, ...]
    n_mtp_layers: int
    """What the config promises; the weights say how many there are."""
    mtp_layer: LayerSpec | None

    @property
    def n_layers(self) -> int:
        """Layers of the main model, MTP not counted."""
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether any layer routes to experts."""
        return self.n_experts > 0

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], *, window: int | None = None) -> ModelConfig:
        """Read a parsed config.json; `window` (keys incl. self) overrides it; or ConfigError."""
        return _Reader(dict(d) if isinstance(d, Mapping) else d).config(window)

    @classmethod
    def from_dir(cls, path: Path | str, *, window: int | None = None) -> ModelConfig:
        """Read config.json of a folder, end ids from generation_config.json if it has one."""
        folder = Path(path)
        d = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.exists():
            eos = read_json(generation).get("eos_token_id")
            if eos is not None:
                d = {**d, "eos_token_id": eos}
        return cls.from_dict(d, window=window)


class _Reader(Values):
    """One parsed config.json of this family, both spellings side by side."""

    def window(self, override: int | None, *, needed: bool) -> int | None:
        """Keys a query of a sliding layer sees, itself included.

        `sliding_window_size` n means n previous keys and the query: n + 1. A bare `sliding_window`
        is n + 1 keys in a hub file, n in transformers' own, where the query is counted already.
        """
        if override is not None:
            if override < 1:
                raise ConfigError(
                    f"a window of {override} keys shows nothing", hint="use a window of at least 1"
                )
            return override
        if self.d.get("sliding_window_size") is not None:
            size = self.integer("sliding_window_size", low=0)
            bare = self.d.get("sliding_window")
            if bare is not None and bare not in (size, size + 1):
                raise self.bad("sliding_window", bare, f"`sliding_window_size` is {size}")
            return size + 1
        if self.d.get("sliding_window") is None:
            if needed:
                raise self.missing("sliding_window_size")
            return None
        hub_style = "hybrid_layer_pattern" in self.d and "layer_types" not in self.d
        return self.integer("sliding_window", low=0 if hub_style else 1) + int(hub_style)

    def rope(self, kind: Attention, head_dim: int) -> tuple[float, int]:
        """(base, rotated dims) of one attention kind."""
        tables = self.d.get("rope_parameters") or {}
        own = tables.get(f"{kind}_attention") or {} if isinstance(tables, Mapping) else None
        if not isinstance(own, Mapping):
            raise self.bad("rope_parameters", tables, "an object per layer type is needed")
        for table in (own, tables, self.d.get("rope_scaling") or {}):
            scheme = (
                table.get("rope_type", table.get("type")) if isinstance(table, Mapping) else table
            )
            if scheme not in (None, "default"):
                raise self.bad("rope_type", scheme, "this family uses plain positions only")
        key = "rope_theta" if kind == "full" else "swa_rope_theta"
        # V2.6 writes one table for all; its base is that of full attention.
        base = tables if kind == "full" and not own else own
        theta = self.either(key, base, "rope_theta")
        factor = self.either("partial_rotary_factor", own or tables, "partial_rotary_factor")
        rotary = int(head_dim * factor)
        if rotary % 2 or not 2 <= rotary <= head_dim:
            why = f"rotates {rotary} of {head_dim} dims, not an even part"
            raise self.bad("partial_rotary_factor", factor, why)
        return theta, rotary

    def attention(self, kind: Attention, window: int | None) -> dict[str, Any]:
        """The attention fields of a LayerSpec for one kind of layer."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads")
        head_dim, v_head_dim = self.integer("head_dim"), self.integer("v_head_dim")
        sink = self.flag("add_full_attention_sink_bias", False)
        if kind == "sliding":
            heads = self.integer("swa_num_attention_heads", heads)
            kv_heads = self.integer("swa_num_key_value_heads", 2 * kv_heads)
            head_dim = self.integer("swa_head_dim", head_dim)
            v_head_dim = self.integer("swa_v_head_dim", v_head_dim)
            sink = self.flag("add_swa_attention_sink_bias", True)
        if heads % kv_heads:
            raise self.bad("num_attention_heads", heads, f"{kind}: not a multiple of {kv_heads}")
        theta, rotary = self.rope(kind, head_dim)
        return {
            "attention": kind,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "rotary_dim": rotary,
            "rope_theta": theta,
            "window": window if kind == "sliding" else None,
            "has_sink": sink,
        }

    def experts(self) -> dict[str, Any]:
        """The expert fields of a ModelConfig, checked against each other."""
        n, k = self.integer("n_routed_experts"), self.integer("num_experts_per_tok")
        groups, chosen = self.integer("n_group", 1), self.integer("topk_group", 1)
        if k > n:
            raise self.bad("num_experts_per_tok", k, f"there are {n} experts")
        if n % groups or (groups > 1 and n // groups < 2):
            raise self.bad("n_group", groups, f"{n} experts do not form groups of two or more")
        if chosen > groups or k > chosen * (n // groups):
            raise self.bad("topk_group", chosen, f"cannot give top {k} from {groups} groups")
        return {
            "n_experts": n,
            "experts_per_token": k,
            "n_group": groups,
            "topk_group": chosen,
            "norm_topk_prob": self.flag("norm_topk_prob", True),
            "routed_scaling_factor": self.number("routed_scaling_factor", 1.0),
            "moe_intermediate_size": self.integer("moe_intermediate_size"),
            "router_dtype": self.router_dtype(),
        }

    def router_dtype(self) -> RouterDtype:
        """V2.6 names it; the others' routers are float32."""
        match self.present("moe_router_dtype", "float32"):
            case "float32":
                return "float32"
            case "bfloat16":
                return "bfloat16"
            case other:
                raise self.bad("moe_router_dtype", other, "only float32 and bfloat16 are known")

    def eos(self, vocab_size: int) -> tuple[int, ...]:
        """Ids that end an answer, without repeats; in the family's own vocabulary always both."""
        raw = self.d.get("eos_token_id")
        known = _REAL_EOS if vocab_size == _REAL_VOCAB else ()
        if raw is None:
            return known
        ids = raw if isinstance(raw, list | tuple) else [raw]
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
                raise self.bad("eos_token_id", raw, f"not ids of a vocabulary of {vocab_size}")
        return tuple(dict.fromkeys((*ids, *known)))

    def model_type(self) -> str:
        value = self.present("model_type", None)
        if value not in KNOWN_MODEL_TYPES:
            raise ConfigError(
                f"model type `{value}` is not known",
                hint=f"known model types: {', '.join(KNOWN_MODEL_TYPES)}",
            )
        return str(value)

    def check_switches(self) -> None:
        """Refuse what this engine would have to ignore."""
        for key, known in (
            ("hidden_act", "silu"),
            ("scoring_func", "sigmoid"),
            ("topk_method", "noaux_tc"),
            ("attention_bias", False),
            ("n_shared_experts", 0),
        ):
            value = self.d.get(key)
            if value is not None and value != known:
                raise self.bad(key, value, f"only {known!r} is known")
        layout = self.d.get("attention_projection_layout")
        if layout not in (None, "split", "fused_qkv"):
            raise self.bad("attention_projection_layout", layout, "split or fused_qkv is needed")

    def layer_kinds(self) -> tuple[list[Attention], list[Mlp]]:
        """(attention kind, mlp kind) of every layer."""
        n = self.integer("num_hidden_layers", high=_MAX_LAYERS)
        attention = self.kinds(
            n, "hybrid_layer_pattern", {0: "full", 1: "sliding"},
            "layer_types", {"full_attention": "full", "sliding_attention": "sliding"},
        )  # fmt: skip
        mlp = self.kinds(
            n, "moe_layer_freq", {0: "dense", 1: "moe"},
            "mlp_layer_types", {"dense": "dense", "sparse": "moe"},
        )  # fmt: skip
        return attention, mlp

    def config(self, window_override: int | None) -> ModelConfig:
        """The whole file."""
        model_type = self.model_type()
        self.check_switches()
        attention, mlp = self.layer_kinds()
        window = self.window(window_override, needed="sliding" in attention)
        # MTP layers are sliding layers: a model without a window has none.
        n_mtp = self.integer("num_nextn_predict_layers", _DEFAULT_MTP_LAYERS, low=0) * bool(window)
        kinds = [*attention, "sliding"] if n_mtp else attention
        specs = {kind: self.attention(kind, window) for kind in dict.fromkeys(kinds)}
        moe = self.experts() if "moe" in mlp else _NO_EXPERTS
        needs_dense = "dense" in mlp or n_mtp > 0
        dense = self.integer("intermediate_size", None if needs_dense else 0, low=int(needs_dense))
        width = {"dense": dense, "moe": moe["moe_intermediate_size"]}
        layers = tuple(
            LayerSpec(index=i, **specs[a], mlp=m, intermediate=width[m])
            for i, (a, m) in enumerate(zip(attention, mlp, strict=True))
        )
        mtp: dict[str, Any] = {"index": len(layers), "mlp": "dense", "intermediate": dense}
        vocab = self.integer("vocab_size")
        return ModelConfig(
            model_type=model_type,
            vocab_size=vocab,
            hidden_size=self.integer("hidden_size"),
            layers=layers,
            rms_eps=self.either("layernorm_epsilon", self.d, "rms_norm_eps"),
            value_scale=self.number("attention_value_scale", 1.0),
            intermediate_size=dense,
            max_context=self.integer("max_position_embeddings"),
            tie_embeddings=self.flag("tie_word_embeddings", False),
            eos_ids=self.eos(vocab),
            n_mtp_layers=n_mtp,
            mtp_layer=LayerSpec(**specs["sliding"], **mtp) if n_mtp else None,
            **moe,
        )
