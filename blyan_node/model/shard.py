"""A shard: a contiguous range of a model's units, loaded on one device, that runs batches of work.

Rows of all works of a batch are concatenated, so weights are read once per step however many sessions take part.
Nothing here waits or locks: ``step`` runs on a worker thread, one call at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as fn

from blyan_node.errors import ConfigError, RuleError
from blyan_node.model.activation import DTYPES, Activation, copy_into, from_tensor
from blyan_node.model.cache import Cache, Pool
from blyan_node.model.importing import read_units
from blyan_node.model.integrity import check_resident, resident_digest
from blyan_node.model.kv_memory import PAGE
from blyan_node.model.layers import DecoderLayer, RmsNorm, RotaryEmbedding, Segment, causal_mask
from blyan_node.model.linear import Linear
from blyan_node.model.precision import SETTINGS, precision_of
from blyan_node.model.quantize import Quantized
from blyan_node.model.sampler import SamplingParams, check_sampling, sample
from blyan_node.model.spec import ModelSpec
from blyan_node.model.weights import bring


@dataclass(frozen=True)
class Work:
    """Consecutive tokens of one session for one step.

    ``position`` is that of the first one, and must be the length of the cache. A shard with ``embed`` takes
    ``tokens``, any other an ``activation`` that :meth:`Activation.check` has passed. ``sampling`` asks a shard with
    ``head`` for the next token; without it (a chunk of a prompt that is not the last) nothing comes back.
    ``last_only`` makes a shard without ``head`` return the last row only, which is all that a following shard of
    nothing but ``head`` needs.
    """

    cache: Cache
    position: int
    tokens: tuple[int, ...] | None = None
    activation: Activation | None = None
    sampling: SamplingParams | None = None
    last_only: bool = False

    @property
    def size(self) -> int:
        """Number of tokens."""
        if self.tokens is not None:
            return len(self.tokens)
        return self.activation.shape[0] if self.activation is not None else 0


@dataclass(frozen=True)
class Token:
    """A sampled token, which takes the position after its work's last."""

    id: int


Result = Activation | Token | None


def configure(threads: int) -> None:
    """Set the number of threads that torch computes with, in the whole process."""
    torch.set_num_threads(threads)


class Shard:
    """Units ``first`` to ``last`` (inclusive indexes into ``spec.units``) of a model; made by :meth:`load`."""

    def __init__(
        self,
        spec: ModelSpec,
        first: int,
        last: int,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        *,
        dtype: str = "float32",
        device: str = "cpu",
        cache_tokens: int,
        slab: bool | None = None,
    ) -> None:
        units = spec.units[first : last + 1]
        self.spec, self.first, self.last = spec, first, last
        self.precision = precision_of(dtype, device)
        self.dtype = self.precision.compute
        """Of activations and caches: "float32" or "bfloat16"."""
        self.device = torch.device(device)
        self._torch_dtype = DTYPES[self.dtype]
        self._seals: dict[str, bytes] = {}  # by unit, hashes of what was loaded
        self._sessions: set[bytes] = set()
        ends = dict.fromkeys(blob for unit in units for blob in spec.blobs_for(unit) if not blob.startswith("layer."))
        weights = {unit: bring(tensors[unit], self.precision, device) for unit in ends}
        self._embedding = weights["embed"].matrices["embed_tokens.weight"] if first == 0 else None
        layers = [unit for unit in units if unit.startswith("layer.")]
        # One by one: what packing or stacking has copied is let go before the next comes.
        self._layers = [
            DecoderLayer(spec, index, bring(tensors[unit], self.precision, device)) for index, unit in enumerate(layers)
        ]
        self._rotary = RotaryEmbedding(spec, self._torch_dtype, self.device)
        self._pool = Pool(
            cache_tokens,
            layers=len(layers),
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=self._torch_dtype,
            device=self.device,
            slab=self.device.type != "cpu" if slab is None else slab,
        )
        self._norm: RmsNorm | None = None
        if units[-1] == "head":
            self._norm = RmsNorm(weights["head"].vectors["norm.weight"], spec.norm_eps)
            projection = weights["embed" if spec.tied_head else "head"].matrices
            self._projection = Linear([projection["embed_tokens.weight" if spec.tied_head else "lm_head.weight"]])

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        first: int,
        last: int,
        blobs: Mapping[str, Path],
        *,
        dtype: str = "float32",
        device: str = "cpu",
        cache_tokens: int = 1 << 16,
        slab: bool | None = None,
    ) -> Shard:
        """Map the blobs of a range of units and check every tensor against the spec.

        ``blobs`` maps unit names to safetensors files, for every unit of the range and what ``spec.blobs_for`` adds.
        ``dtype`` is one of ``precision.SETTINGS``. ``cache_tokens`` is how many tokens the caches of all sessions may
        hold together, ``slab`` whether in one tensor (see ``kv_memory``; unless told, on all devices but the CPU).
        Raises CheckpointError for a blob that does not fit the spec, ConfigError for a range, dtype or device that
        cannot be.
        """
        if not 0 <= first <= last < len(spec.units):
            raise ConfigError(f"units {first}..{last} are no range of this model's 0..{len(spec.units) - 1}")
        if dtype not in SETTINGS:
            raise ConfigError(f"dtype {dtype!r} cannot be computed with; these can: {', '.join(SETTINGS)}")
        wanted = dict.fromkeys(blob for unit in spec.units[first : last + 1] for blob in spec.blobs_for(unit))
        tensors = read_units(spec, wanted, blobs)
        shard = cls(spec, first, last, tensors, dtype=dtype, device=device, cache_tokens=cache_tokens, slab=slab)
        shard._seals = {unit: resident_digest(shard._parts(unit)) for unit in shard.units}
        return shard

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units that are loaded."""
        return self.spec.units[self.first : self.last + 1]

    def verify(self, *units: str) -> None:
        """Hash the weights of these units, or all, as they lie in memory now.

        Raises IntegrityError, naming the unit, where they are not what was loaded.
        """
        for unit in units or self.units:
            check_resident(unit, self._parts(unit), self._seals[unit])

    def _parts(self, unit: str) -> object:
        """All that a unit computes with."""
        if unit == "embed":
            return self._embedding
        if unit == "head":
            return self._norm, self._projection
        return self._layers[self.units.index(unit) - (self.first == 0)], self._rotary

    def open(
        self,
        session: bytes,
        capacity: int,
        first: int | None = None,
        last: int | None = None,
        *,
        promised: int | None = None,
    ) -> Cache:
        """Make a cache for a session of at most ``capacity`` tokens; closing it gives all back.

        Room for ``promised`` tokens, for all of ``capacity`` unless told otherwise, is set aside; beyond them the
        cache grows while there is room. ``first`` and ``last`` narrow the units that the session runs here, all of the
        shard's otherwise. Raises RuleError where the session is open already, exceeds the model's context or names
        units that are not here, Overloaded where the other sessions leave too little.
        """
        first, last = self.first if first is None else first, self.last if last is None else last
        if not self.first <= first <= last <= self.last:
            raise RuleError(f"units {first}..{last}, where this shard holds {self.first}..{self.last}")
        if session in self._sessions:
            raise RuleError(f"session {session.hex()[:16]} is open already")
        if not 0 < capacity <= self.spec.context_length:
            raise RuleError(f"a session of {capacity} tokens, where the model's context is {self.spec.context_length}")
        units = self.spec.units
        cache = Cache(
            self._pool,
            first=first,
            last=last,
            skipped=_count_layers(units[self.first : first]),
            layers=_count_layers(units[first : last + 1]),
            capacity=capacity,
            promised=capacity if promised is None else min(promised, capacity),
            on_close=lambda: self._sessions.discard(session),
        )
        self._sessions.add(session)
        return cache

    def free_tokens(self) -> int:
        """How many more tokens sessions may be promised."""
        return self._pool.free * PAGE

    def truncate(self, cache: Cache, position: int) -> None:
        """Forget the tokens from ``position`` on; raise RuleError where the cache does not reach so far."""
        if not 0 <= position <= cache.length:
            raise RuleError(f"cannot truncate to {position}: the cache holds {cache.length} tokens")
        cache.truncate(position)

    def check(self, work: Work) -> None:
        """Raise RuleError (RequestError for the sampling) unless ``step`` can run this work now."""
        cache, size = work.cache, work.size
        if cache.closed:
            raise RuleError("the session is closed")
        if (work.tokens is None) == (work.activation is None) or (work.tokens is None) == (cache.first == 0):
            raise RuleError("tokens belong to the stage that holds 'embed', activations to all others")
        if size == 0:
            raise RuleError("a work of no tokens")
        # A shard of embed or head alone remembers nothing, and last_only skips positions before a head.
        if cache.layers and work.position != cache.length:
            raise RuleError(f"work at position {work.position}, where the cache holds {cache.length} tokens")
        if work.position < 0 or work.position + size > cache.capacity:
            raise RuleError(f"tokens up to {work.position + size} exceed the session's capacity of {cache.capacity}")
        if work.tokens is not None and not all(0 <= token < self.spec.vocab_size for token in work.tokens):
            raise RuleError(f"token ids beyond the model's vocabulary of {self.spec.vocab_size}")
        if work.activation is not None and work.activation.shape[1] != self.spec.hidden_size:
            raise RuleError(f"activation of width {work.activation.shape[1]}, not {self.spec.hidden_size}")
        if work.sampling is not None:
            check_sampling(work.sampling)

    def step(self, works: Sequence[Work]) -> list[Result]:
        """Run one batch, at most one work per session, all over the same units; results are in the order of the works.

        Units that end with ``head`` give a Token where sampling was asked for and None elsewhere, others an Activation.
        Raises what :meth:`check` does, and Overloaded where a cache cannot grow, before anything is computed.
        """
        with torch.inference_mode():
            rows = self._run(works)
            ends = torch.tensor([work.size for work in works]).cumsum(0).tolist()
            if works[0].cache.last == len(self.spec.units) - 1:
                return self._sample(rows, works, ends)
            return [
                from_tensor(rows[end - (1 if work.last_only else work.size) : end])
                for work, end in zip(works, ends, strict=True)
            ]

    def logits(self, works: Sequence[Work]) -> list[torch.Tensor]:
        """Run one batch and return the logits [tokens, vocab] of all its positions; for shards with ``head``."""
        with torch.inference_mode():
            rows = self._project(self._run(works))
            return list(torch.split(rows, [work.size for work in works]))

    def _run(self, works: Sequence[Work]) -> torch.Tensor:
        """Check the works, run the layers, and only then count the tokens in the caches."""
        if len({id(work.cache) for work in works}) != len(works) or not works:
            raise RuleError("a batch has at least one work, and at most one per session")
        cache = works[0].cache
        if any((work.cache.first, work.cache.last) != (cache.first, cache.last) for work in works):
            raise RuleError("a batch runs over the same units for all its sessions")
        for work in works:
            self.check(work)
        for work in works:
            work.cache.reserve(work.position + work.size)
        x = self._input(works)
        if cache.layers:
            groups = self.spec.heads // self.spec.kv_heads
            segments = [
                Segment(
                    work.cache, work.position, work.size, causal_mask(work.position, work.size, groups, self.device)
                )
                for work in works
            ]
            positions = [work.position + offset for work in works for offset in range(work.size)]
            rotation = self._rotary(torch.tensor(positions, dtype=torch.float32, device=self.device))
            for layer in self._layers[cache.skipped : cache.skipped + cache.layers]:
                x = layer(x, rotation, segments)
        for work in works:
            work.cache.length = work.position + work.size
        return x

    def _input(self, works: Sequence[Work]) -> torch.Tensor:
        if self._embedding is not None and works[0].cache.first == 0:
            ids = [token for work in works for token in work.tokens or ()]
            indexes = torch.tensor(ids, device=self.device)
            if isinstance(self._embedding, Quantized):
                return self._embedding.rows(indexes, self._torch_dtype)
            return fn.embedding(indexes, self._embedding)
        rows = sum(work.size for work in works)
        x = torch.empty((rows, self.spec.hidden_size), dtype=self._torch_dtype, device=self.device)
        start = 0
        for work in works:
            if work.activation is not None:
                copy_into(x[start : start + work.size], work.activation)
                start += work.size
        return x

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        if self._norm is None:
            raise RuleError("this shard does not hold 'head'")
        return self._projection(self._norm(rows))

    def _sample(self, rows: torch.Tensor, works: Sequence[Work], ends: list[int]) -> list[Result]:
        asked = [index for index, work in enumerate(works) if work.sampling is not None]
        results: list[Result] = [None] * len(works)
        if not asked:
            return results
        logits = self._project(rows[[ends[index] - 1 for index in asked]])
        for index, row in zip(asked, logits, strict=True):
            work = works[index]
            if work.sampling is not None:
                how = work.sampling
                following = work.position + work.size
                results[index] = Token(sample(row, how.temperature, how.top_p, how.seed, following))
        return results


def _count_layers(units: Sequence[str]) -> int:
    return sum(unit.startswith("layer.") for unit in units)
