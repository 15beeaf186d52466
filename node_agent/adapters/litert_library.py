"""LiteRT's compiled model through the versioned C interface of its library (``litert_compiled_model.h`` and its neighbours).

The package's own Python classes keep the interpreter's lock while they load a model, for seconds, and while they compute: an
agent gave no sign of life meanwhile, and peers took it for frozen. ``ctypes`` lets go of the lock. They also take memory of ours
only where it has one dimension.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mesh.errors import ConfigError, MeshError
from node_agent.adapters.worker_threads import WorkerThreads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FLOAT32 = 1
_RANK_MAX = 8
_CPU = 1
_XNNPACK = b"xnnpack"
"""Whom the CPU's options are for; what they say is TOML."""
_Destructor = ctypes.CFUNCTYPE(None, c_void_p)
_OUT = POINTER(c_void_p)
_TAKES: dict[str, tuple[Any, ...]] = {
    "CreateEnvironment": (c_int, c_void_p, _OUT),
    "CreateModelFromBuffer": (c_void_p, c_void_p, c_size_t, _OUT),
    "DestroyModel": (c_void_p,),
    "CreateOptions": (_OUT,),
    "DestroyOptions": (c_void_p,),
    "SetOptionsHardwareAccelerators": (c_void_p, c_int),
    "CreateOpaqueOptions": (c_char_p, c_void_p, _Destructor, _OUT),
    "AddOpaqueOptions": (c_void_p, c_void_p),
    "CreateCompiledModel": (c_void_p, c_void_p, c_void_p, _OUT),
    "DestroyCompiledModel": (c_void_p,),
    "RunCompiledModel": (c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_void_p),
    "GetNumModelSignatures": (c_void_p, POINTER(c_size_t)),
    "GetModelSignature": (c_void_p, c_size_t, _OUT),
    "GetSignatureKey": (c_void_p, POINTER(c_char_p)),
    "GetNumSignatureInputs": (c_void_p, POINTER(c_size_t)),
    "GetNumSignatureOutputs": (c_void_p, POINTER(c_size_t)),
    "GetSignatureInputName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetSignatureOutputName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "CreateTensorBufferFromHostMemory": (c_void_p, c_void_p, c_size_t, c_void_p, _OUT),
    "DestroyTensorBuffer": (c_void_p,),
}
"""What each function takes; all but those that destroy return a status, 0 where it went well."""


class LibraryError(MeshError):
    """The library refused; what it says, it says on stderr."""


class Signature(NamedTuple):
    """One graph of a model: the number to run it by, and its tensors' names in the order in which they are wanted."""

    number: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _TensorType(ctypes.Structure):
    """``LiteRtRankedTensorType``: the strides are read only where a bit beside the rank says so."""

    _fields_ = (
        ("element", c_int32),
        ("rank", c_uint32),
        ("dimensions", c_int32 * _RANK_MAX),
        ("strides", c_uint32 * _RANK_MAX),
    )


def _nothing(payload: int) -> None:
    """Options' words are ours: nothing is to be freed."""


_KEPT = _Destructor(_nothing)


def library_path() -> Path | None:
    """Where the library is; nothing where the package is not installed."""
    spec = find_spec("ai_edge_litert")
    return Path(spec.origin).parent / "libLiteRt.so" if spec is not None and spec.origin else None


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(str(library_path()))
        for name, takes in _TAKES.items():
            function = getattr(library, f"LiteRt{name}")
            function.argtypes, function.restype = takes, None if name.startswith("Destroy") else c_int
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"this build of ai-edge-litert lacks the C interface ({error}); install ai-edge-litert 2.3"
        ) from None
    return library


def _call(name: str, *given: Any) -> None:
    _check(name, getattr(_library(), f"LiteRt{name}")(*given))


def _check(name: str, status: int) -> None:
    if status:
        raise LibraryError(f"LiteRt{name} failed with status {status}")


def _made(name: str, *given: Any) -> c_void_p:
    made = c_void_p()
    _call(name, *given, byref(made))
    return made


@cache
def _environment() -> c_void_p:
    return _made("CreateEnvironment", 0, None)


class CompiledModel:
    """A model on the CPU."""

    def __init__(self, data: mmap.mmap, threads: int, packed: Path | None) -> None:
        """``data``: the file, mapped so that it could be written. ``packed``: file of packed weights, which is written where it
        is not. Raises ``LibraryError``."""
        self._model, self._compiled, self._data = c_void_p(), c_void_p(), data
        self._workers = WorkerThreads()
        self._run = _library().LiteRtRunCompiledModel  # every step asks for it
        words = f"num_threads = {threads}\n"
        if packed is not None:
            words += f"weight_cache_file_path = {json.dumps(str(packed), ensure_ascii=False)}\n"
        self._words = ctypes.create_string_buffer(words.encode())
        options = _made("CreateOptions")
        try:
            _call("SetOptionsHardwareAccelerators", options, _CPU)
            # Whoever adds them gives them away.
            told = _made("CreateOpaqueOptions", _XNNPACK, ctypes.cast(self._words, c_void_p), _KEPT)
            _call("AddOpaqueOptions", options, told)
            start = ctypes.addressof(ctypes.c_char.from_buffer(data))
            self._model = _made("CreateModelFromBuffer", _environment(), start, len(data))
            with self._workers.started():
                self._compiled = _made("CreateCompiledModel", _environment(), self._model, options)
            self.signatures = _signatures(self._model)
        except LibraryError:
            self.close()
            raise
        finally:
            _library().LiteRtDestroyOptions(options)

    def run(self, number: int, inputs: Any, outputs: Any) -> None:
        """Compute a signature over ``tensor_buffers``. Raises ``LibraryError``."""
        self._workers.make_room()
        status = self._run(self._compiled, number, len(inputs), inputs, len(outputs), outputs)
        _check("RunCompiledModel", status)

    def close(self) -> None:
        """Let go of weights and memory; again is nothing."""
        compiled, model, self._compiled, self._model = self._compiled, self._model, c_void_p(), c_void_p()
        if compiled:
            _library().LiteRtDestroyCompiledModel(compiled)
        if model:
            _library().LiteRtDestroyModel(model)


def _signatures(model: c_void_p) -> dict[str, Signature]:
    count = c_size_t()
    _call("GetNumModelSignatures", model, byref(count))
    found = {}
    for index in range(count.value):
        signature, key = _made("GetModelSignature", model, index), c_char_p()
        _call("GetSignatureKey", signature, byref(key))
        found[_text(key)] = Signature(index, _names(signature, "Input"), _names(signature, "Output"))
    return found


def _names(signature: c_void_p, side: str) -> tuple[str, ...]:
    count, name, names = c_size_t(), c_char_p(), []
    _call(f"GetNumSignature{side}s", signature, byref(count))
    for index in range(count.value):
        _call(f"GetSignature{side}Name", signature, index, byref(name))
        names.append(_text(name))
    return tuple(names)


def _text(word: c_char_p) -> str:
    return (word.value or b"").decode()


def bound(array: NDArray[np.float32]) -> c_void_p:
    """``array`` as a tensor buffer, which must not outlive it and wants to be ``unbound``; contiguous and aligned, as
    ``pages`` makes it."""
    kind = _TensorType(element=_FLOAT32, rank=array.ndim)
    for i, size in enumerate(array.shape):
        kind.dimensions[i] = size
    try:
        return _made("CreateTensorBufferFromHostMemory", byref(kind), array.ctypes.data, array.nbytes, None)
    except LibraryError as error:
        raise ConfigError(f"LiteRT does not take a tensor of the shape {array.shape}: {error}") from None


def tensor_buffers(memories: Sequence[c_void_p]) -> Any:
    """``bound`` memories, as a run takes them."""
    return (c_void_p * len(memories))(*memories)


def unbound(buffer: c_void_p) -> None:
    """Let go of ``bound`` memory."""
    _library().LiteRtDestroyTensorBuffer(buffer)
