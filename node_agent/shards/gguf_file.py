"""GGUF: metadata and tensor directory of a model file, from a buffer.

Our own reader and not the ``gguf`` package's: that one takes seconds to list a vocabulary (one
numpy view per string) and loops for hours on a file whose counts lie. This one checks every
count against the bytes that are left before it believes it. Turning quantized blocks into floats
stays with the package (``gguf.quants``).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3,
little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.errors import ModelFileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_NUMPY = {code: np.dtype(form) for code, form in _SCALARS.items()}
_NESTING_MAX = 4
_ALIGNMENT_DEFAULT = 32
_DIMENSIONS_MAX = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file.

    ``shape`` is outermost first (a weight is ``[out, in]``), ``offset`` counts from the start of
    the file, ``kind`` is GGML's type number and ``kind_name`` its name.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    kind_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata by key and tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """Reads forward through a buffer and never past its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise ModelFileError(
                f"the GGUF file is cut short or damaged: {what} at byte {self.at} needs {count} bytes, "
                f"{len(self.data) - self.at} are left; download it again"
            )
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def scalar(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        length = self.scalar("<Q", f"length of {what}")
        # Vocabularies may hold broken UTF-8 in single tokens; surrogates keep the bytes.
        return bytes(self.take(length, what)).decode("utf-8", "surrogateescape")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY or depth >= _NESTING_MAX:
            raise ModelFileError(f"the GGUF file is damaged: {what} has the unknown type {kind}")
        item, count = self.scalar("<I", f"type of {what}"), self.scalar("<Q", f"length of {what}")
        if item in _SCALARS:
            raw = self.take(count * _NUMPY[item].itemsize, what)
            return np.frombuffer(raw, dtype=_NUMPY[item]).tolist()
        smallest = 8 if item == _STRING else 12
        if count * smallest > len(self.data) - self.at:
            raise ModelFileError(
                f"the GGUF file is cut short or damaged: {what} claims {count} items, "
                f"{len(self.data) - self.at} bytes are left"
            )
        return [self.value(item, what, depth + 1) for _ in range(count)]


def parse_gguf(data: memoryview) -> GgufFile:
    """Read metadata and tensor directory; raises ``ModelFileError`` on anything that is not whole."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    if len(data) < 4 or bytes(data[:4]) != b"GGUF":
        raise ModelFileError("this is not a GGUF file: it does not begin with the letters GGUF")
    cursor.at = 4
    version = cursor.scalar("<I", "version")
    if version not in (2, 3):
        raise ModelFileError(
            f"GGUF version {version} is not supported (2 and 3, little-endian, are); convert the file again"
        )
    tensor_count = cursor.scalar("<Q", "tensor count")
    field_count = cursor.scalar("<Q", "field count")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string("name of a field")
        metadata[key] = cursor.value(cursor.scalar("<I", f"type of {key}"), key)
    directory: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name = cursor.string("name of a tensor")
        rank = cursor.scalar("<I", f"rank of {name}")
        if rank > _DIMENSIONS_MAX:
            raise ModelFileError(f"the GGUF file is damaged: tensor {name} has {rank} dimensions")
        shape = tuple(reversed([cursor.scalar("<Q", f"shape of {name}") for _ in range(rank)]))
        kind = cursor.scalar("<I", f"type of {name}")
        directory.append((name, shape, kind, cursor.scalar("<Q", f"offset of {name}")))
    alignment = metadata.get("general.alignment", _ALIGNMENT_DEFAULT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelFileError(f"the GGUF file is damaged: general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in directory:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelFileError(f"tensor {name} has the unknown type {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        elements = 1
        for dimension in shape:
            elements *= dimension
        if elements == 0 or (shape and shape[-1] % block):
            raise ModelFileError(f"the GGUF file is damaged: tensor {name} has the shape {list(shape)}")
        nbytes = elements // block * block_bytes
        if base + offset + nbytes > len(data):
            raise ModelFileError(
                f"the GGUF file is cut short: tensor {name} ends at byte {base + offset + nbytes}, "
                f"the file has {len(data)}; download it again"
            )
        tensors[name] = TensorInfo(name, shape, kind, quantization.name, base + offset, nbytes)
    return GgufFile(metadata, tensors)


def dequantize(data: memoryview, tensor: TensorInfo) -> NDArray[np.float32]:
    """A tensor's values as float32 ``tensor.shape``; raises ``ModelFileError`` for types unknown to ``gguf``."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_blocks

    raw = np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], dtype=np.uint8)
    kind = GGMLQuantizationType(tensor.kind)
    rows = raw.reshape(*tensor.shape[:-1], -1) if len(tensor.shape) > 1 else raw
    if kind == GGMLQuantizationType.F32:
        return np.ascontiguousarray(rows.view(np.float32)).reshape(tensor.shape)
    if kind == GGMLQuantizationType.F16:
        return rows.view(np.float16).astype(np.float32).reshape(tensor.shape)
    try:
        values = dequantize_blocks(rows, kind)
    except NotImplementedError:
        raise ModelFileError(
            f"tensor {tensor.name} is {tensor.kind_name}, which cannot be read yet; "
            "use a file in F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant"
        ) from None
    return np.asarray(values, dtype=np.float32).reshape(tensor.shape)
