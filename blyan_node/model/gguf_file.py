"""A reader of GGUF files that bounds everything before it allocates it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The ``gguf``
package's own reader loops over counts that the file claims, without end on a hostile one, and takes seconds on a large
vocabulary; its dequantisation is used here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from blyan_node.errors import CheckpointError

MAGIC = b"GGUF"
MAX_ENTRIES = 1 << 16  # metadata pairs, and tensors
MAX_ITEMS = 1 << 21  # of one array: vocabularies and merge lists stay far below
MAX_STRING = 1 << 20
MAX_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is outermost first, as torch has it; ``offset`` is from the start of the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


class GgufFile:
    """An open GGUF file: ``metadata`` (scalars, strings, lists) and ``tensors``, both read and checked at once.

    Raises CheckpointError for a file that is cut short, not GGUF or out of bounds.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # mmap of an empty file
            raise CheckpointError(f"{path} is empty") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._at = 0
        self._path = path
        if self._data[:4] != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read")
        tensor_count, pair_count = self._count(MAX_ENTRIES), self._count(MAX_ENTRIES)
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not (isinstance(alignment, int) and 0 < alignment <= 1 << 16):
            raise self._broken(f"alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            self.tensors[name] = self._place(name, shape, kind, start + offset)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantise one tensor to fp32, in torch's shape. Raises CheckpointError where there is none by that name."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._path} has no tensor {name}: it is incomplete, fetch it again")
        raw = np.frombuffer(self._data, np.uint8, info.size, info.offset)
        if info.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = "<f4" if info.kind == gguf.GGMLQuantizationType.F32 else "<f2"
            return raw.view(dtype).astype(np.float32).reshape(info.shape)
        try:
            values: npt.NDArray[np.float32] = gguf.dequantize(raw, info.kind)
        except NotImplementedError as error:
            raise CheckpointError(f"{self._path}: quantisation {info.kind.name} is not supported") from error
        return values.reshape(info.shape)

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            ggml_type = gguf.GGMLQuantizationType(kind)
            block_items, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self._path}: tensor {name} has the unknown type {kind}") from error
        if shape and shape[-1] % block_items:
            raise self._broken(f"the rows of {name} are no whole number of blocks")
        size = math.prod(shape) // block_items * block_bytes
        if offset + size > len(self._data):
            raise self._broken(f"tensor {name} lies beyond the end of the file")
        return TensorInfo(shape, ggml_type, offset, size)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._broken(f"tensor {name!r:.60} of {dimensions} dimensions")
        shape = tuple(int(self._scalar("Q")) for _ in range(dimensions))
        kind = self._scalar("I")
        return name, shape[::-1], kind, self._scalar("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._broken(f"unknown value type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind = self._scalar("I")
        count = self._count(MAX_ITEMS)
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._broken(f"array of the type {kind}")
        layout = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(layout, self._take(struct.calcsize(layout))))

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _count(self, most: int) -> int:
        count: int = self._scalar("Q")
        if count > most:
            raise self._broken(f"it claims {count} entries, where at most {most} are allowed")
        return count

    def _string(self) -> str:
        length: int = self._scalar("Q")
        if length > MAX_STRING:
            raise self._broken(f"a string of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._broken("a string that is not UTF-8") from error

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise self._broken("it ends too early")
        part = self._data[self._at : end]
        self._at = end
        return part

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is cut short or corrupt ({what}): fetch it again")
