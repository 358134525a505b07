"""Reading checkpoints: a GGUF file, or a Hugging Face directory with safetensors, in shards or not.

Nothing is unpickled. Every tensor is checked against the spec (presence, shape, dtype, finite numbers) before it is
handed out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from blyan_node.errors import CheckpointError, ConfigError, StoreError
from blyan_node.model import checkpoint_spec
from blyan_node.model.checkpoint_tokenizer import tokenizer_from_gguf, tokenizer_from_hf
from blyan_node.model.gguf_file import GgufFile
from blyan_node.model.spec import FAMILIES, ModelSpec

MAX_TEXT_FILE = 64 << 20  # bytes of one file beside the weights

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model file, open for import: its spec, its tokenizer blob and, unit by unit, its weights."""

    spec: ModelSpec
    tokenizer: bytes
    _read: Callable[[str, str], torch.Tensor]

    def unit(self, unit: str, store_dtype: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of one unit, named and shaped as ``spec.unit_tensors`` says.

        They keep the checkpoint's dtype (fp32 where a GGUF file was quantised: a smaller one would round what
        dequantisation gives) unless ``store_dtype`` ("float32", "bfloat16", "float16") asks for another. Raises
        CheckpointError where one is missing, of another shape or not finite.
        """
        tensors = {}
        for name, shape in self.spec.unit_tensors(unit).items():
            tensor = self._read(unit, name)
            check_tensor(f"{unit}: {name}", tensor, shape)
            tensors[name] = tensor if store_dtype is None else tensor.to(STORED[store_dtype])
        return tensors


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face directory; raise CheckpointError saying what is wrong with it."""
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return _open_gguf(path)
    raise CheckpointError(f"{path} does not exist: give a GGUF file or a directory with config.json and safetensors")


def check_tensor(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor has this shape, a float dtype of 16 or 32 bits and finite numbers."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{what} has shape {tuple(tensor.shape)}, where the model's is {shape}")
    if tensor.dtype not in STORED.values():
        raise CheckpointError(f"{what} has dtype {tensor.dtype}; {', '.join(STORED)} can be read")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{what} holds infinities or NaN: the file is corrupt, fetch it again")


def write_unit(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one unit as a safetensors file. Equal tensors give equal bytes. Raises StoreError if the disk does."""
    try:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (safetensors.SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be written: {error}") from error


# GGUF


_GGUF_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    spec = checkpoint_spec.from_gguf(file.metadata, shapes)

    def read(unit: str, name: str) -> torch.Tensor:
        if not unit.startswith("layer."):
            return torch.from_numpy(file.tensor(_GGUF_NAMES[name]))
        module, _, kind = name.rpartition(".")
        values = torch.from_numpy(file.tensor(f"blk.{unit.removeprefix('layer.')}.{_GGUF_NAMES[module]}.{kind}"))
        fits = tuple(values.shape) == spec.unit_tensors(unit)[name]  # if not, the caller says so
        if fits and FAMILIES[spec.family].gguf_pairs and module in ("self_attn.q_proj", "self_attn.k_proj"):
            return _halves_from_pairs(values, spec.heads if module == "self_attn.q_proj" else spec.kv_heads)
        return values

    return Checkpoint(spec, tokenizer_from_gguf(file.metadata), read)


def _halves_from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the permutation of llama.cpp's converter (``LlamaModel.permute``): from x0 y0 x1 y1 … to x0 x1 … y0 y1 …."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# Hugging Face


def _open_directory(path: Path) -> Checkpoint:
    config = read_json(path / "config.json")
    spec = checkpoint_spec.from_hf_config(config)
    files = _weight_files(path)

    def read(unit: str, name: str) -> torch.Tensor:
        full = _hf_name(unit, name)
        if full not in files:
            raise CheckpointError(f"{path} has no tensor {full}: the checkpoint is incomplete, fetch it again")
        return read_safetensors(files[full], (full,))[full]

    return Checkpoint(spec, _tokenizer(path, config), read)


def _tokenizer(path: Path, config: dict[str, Any]) -> bytes:
    raw, template = path / "tokenizer.json", path / "chat_template.jinja"
    if not raw.is_file():
        raise CheckpointError(f"{path} has no tokenizer.json; save the checkpoint again with a fast tokenizer")
    settings, generation = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    text = _read_file(template).decode(errors="replace") if template.is_file() else None
    return tokenizer_from_hf(_read_file(raw), settings, text, (generation, config))


def _hf_name(unit: str, name: str) -> str:
    if unit.startswith("layer."):
        return f"model.layers.{unit.removeprefix('layer.')}.{name}"
    return name if name == "lm_head.weight" else f"model.{name}"


def _weight_files(path: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index} names {file!r:.80}, which is not a file beside it")
        return {name: path / file for name, file in weight_map.items()}
    if single.is_file():
        with _open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    raise CheckpointError(f"{path} has no model.safetensors; pickled weights (.bin, .pt) are never loaded")


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}): fetch it again") from error


def read_safetensors(path: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Map tensors of a safetensors file without copying; raise CheckpointError where the file or one is missing."""
    with _open_safetensors(path) as file:
        missing = set(names) - set(file.keys())
        if missing:
            raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}: fetch it again")
        return {name: file.get_tensor(name) for name in names}


def read_units(
    spec: ModelSpec,
    units: Iterable[str],
    blobs: Mapping[str, Path],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, dict[str, torch.Tensor]]:
    """Map the blobs of units and check every tensor against the spec.

    Tensors stay mapped where they already have ``dtype``, or where none is asked for. Raises CheckpointError for a blob
    that does not fit the spec, ConfigError where one was not given.
    """
    tensors = {}
    for unit in units:
        if unit not in blobs:
            raise ConfigError(f"no blob was given for unit {unit}")
        shapes = spec.unit_tensors(unit)
        tensors[unit] = read_safetensors(blobs[unit], tuple(shapes))
        for name, tensor in tensors[unit].items():
            check_tensor(f"{blobs[unit]}: {unit}: {name}", tensor, shapes[name])
            tensors[unit][name] = tensor.to(device=device, dtype=dtype)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size; raise CheckpointError for anything else."""
    try:
        value = json.loads(_read_file(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TEXT_FILE:
            raise CheckpointError(f"{path} is larger than {MAX_TEXT_FILE} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
