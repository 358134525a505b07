"""The architecture of a model, and the units that it is cut into.

A **unit** is the smallest thing held, moved and verified: ``embed``, ``layer.0`` … ``layer.L-1``, ``head`` (final norm
and output projection). Unit indexes run from 0 (``embed``) to L + 1 (``head``). Tensor names inside a unit are those of
the Hugging Face checkpoint without the prefix, and shapes and the rotary convention (halves, not pairs) are theirs too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from blyan_node.errors import CheckpointError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EIGHT_BIT = ("int8", "fp8")
MAX_JSON = 8 * 1024

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """What sets one family of Llama-like decoders apart from the others. A new family is one entry below."""

    qk_norm: bool  # an RMSNorm over each head of q and k, before the rotation
    gguf_pairs: bool  # GGUF files hold q and k permuted for rotation in pairs
    qkv_bias: bool = False  # biases on q, k and v and never on the output, and config.json says nothing of them


FAMILIES = {
    "llama": Family(qk_norm=False, gguf_pairs=True),
    "qwen2": Family(qk_norm=False, gguf_pairs=False, qkv_bias=True),
    "qwen3": Family(qk_norm=True, gguf_pairs=False),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of the pretraining.

    ``linear`` divides every frequency by ``factor``. ``llama3`` does so to the low ones only and blends between
    (transformers ``_compute_llama3_parameters``); the last three fields are its own and 0 for ``linear``.
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0


# Bounds on what a spec may claim: wide enough for every public model, so that a product of any few stays small.
_BOUNDS = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": (1, 1 << 16),
    "layers": (1, 1 << 10),
    "heads": (1, 1 << 10),
    "kv_heads": (1, 1 << 10),
    "head_dim": (2, 1 << 10),
    "intermediate_size": (1, 1 << 20),
    "context_length": (1, 1 << 24),
}


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of one model. Building one checks it; raises CheckpointError where it makes no sense."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_head: bool
    attention_bias: bool

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise CheckpointError(f"model family {self.family!r} is not supported; these are: {', '.join(FAMILIES)}")
        for name, (least, most) in _BOUNDS.items():
            _require(least <= getattr(self, name) <= most, f"{name} is {getattr(self, name)}, not in {least}..{most}")
        _require(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd and cannot be rotated")
        _require(0 < self.norm_eps < 1, f"norm_eps {self.norm_eps} is not in 0..1")
        _require(1 <= self.rope_theta < 1e12, f"rope_theta {self.rope_theta} is not in 1..1e12")
        scaling = self.rope_scaling
        if scaling is not None:
            _require(scaling.kind in ("linear", "llama3"), f"rotary scaling {scaling.kind!r} is not supported")
            _require(1 <= scaling.factor < 1e6, f"rotary scaling factor {scaling.factor} is not in 1..1e6")
            if scaling.kind == "llama3":
                _require(0 < scaling.low_freq_factor < scaling.high_freq_factor < 1e6, "llama3 scaling: bad bands")
                _require(0 < scaling.original_context < 1 << 24, "llama3 scaling: bad original context")

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before the rotation."""
        return FAMILIES[self.family].qk_norm

    @property
    def units(self) -> tuple[str, ...]:
        """All units in the order in which a prompt walks through them."""
        return ("embed", *(f"layer.{index}" for index in range(self.layers)), "head")

    def unit_tensors(self, unit: str) -> dict[str, Shape]:
        """Name and shape of every tensor that a unit's own blob holds."""
        hidden, inner = self.hidden_size, self.intermediate_size
        if unit == "embed":
            return {"embed_tokens.weight": (self.vocab_size, hidden)}
        if unit == "head":
            own: dict[str, Shape] = {"norm.weight": (hidden,)}
            return own if self.tied_head else own | {"lm_head.weight": (self.vocab_size, hidden)}
        if unit not in self.units:
            raise CheckpointError(f"this model has no unit {unit!r}; it has embed, layer.0..{self.layers - 1}, head")
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        tensors: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.attention_bias:
            tensors |= {
                "self_attn.q_proj.bias": (queries,),
                "self_attn.k_proj.bias": (keys,),
                "self_attn.v_proj.bias": (keys,),
            }
            if not FAMILIES[self.family].qkv_bias:
                tensors["self_attn.o_proj.bias"] = (hidden,)
        if self.qk_norm:
            tensors |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return tensors

    def blobs_for(self, unit: str) -> tuple[str, ...]:
        """The units whose blobs are needed to load ``unit``: a tied head also projects with the embedding."""
        return ("head", "embed") if unit == "head" and self.tied_head else (unit,)

    def unit_bytes(self, unit: str, dtype: str, compute: str = "bfloat16") -> int:
        """Bytes of memory for a unit's own tensors when its matrices are kept in ``dtype``.

        "int8" and "fp8" are one byte a weight and a float32 for each row, for every matrix: those of the layers, the
        embedding and the output projection. Norms and biases stay in what is computed in, ``compute``.
        """
        return sum(_tensor_bytes(shape, dtype, compute) for shape in self.unit_tensors(unit).values())

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of key-value cache for one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * ITEM_BYTES[dtype]

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, so that equal specs have equal bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ModelSpec:
        """Read a spec that a peer may have made; raise CheckpointError for anything but the form ``to_json`` gives."""
        if len(data) > MAX_JSON:
            raise CheckpointError(f"a model spec of {len(data)} bytes, where at most {MAX_JSON} are allowed")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the model spec is not JSON: {error}") from error
        if isinstance(value, dict) and value.get("rope_scaling") is not None:
            value["rope_scaling"] = _build(RopeScaling, value["rope_scaling"])
        spec: ModelSpec = _build(cls, value)
        if spec.to_json() != data:
            raise CheckpointError("the model spec is not in canonical JSON")
        return spec


def _tensor_bytes(shape: Shape, dtype: str, compute: str) -> int:
    if dtype not in EIGHT_BIT:
        return math.prod(shape) * ITEM_BYTES[dtype]
    return math.prod(shape) + 4 * shape[0] if len(shape) == 2 else math.prod(shape) * ITEM_BYTES[compute]


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise CheckpointError(f"model spec: {complaint}")


def _build(cls: type[Any], value: Any) -> Any:
    """Make a dataclass of str, int, float and bool fields from a JSON object with exactly its fields."""
    fields = dataclasses.fields(cls)
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields}:
        raise CheckpointError(f"the model spec is not an object with exactly the fields of {cls.__name__}")
    for field in fields:
        # Annotations are strings here; rope_scaling, the one that is no plain type, was built before.
        if field.type != "RopeScaling | None" and type(value[field.name]).__name__ != field.type:
            raise CheckpointError(f"model spec: {field.name} is not of type {field.type}")
    return cls(**value)
