"""Sessions of ONNX Runtime: a graph on the first execution provider that takes it.

On the processor itself the library lays weights out anew whenever it opens a graph, into memory of its own. Where that was kept, the
kept file is mapped in its place: the library still lays them out, sees that they are the same and gives its own up again. So a load
takes fresh memory for one matrix at a time, and what a shard weighs is memory that the kernel may drop and read again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import onnxruntime as ort

from mesh.errors import ConfigError, InputError
from node_agent.adapters.form_times import this_machine
from node_agent.adapters.packed_weights import forget, made_anew, packed_path
from node_agent.ports import RuntimeOptions

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
_QUIET = 3
_FATAL = 4
_GRAPH, _WEIGHTS = "graph.onnx", "weights.bin"
_INLINE_BYTES = 1024
"""What is smaller stays in the graph."""
_SPARE_BYTES = 1 << 30
"""Of disk, that are left free."""


def open_session(graph: Path, options: RuntimeOptions, digest: str = "") -> tuple[ort.InferenceSession, str]:
    """A graph on the first execution provider that takes it, and that one's name, with what kept the others from it. ``digest``: of the
    shard, whose weights are then kept as they were laid out, if there is a cache. Raises ``ConfigError``."""
    installed = ort.get_available_providers()
    reasons = []
    for provider in options.providers:
        if provider not in installed:
            reasons.append(f"{provider} is not in this build of ONNX Runtime")
            continue
        try:
            if provider == CPU:
                session = (
                    _kept(graph, options, digest) if digest and options.cache else _plain(graph, options)
                )
            else:
                session = _opened(graph, _settings(options), provider, CPU)
        except Exception as error:  # the library raises many kinds, none of them documented
            reasons.append(f"{provider}: {error}")
            continue
        if session.get_providers()[0] == provider:
            return session, provider + (f" (not {'; '.join(reasons)})" if reasons else "")
        reasons.append(f"{provider} did not load")
    raise ConfigError(
        f"no execution provider of {', '.join(options.providers)} can run {graph}: {'; '.join(reasons)}; "
        f"installed are {', '.join(installed)}"
    )


def _settings(options: RuntimeOptions) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.log_severity_level = _QUIET
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.enable_mem_pattern = False
    # Idle thread pools spin by default: two shards on one machine would then fight for cores.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # Else matrices are packed one after the other: a third of what a session takes to open.
    settings.add_session_config_entry("session.prepack.enable_parallel", "1")
    return settings


def _opened(graph: Path, settings: ort.SessionOptions, *providers: str) -> ort.InferenceSession:
    return ort.InferenceSession(str(graph), settings, providers=[*providers])


def _plain(graph: Path, options: RuntimeOptions) -> ort.InferenceSession:
    return _opened(graph, _settings(options), CPU)


def _kept(graph: Path, options: RuntimeOptions, digest: str) -> ort.InferenceSession:
    """From what was kept, else plainly, and kept for the next time."""
    # Another version or processor may want weights otherwise: what was kept would be no use, and stay.
    here = hashlib.sha256(this_machine().encode()).hexdigest()[:8]
    folder = packed_path(options.cache, digest, f"onnx-{here}")
    if folder.exists():
        settings = _settings(options)
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was, before
        settings.log_severity_level = _FATAL  # what is wrong with it is told below
        try:
            return _opened(folder / _GRAPH, settings, CPU)
        except Exception as error:  # as above
            log.warning("%s cannot be used and is made anew: %s", folder, error)
    forget(options.cache, digest)
    try:
        return _keep(graph, options, folder)
    except Exception as error:  # a full disk, for one: the library has words of its own for it
        log.warning("%s is not kept, the next load of %s takes longer: %s", folder, graph, error)
        return _plain(graph, options)


def _keep(graph: Path, options: RuntimeOptions, folder: Path) -> ort.InferenceSession:
    """Open it, and leave what was laid out in the folder. Raises ``InputError``, and what the library raises."""
    with made_anew(folder) as fresh:
        fresh.mkdir()
        # The weights as they came and as they were laid out, which is a little more.
        weights = sum(file.stat().st_size for file in graph.parent.iterdir())
        if shutil.disk_usage(fresh).free < 3 * weights + _SPARE_BYTES:
            raise InputError(f"the disk has less than {_SPARE_BYTES >> 20} MiB to spare")
        settings = _settings(options)
        settings.optimized_model_filepath = str(fresh / _GRAPH)
        for entry, value in (
            ("session.save_external_prepacked_constant_initializers", "1"),
            ("session.optimized_model_external_initializers_file_name", _WEIGHTS),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(_INLINE_BYTES)),
        ):
            settings.add_session_config_entry(entry, value)
        return _opened(graph, settings, CPU)
