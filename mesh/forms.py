"""Forms of a model's weights: which runtime computes with them, and how they are quantized. Pure."""

from __future__ import annotations

from mesh.errors import InputError

QUANTIZATIONS = {"onnx": ("int8", "fp32"), "litert": ("int4", "int8", "fp32"), "onnxstd": ("int8", "fp32")}
"""By runtime; the first is its default. ``onnxstd`` is ONNX of standard operators, for execution providers that lack those
which ``onnx`` uses."""
STATIC = ("litert", "onnxstd")
"""Runtimes whose shards are made for contexts of a certain length."""
DEFAULT_RUNTIME = "onnx"


def form_of(runtime: str, quantization: str = "") -> tuple[str, str]:
    """Runtime and quantization, defaults filled in; raises ``InputError`` for what no shard is made of."""
    runtime = runtime or DEFAULT_RUNTIME
    if runtime not in QUANTIZATIONS:
        raise InputError(f"runtime {runtime!r} is unknown; known are {', '.join(QUANTIZATIONS)}")
    known = QUANTIZATIONS[runtime]
    if quantization and quantization not in known:
        raise InputError(
            f"quantization {quantization!r} is unknown for {runtime}; known are {', '.join(known)}"
        )
    return runtime, quantization or known[0]


def parse_form(text: str) -> tuple[str, str]:
    """``int8``, ``litert`` or ``litert-int4`` as ``form_of`` gives it; the empty text is the default."""
    first, _, rest = text.partition("-")
    if rest or first in QUANTIZATIONS:
        return form_of(first, rest)
    return form_of("", first)
