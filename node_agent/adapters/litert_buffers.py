"""Memory of ours as LiteRT tensors, without a copy.

The package's own ``TensorBuffer.create_from_host_memory`` knows one-dimensional tensors only. Its library has a versioned C
interface that takes any shape (``LiteRtCreateTensorBufferFromHostMemory``, ``litert_tensor_buffer.h``), and its Python
classes take whatever stands in a capsule of the right name.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ai_edge_litert
from ai_edge_litert.tensor_buffer import TensorBuffer

from mesh.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FLOAT32 = 1
_RANK_MAX = 8
_CAPSULE = b"LiteRtTensorBuffer"


class _TensorType(ctypes.Structure):
    """``LiteRtRankedTensorType``: the strides are read only where a bit beside the rank says so."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        ("dimensions", ctypes.c_int32 * _RANK_MAX),
        ("strides", ctypes.c_uint32 * _RANK_MAX),
    )


@cache
def _library() -> Any:
    path = Path(ai_edge_litert.__file__).parent / "libLiteRt.so"
    try:
        library = ctypes.CDLL(str(path))
        library.LiteRtCreateTensorBufferFromHostMemory.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"this build of ai-edge-litert cannot take memory of ours ({error}); install ai-edge-litert 2.3"
        ) from None
    return library


def bound(array: NDArray[np.float32]) -> TensorBuffer:
    """``array`` as a tensor buffer, which must not outlive it and wants to be destroyed; contiguous and aligned, as
    ``pages`` makes it."""
    kind = _TensorType(element=_FLOAT32, rank=array.ndim)
    for i, size in enumerate(array.shape):
        kind.dimensions[i] = size
    made = ctypes.c_void_p()
    status = _library().LiteRtCreateTensorBufferFromHostMemory(
        ctypes.byref(kind),
        ctypes.c_void_p(array.ctypes.data),
        ctypes.c_size_t(array.nbytes),
        None,
        ctypes.byref(made),
    )
    if status:
        raise ConfigError(f"LiteRT does not take a tensor of the shape {array.shape} (status {status})")
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return TensorBuffer(capsule(made, _CAPSULE, None))
