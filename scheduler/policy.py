"""What operators ask for: models to serve, and classes of requests. Small TOML, checked, errors with lines.

::

    [models.smollm2-135m]
    replicas = 2
    max_tpot = "30ms"
    availability = 0.999
    allow = ["tier=onboard"]        # its layers run, and its requests go, nowhere else

    [models.smollm2-135m.price]
    "tier=gateway" = "0.2ms"        # a stage there counts so much dearer for each token

    [classes.private]
    allow = ["tier=onboard"]

Labels are written ``key=value``; ``*`` stands for any value. ``node`` and ``region`` are labels of every node.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from mesh.errors import ConfigError, InputError
from mesh.forms import AUTO, QUANTIZATIONS, choices
from scheduler.cluster import Node

POLICY_BYTES_MAX = 64 * 1024
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}=(\*|[A-Za-z0-9._/-]{0,63})")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|min|h)")
_UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6, "min": 60e6, "h": 3600e6}
_HEADER = re.compile(r"\s*\[\s*([^\]]+?)\s*\]\s*(#.*)?")


def knob(default: Any, about: str, check: Callable[[Any], Any]) -> Any:
    """A documented field; ``check`` makes the value of what stands in the file or raises ``ValueError``
    with what it should be."""
    return field(default=default, metadata={"about": about, "check": check})


def _count(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("a share from 0 to below 1, for example 0.999")
    return float(value)


def _money(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError("a number, 0 or more")
    return float(value)


def duration_us(value: Any) -> float:
    """``"30ms"`` in microseconds; raises ``ValueError`` with what it should be."""
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError('a time with its unit, for example "30ms" (us, ms, s, min, h)')
    return float(match[1]) * _UNITS_US[match[2]]


def _labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(
        isinstance(v, str) and _LABEL.fullmatch(v) for v in value
    ):
        raise ValueError('a list of labels, for example ["tier=onboard"]')
    return tuple(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise ValueError('a list of names, for example ["CUDAExecutionProvider"]')
    return tuple(value)


def _choice(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return check


def _label_key(value: Any) -> str:
    if not isinstance(value, str) or (value and not _KEY.fullmatch(value)):
        raise ValueError('the key of a label, for example "zone"')
    return value


def _prices(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise ValueError('a table of labels and times, for example {"tier=gateway" = "0.2ms"}')
    prices = []
    for label, price in value.items():
        if not _LABEL.fullmatch(label):
            raise ValueError(f"labels written key=value ({label!r} is none)")
        prices.append((label, duration_us(price)))
    return tuple(sorted(prices))


@dataclass(frozen=True, slots=True)
class ClassPolicy:
    """Rules of a class of requests; an application names it with the header ``X-Mesh-Class``."""

    allow: tuple[str, ...] = knob((), "Nodes with one of these labels only. Empty: any.", _labels)
    deny: tuple[str, ...] = knob((), "No node with one of these labels.", _labels)
    percentile: str = knob("p50", "Of latency that routes are chosen by: p50 or p99.", _choice("p50", "p99"))
    recovery: str = knob(
        "warm",
        "When a stage is lost. warm: the stage before replays to another replica. hot: another replica computes every frame as well, and takes over at once; a request then costs twice the computing.",
        _choice("warm", "hot"),
    )
    price: tuple[tuple[str, float], ...] = knob(
        (), "Label to time: a stage on such nodes counts so much dearer for each token.", _prices
    )
    money: float = knob(
        0.0,
        "Microseconds a token that one unit of money an hour is worth (nodes say theirs with the label cost).",
        _money,
    )


@dataclass(frozen=True, slots=True)
class ModelPolicy(ClassPolicy):
    """What is wanted of a model's placement; its rules hold for every request to it as well."""

    runtime: str = knob(
        AUTO,
        "onnx, litert or onnxstd; auto is what the nodes that may host measured to be fastest, onnx where one of them did not measure.",
        _choice(AUTO, *QUANTIZATIONS),
    )
    quantization: str = knob(
        "", "int4 (litert), int8 or fp32. Empty: the runtime's default.", _choice("int4", "int8", "fp32")
    )
    replicas: int = knob(1, "Nodes that hold each layer, at least.", _count(1, 64))
    availability: float = knob(
        0.0, "Share of time that a whole route is up; more replicas are placed until it is.", _share
    )
    max_tpot: float = knob(0.0, "Time per output token that the plan may take. Empty: any.", duration_us)
    sessions: int = knob(4, "Sessions at once for which each replica reserves KV memory.", _count(1, 1024))
    context: int = knob(2048, "Positions of a session, within the model's limit.", _count(16, 1 << 20))
    ingress: tuple[str, ...] = knob((), "Where requests come in. Empty: at any node.", _labels)
    spread: str = knob(
        "", "Key of a label: replicas of a layer stand on different values of it, e.g. zone.", _label_key
    )
    devices: tuple[str, ...] = knob(
        (), "Execution providers or accelerators of which a node must have one.", _texts
    )
    battery_floor: int = knob(
        20, "Percent of charge below which a discharging node hosts nothing.", _count(0, 100)
    )
    mission: float = knob(
        3600e6, "Time that batteries should last; a node that falls short counts as slower.", duration_us
    )
    move: float = knob(100.0, "Time per token that a new plan must win for each layer it moves.", duration_us)


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy file."""

    models: Mapping[str, ModelPolicy] = field(default_factory=dict)
    classes: Mapping[str, ClassPolicy] = field(default_factory=dict)


ANYTHING = ClassPolicy()


def matches(node: Node, label: str) -> bool:
    """Whether a node has a label; ``key=*`` is any value."""
    key, _, value = label.partition("=")
    have = dict(node.capabilities.labels)
    have.setdefault("node", node.name)
    have.setdefault("region", node.region)
    return bool(have.get(key)) if value == "*" else have.get(key) == value


def forbidden(node: Node, rules: ClassPolicy) -> str | None:
    """Why the rules keep a node out; ``None`` if they do not."""
    for label in rules.deny:
        if matches(node, label):
            return f"the policy denies {label}"
    if rules.allow and not any(matches(node, label) for label in rules.allow):
        return f"the policy allows only {', '.join(rules.allow)}"
    return None


def price_us(node: Node, rules: ClassPolicy) -> float:
    """What a stage on a node is made dearer by, microseconds a token."""
    price = sum(us for label, us in rules.price if matches(node, label))
    if rules.money:
        cost = dict(node.capabilities.labels).get("cost", "0")
        try:
            units = float(cost)
        except ValueError:
            units = 0.0
        if math.isfinite(units) and units > 0:
            price += rules.money * units
    return price


def parse_policy(text: str, name: str) -> Policy:
    """Raises ``ConfigError`` that points to file and line."""
    if len(text.encode()) > POLICY_BYTES_MAX:
        raise ConfigError(f"{name} has {len(text.encode())} bytes; a policy has at most {POLICY_BYTES_MAX}")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{name} is no TOML: {error}") from None

    def fail(path: Sequence[str], why: str) -> ConfigError:
        line = line_of(text, path)
        return ConfigError(f"{name}{f', line {line}' if line else ''}: {why}")

    sections: dict[str, dict[str, Any]] = {"models": {}, "classes": {}}
    kinds: dict[str, type[ClassPolicy]] = {"models": ModelPolicy, "classes": ClassPolicy}
    for section, entries in document.items():
        if section not in kinds:
            raise fail([section], f"there is no section {section!r}; there are models and classes")
        if not isinstance(entries, dict):
            raise fail([section], f"{section} must be tables, as [{section}.NAME]")
        for key, values in entries.items():
            if not _NAME.fullmatch(key) or not isinstance(values, dict):
                raise fail([section, key], f"{section} must be tables, as [{section}.NAME], not {key!r}")
            sections[section][key] = _entry(kinds[section], values, [section, key], fail)
    if not sections["models"] and not sections["classes"]:
        raise ConfigError(f"{name} is empty: it asks for no model and defines no class; write [models.NAME]")
    return Policy(sections["models"], sections["classes"])


def model_policy(values: Mapping[str, Any], where: str = "the request") -> ModelPolicy:
    """A model's entry by itself; raises ``ConfigError``."""
    return _entry(ModelPolicy, values, [], lambda path, why: ConfigError(f"{where}: {why}"))  # type: ignore[return-value]


def _entry(
    kind: type[ClassPolicy],
    values: Mapping[str, Any],
    path: list[str],
    fail: Callable[[Sequence[str], str], ConfigError],
) -> ClassPolicy:
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise fail([*path, name], f"there is no {name!r}; there are {', '.join(sorted(known))}")
        try:
            checked[name] = known[name].metadata["check"](value)
        except ValueError as error:
            raise fail([*path, name], f"{name} is {value!r}; it must be {error}") from None
    made = kind(**checked)
    if isinstance(made, ModelPolicy):
        try:
            choices(made.runtime, made.quantization)
        except InputError as error:
            raise fail([*path, "quantization"], str(error)) from None
    both_ways = [label for label in made.allow if label in made.deny]
    if both_ways:
        raise fail([*path, "deny"], f"{both_ways[0]} is both allowed and denied")
    return made


def line_of(text: str, path: Sequence[str]) -> int:
    """Line of a key in TOML of the common form (tables with headers, a key a line); 0 if not found."""
    table: list[str] = []
    fallback = 0
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.fullmatch(line)
        if header:
            table = [p.strip().strip("\"'") for p in header[1].split(".")]
            found = table
        else:
            key = line.partition("=")[0].strip()
            found = [*table, *(p.strip().strip("\"'") for p in key.split("."))] if key else []
        if found == list(path):
            return number
        if found and list(path[: len(found)]) == found:
            fallback = number
    return fallback


def policy_table(kind: type[ClassPolicy]) -> str:
    """The knobs as a Markdown table, for the README."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    own = {f.name for f in fields(ClassPolicy)} if kind is not ClassPolicy else set()
    for item in fields(kind):
        if item.name in own:
            continue
        default = "" if item.default in (MISSING, (), "", 0.0) else f"`{_shown(item.name, item.default)}`"
        lines.append(f"| `{item.name}` | {default} | {item.metadata['about']} |")
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if name in ("mission", "move", "max_tpot"):
        return written_time(value)
    return f'"{value}"' if isinstance(value, str) else str(value)


def written_time(us: float) -> str:
    """Microseconds as a policy writes them."""
    for unit in ("h", "min", "s", "ms"):
        if us >= _UNITS_US[unit]:
            return f'"{us / _UNITS_US[unit]:g}{unit}"'
    return f'"{us:g}us"'


def policy_text(policy: Policy) -> str:
    """The file that makes this policy, without what is default."""
    lines: list[str] = []
    for section, entries in (("models", policy.models), ("classes", policy.classes)):
        for name, entry in sorted(entries.items()):
            lines.append(f'[{section}."{name}"]' if "." in name else f"[{section}.{name}]")
            defaults = asdict(type(entry)())
            for key, value in asdict(entry).items():
                if value == defaults[key]:
                    continue
                lines.append(f"{key} = {_written(key, value)}")
            lines.append("")
    return "\n".join(lines)


def _written(key: str, value: Any) -> str:
    if key == "price":
        return "{" + ", ".join(f'"{label}" = {written_time(us)}' for label, us in value) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(f'"{v}"' for v in value) + "]"
    return _shown(key, value)
