"""Forms of a model's weights: which runtime computes with them, and how they are quantized. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.errors import InputError

QUANTIZATIONS = {"onnx": ("int8", "fp32"), "litert": ("int4", "int8", "fp32"), "onnxstd": ("int8", "fp32")}
"""By runtime; the first is its default. ``onnxstd`` is ONNX of standard operators, for execution providers that lack those
which ``onnx`` uses."""
AUTO = "auto"
"""In place of a form: what the machine is measured to compute fastest."""
_EQUALS = ("onnx", "litert")
"""What ``AUTO`` chooses among: ``onnxstd`` is for execution providers that take nothing else."""
STATIC = ("litert", "onnxstd")
"""Runtimes whose shards are made for contexts of a certain length."""
DEFAULT_RUNTIME = "onnx"


_CLEARLY = 0.75
"""Of the usual form's time: less than this, and another one is taken in its place. Hops eat the rest."""


def fastest(token_us: Mapping[str, float], usual: str = DEFAULT_RUNTIME) -> str:
    """The runtime to take by what a token takes with each: the ``usual``, unless another one is clearly faster. What is measured
    twice is never quite the same, and a fleet should not be of two minds for nothing."""
    best = min(token_us, key=lambda r: token_us[r], default=usual)
    if usual not in token_us:
        return best
    return best if token_us[best] < _CLEARLY * token_us[usual] else usual


def choices(runtime: str = AUTO, quantization: str = "") -> dict[str, str]:
    """Quantizations by runtime, of the forms to choose among where ``AUTO`` stands for the runtime: the usual one first, and only
    the first that has it where a quantization is named. Defaults hold perplexity within 1 % of float32, so one may stand for
    another. Raises ``InputError``."""
    if runtime != AUTO:
        return dict([form_of(runtime, quantization)])
    if not quantization:
        return {r: QUANTIZATIONS[r][0] for r in _EQUALS}
    found = next((r for r in _EQUALS if quantization in QUANTIZATIONS[r]), DEFAULT_RUNTIME)
    return dict([form_of(found, quantization)])


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
