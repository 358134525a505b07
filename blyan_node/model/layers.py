"""The layers of Llama-like decoders, over the concatenated tokens of several sessions.

Everything but attention runs once on all rows [tokens, hidden]; attention runs session by session over its cache.
The arithmetic follows transformers' ``modeling_llama.py`` and ``modeling_qwen3.py``. RMSNorm: Zhang & Sennrich, 2019;
rotary embeddings: Su et al., 2021; grouped-query attention: Ainslie et al., 2023; SwiGLU: Shazeer, 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as fn

from blyan_node.model.cache import Cache
from blyan_node.model.linear import Linear
from blyan_node.model.spec import ModelSpec
from blyan_node.model.weights import UnitWeights


@dataclass(frozen=True)
class Segment:
    """The next ``tokens`` rows of a batch: consecutive tokens of one session, the first at ``position``.

    ``mask`` [groups * tokens, position + tokens] is true where a query may look; None where it may look everywhere.
    """

    cache: Cache
    position: int
    tokens: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [tokens, 1, head_dim] of the rotary embedding of each row."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [tokens, heads, head_dim]: dimension i turns with dimension i + head_dim / 2."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class RotaryEmbedding:
    """Makes rotations from positions."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._frequencies = rotary_frequencies(spec).to(device)

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """The rotation for float32 positions [tokens]."""
        angles = torch.outer(positions, self._frequencies)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return Rotation(angles.cos().to(self._dtype), angles.sin().to(self._dtype))


def rotary_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2], stretched as the spec's scaling says."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: waves longer than the low band are stretched, shorter than the high band kept, between them blended.
    waves = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / waves - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(waves > scaling.original_context / low, frequencies / scaling.factor, blended)
    return torch.where(waves < scaling.original_context / high, frequencies, stretched)


class RmsNorm:
    """Divide by the root of the mean square, in float32, and scale."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self._weight * scaled.to(x.dtype)


class DecoderLayer:
    """One layer: attention and a gated feed-forward network, each added to its own input."""

    def __init__(self, spec: ModelSpec, index: int, weights: UnitWeights) -> None:
        self._index = index  # in the shard's caches
        self._head_dim = spec.head_dim
        self._kv_heads = spec.kv_heads
        self._groups = spec.heads // spec.kv_heads
        self._attention_norm = RmsNorm(weights.vectors["input_layernorm.weight"], spec.norm_eps)
        self._mlp_norm = RmsNorm(weights.vectors["post_attention_layernorm.weight"], spec.norm_eps)
        self._query_norm = self._key_norm = None
        if spec.qk_norm:
            self._query_norm = RmsNorm(weights.vectors["self_attn.q_norm.weight"], spec.norm_eps)
            self._key_norm = RmsNorm(weights.vectors["self_attn.k_norm.weight"], spec.norm_eps)

        def linear(*names: str) -> Linear:
            biases = [weights.vectors[f"{name}.bias"] for name in names if f"{name}.bias" in weights.vectors]
            return Linear([weights.matrices[f"{name}.weight"] for name in names], biases)

        self._inputs = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._output = linear("self_attn.o_proj")
        self._gate_and_up = linear("mlp.gate_proj", "mlp.up_proj")
        self._down = linear("mlp.down_proj")

    def __call__(self, x: torch.Tensor, rotation: Rotation, segments: list[Segment]) -> torch.Tensor:
        """Run on x [tokens, hidden], rows of the segments in order; appends to their caches."""
        x = x + self._attention(self._attention_norm(x), rotation, segments)
        gate, up = self._gate_and_up.split(self._mlp_norm(x))
        return x + self._down(fn.silu(gate) * up)

    def _attention(self, h: torch.Tensor, rotation: Rotation, segments: list[Segment]) -> torch.Tensor:
        rows = h.shape[0]
        shape = (rows, -1, self._head_dim)
        queries, keys, values = (part.reshape(shape) for part in self._inputs.split(h))
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = self._query_norm(queries), self._key_norm(keys)
        queries, keys = rotation(queries), rotation(keys)
        # Tokens become the last but one dimension here, once, so that little is left to do for each session.
        grouped = queries.view(rows, self._kv_heads, self._groups, self._head_dim).permute(1, 2, 0, 3)
        sizes = [segment.tokens for segment in segments]
        each = zip(
            segments,
            torch.split(grouped, sizes, dim=2),
            torch.split(keys.transpose(0, 1), sizes, dim=1),
            torch.split(values.transpose(0, 1), sizes, dim=1),
            strict=True,
        )
        attended = torch.cat([self._attend(segment, q, k, v) for segment, q, k, v in each], dim=2)
        return self._output(attended.permute(2, 0, 1, 3).reshape(rows, -1))

    def _attend(self, segment: Segment, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One session's attention: q [kv_heads, groups, tokens, head_dim], k and v [kv_heads, tokens, head_dim]."""
        keys, values = segment.cache.append(self._index, segment.position, k, v)
        # The query heads that share a key-value head become rows of one product: nothing is repeated in memory.
        rows = q.reshape(1, self._kv_heads, self._groups * segment.tokens, self._head_dim)
        return fn.scaled_dot_product_attention(rows, keys, values, attn_mask=segment.mask).view(q.shape)


def causal_mask(position: int, tokens: int, groups: int, device: torch.device) -> torch.Tensor | None:
    """The mask of a :class:`Segment`; None for a single token, which sees all before it."""
    if tokens == 1:
        return None
    columns = torch.arange(position + tokens, device=device)
    rows = torch.arange(position, position + tokens, device=device)
    return (columns <= rows[:, None]).repeat(groups, 1)
