"""A forward pass that can be differentiated: one sequence, no cache, weights given with each call.

:mod:`blyan_node.model.layers` packs its weights and keeps keys and values; gradients need neither. The arithmetic is
the same, its norms and rotations are those, and a test compares the two. Training and judging run on this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as fn

from blyan_node.errors import RuleError
from blyan_node.model.importing import read_units
from blyan_node.model.layers import RmsNorm, RotaryEmbedding, Rotation
from blyan_node.model.spec import ModelSpec

Weights = Mapping[str, torch.Tensor]


def decoder_layer(spec: ModelSpec, weights: Weights, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Run one layer on x [tokens, hidden], each token looking at itself and those before it."""

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        return RmsNorm(weights[f"{name}.weight"], spec.norm_eps)(h)

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return fn.linear(h, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    h = norm("input_layernorm", x)
    shape = (x.shape[0], -1, spec.head_dim)
    queries, keys, values = (linear(f"self_attn.{name}_proj", h).view(shape) for name in ("q", "k", "v"))
    if spec.qk_norm:
        queries, keys = norm("self_attn.q_norm", queries), norm("self_attn.k_norm", keys)
    queries, keys = rotation(queries), rotation(keys)
    groups = spec.heads // spec.kv_heads
    keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (queries, keys, values))
    attended = fn.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + linear("self_attn.o_proj", attended[0].transpose(0, 1).reshape(x.shape[0], -1))
    h = norm("post_attention_layernorm", x)
    return x + linear("mlp.down_proj", fn.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h))


class Forward:
    """A whole model in float32, mapped from its unit blobs. Nothing here changes.

    Raises what :func:`read_units` does.
    """

    def __init__(self, spec: ModelSpec, blobs: Mapping[str, Path]) -> None:
        self.spec = spec
        self._units = read_units(spec, spec.units, blobs, dtype=torch.float32)
        self._rotary = RotaryEmbedding(spec, torch.float32, torch.device("cpu"))

    def unit(self, unit: str) -> dict[str, torch.Tensor]:
        """The weights of one unit, float32."""
        return self._units[unit]

    def below(self, layer: int, tokens: Sequence[int]) -> torch.Tensor:
        """What reaches a layer [tokens, hidden]. Raises RuleError for no tokens, too many, or ids beyond the model's.

        No gradient: what is below the first layer that learns never changes.
        """
        if (
            not 0 < len(tokens) <= self.spec.context_length
            or not 0 <= min(tokens) <= max(tokens) < self.spec.vocab_size
        ):
            raise RuleError(f"not 1 to {self.spec.context_length} token ids below {self.spec.vocab_size}")
        with torch.no_grad():
            x = fn.embedding(torch.tensor(tokens), self._units["embed"]["embed_tokens.weight"])
            return self._layers(range(layer), x, {})

    def logits(self, layer: int, x: torch.Tensor, changed: Mapping[str, Weights]) -> torch.Tensor:
        """Go on from what reaches a layer to logits [tokens, vocab], with other weights for some units."""
        x = self._layers(range(layer, self.spec.layers), x, changed)
        x = RmsNorm(self._units["head"]["norm.weight"], self.spec.norm_eps)(x)
        tied = self.spec.tied_head
        projection = self._units["embed" if tied else "head"]["embed_tokens.weight" if tied else "lm_head.weight"]
        return fn.linear(x, projection)

    def loss(self, layer: int, x: torch.Tensor, tokens: Sequence[int], changed: Mapping[str, Weights]) -> torch.Tensor:
        """Mean cross-entropy, in nats, of each of ``tokens`` after the first; ``x`` is ``below(layer, tokens)``."""
        return fn.cross_entropy(self.logits(layer, x[:-1], changed), torch.tensor(tokens[1:]))

    def _layers(self, layers: range, x: torch.Tensor, changed: Mapping[str, Weights]) -> torch.Tensor:
        rotation = self._rotary(torch.arange(x.shape[0], dtype=torch.float32))
        for unit in map("layer.{}".format, layers):
            x = decoder_layer(self.spec, changed.get(unit, self._units[unit]), x, rotation)
        return x
