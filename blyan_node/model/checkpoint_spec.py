"""Reading a ModelSpec out of the two kinds of checkpoint: Hugging Face ``config.json`` and GGUF metadata."""

from __future__ import annotations

import math
from typing import Any

from blyan_node.errors import CheckpointError
from blyan_node.model.spec import FAMILIES, ModelSpec, RopeScaling, Shape


def from_hf_config(config: dict[str, Any]) -> ModelSpec:
    """Read the ``config.json`` of a Hugging Face checkpoint; raise CheckpointError for what is not supported."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"model_type {family!r} is not supported; these are: {', '.join(FAMILIES)}")
    for key, plain in (("hidden_act", "silu"), ("mlp_bias", False), ("quantization_config", None)):
        if config.get(key, plain) != plain:
            raise CheckpointError(f"config.json: {key} {config[key]!r} is not supported")
    if config.get("use_sliding_window"):
        raise CheckpointError("config.json: sliding-window attention is not supported")
    rope = config.get("rope_parameters") or {}  # transformers 5; before that rope_theta and rope_scaling
    scaling = config.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise CheckpointError("config.json: the rotary parameters are not an object")
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1)) != 1:
        raise CheckpointError("config.json: partial rotary embeddings are not supported")
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    head_dim, bias = config.get("head_dim"), config.get("attention_bias")
    return ModelSpec(
        family=family,
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden,
        layers=_integer(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_integer(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads,
        head_dim=hidden // max(heads, 1) if head_dim is None else _integer(config, "head_dim"),
        intermediate_size=_integer(config, "intermediate_size"),
        context_length=_integer(config, "max_position_embeddings"),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_number(config | rope, "rope_theta", 10_000.0),
        rope_scaling=_scaling_from_hf(scaling),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(FAMILIES[family].qkv_bias if bias is None else bias),
    )


def _scaling_from_hf(scaling: dict[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, _number(scaling, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind,
            _number(scaling, "factor"),
            _number(scaling, "low_freq_factor"),
            _number(scaling, "high_freq_factor"),
            _integer(scaling, "original_max_position_embeddings"),
        )
    raise CheckpointError(f"rotary scaling {kind!r} is not supported; default, linear and llama3 are")


def from_gguf(metadata: dict[str, Any], tensors: dict[str, Shape]) -> ModelSpec:
    """Read GGUF metadata. ``tensors`` (name to shape, outermost first) tells a tied head and a vocabulary's size."""
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"GGUF architecture {family!r} is not supported; these are: {', '.join(FAMILIES)}")
    # Keys are <architecture>.<name>; missing ones become complaints of _integer and _number under that short name.
    short = {key.removeprefix(f"{family}."): value for key, value in metadata.items()}
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError("the GGUF file has no tensor token_embd.weight: it is incomplete, fetch it again")
    if "rope_freqs.weight" in tensors:
        raise CheckpointError("GGUF files with Llama 3.1 rotary factors are not supported; import the HF directory")
    kind = short.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"rotary scaling {kind!r} is not supported in GGUF; none and linear are")
    heads, hidden = _integer(short, "attention.head_count"), _integer(short, "embedding_length")
    head_dim = _integer(short, "attention.key_length", hidden // max(heads, 1))
    if _integer(short, "rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError("partial rotary embeddings are not supported")
    return ModelSpec(
        family=family,
        vocab_size=embedding[0],
        hidden_size=hidden,
        layers=_integer(short, "block_count"),
        heads=heads,
        kv_heads=_integer(short, "attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_integer(short, "feed_forward_length"),
        context_length=_integer(short, "context_length"),
        norm_eps=_number(short, "attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=_number(short, "rope.freq_base", 10_000.0),
        rope_scaling=RopeScaling("linear", _number(short, "rope.scaling.factor")) if kind == "linear" else None,
        tied_head="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
    )


def _integer(values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"the model's configuration has no integer {key} (found {value!r:.60})")
    return value


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"the model's configuration has no number {key} (found {value!r:.60})")
    return float(value)
