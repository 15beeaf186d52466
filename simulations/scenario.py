"""Scenarios: small TOML files that say what a mesh is made of, what is asked of it and what happens to it."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec

from mesh.errors import ConfigError
from scheduler.policy import parse_policy
from simulations.traces import Interval

_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s|m|h)")
_CALL = re.compile(r"(\w+)\((.*)\)")
_SHAPES = {"exponential": 1, "uniform": 2, "weibull": 2, "pareto": 2}
_PATH = re.compile(r"(.*) - at `\$(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
LONGEST_NS = 31 * 24 * _NS["h"]


def time_ns(text: str) -> int:
    """``"1.5s"`` in nanoseconds; raises ``ValueError`` with what it should be."""
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise ValueError(f'{text!r} is no time; write for example "30s" (ns, us, ms, s, m, h)')
    return int(float(match[1]) * _NS[match[2]])


@dataclass(frozen=True, slots=True)
class Draw:
    """A time that is drawn: ``10s``, ``uniform(1s, 5s)``, ``exponential(mean)``, ``weibull(shape, scale)``,
    ``pareto(shape, least)``."""

    shape: str
    first: float
    second: float = 0.0

    def ns(self, rng: Random) -> int:
        """One of them, nanoseconds."""
        match self.shape:
            case "exponential":
                drawn = rng.expovariate(1 / self.first)
            case "uniform":
                drawn = rng.uniform(self.first, self.second)
            case "weibull":
                drawn = rng.weibullvariate(self.second, self.first)
            case "pareto":
                drawn = rng.paretovariate(self.first) * self.second
            case _:
                drawn = self.first
        return min(int(drawn), LONGEST_NS)


def draw(text: str) -> Draw:
    """Read one; raises ``ValueError`` with what it should be."""
    call = _CALL.fullmatch(text.strip())
    if not call:
        return Draw("fixed", time_ns(text))
    name, parts = call[1], [p.strip() for p in call[2].split(",")]
    if _SHAPES.get(name) != len(parts):
        raise ValueError(
            f"{text!r} is none of 10s, uniform(1s, 5s), exponential(mean), weibull(shape, scale), pareto(shape, least)"
        )
    if name in ("weibull", "pareto"):
        try:
            shape = float(parts[0])
        except ValueError:
            shape = math.nan
        if not 0 < shape < 100:
            raise ValueError(
                f"the shape of {text!r} is {parts[0]!r}; write a number above 0, for example 0.7"
            )
        return Draw(name, shape, time_ns(parts[1]))
    times = [time_ns(p) for p in parts]
    if times[0] <= 0 and name == "exponential":
        raise ValueError(f"the mean of {text!r} must be above 0")
    if name == "uniform" and times[0] > times[1]:
        raise ValueError(f"{text!r} ends before it begins; write the smaller time first")
    return Draw(name, *times)


Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Span = Annotated[tuple[int, int], msgspec.Meta(description="least and most")]


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model; times are those of ``speed = 1``, microseconds."""

    name: str = "smollm2-135m"
    layers: Count = 30
    vocabulary: Annotated[int, msgspec.Meta(ge=4, le=1 << 20)] = 512
    """Tokens that there are, two of them special; the fewer, the more guesses come true."""
    cuts: tuple[Count, ...] = (10, 20)
    """Where it is cut, unless a policy lets the scheduler decide."""
    layer_us: Positive = 200.0
    head_us: Positive = 1000.0
    row_share: Share = 0.16
    prefill_us: Positive = 37.0
    """A layer, a position."""
    context_us: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    """A layer, for each position before."""
    prefill_context_us: Annotated[float, msgspec.Meta(ge=0)] = 0.004
    """The same, of a position of a prompt."""
    again: Positive = 0.65
    """Share of its time that a step takes right after another one: its weights are in the cache still."""
    load: str = "300ms"
    """Until a shard is ready to compute."""


class NodeKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Some nodes of a kind. They are up for ``up`` and down for ``down``, if those are given."""

    kind: str
    count: Count = 1
    hosts: bool = True
    """Whether they hold layers; ranges are dealt out in turn, or by the scheduler."""
    ingress: bool = True
    scheduler: bool = True
    """Whether they may place models for all."""
    speed: Positive = 1.0
    slots: Count = 16
    memory_mib: Count = 2048
    labels: tuple[str, ...] = ()
    up: str = ""
    down: str = "exponential(30s)"
    silent: Share = 0.2
    """Of their ends: power lost, so that nobody resets their connections."""
    wiped: Share = 0.0
    """Of their ends: the disk is lost as well."""
    battery_wh: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """0: fed by a cable."""
    idle_w: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    busy_w: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    land_at: Annotated[int, msgspec.Meta(ge=0, le=100)] = 15
    """Percent of charge at which it hands its sessions over and leaves to be charged."""
    charging: str = "uniform(5m, 10m)"
    out_of_range: str = ""
    """How often it flies out of radio range."""
    away: str = "exponential(2s)"
    """For how long."""
    solar_w: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """At noon. A node with it sleeps below ``land_at`` until the sun has charged it to 15 percent more."""
    place: tuple[float, float] = (0.0, 0.0)
    """Metres east and north."""
    spread_m: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """They stand anywhere within so far of their place."""
    orbit_m: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """They fly round it at this distance, once a ``lap``."""
    lap: str = "2m"
    region: str = ""
    regions: Count = 1
    """So many regions of their own, dealt in turn, where ``region`` names none."""
    drift_ppm: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    """Clocks run fast or slow by at most so much."""
    trace: str = ""
    """A CSV or Parquet file beside the scenario: node, up, down in seconds. In place of ``up`` and ``down``."""
    intervals: tuple[tuple[str, float, float], ...] = ()
    """What the file says, or the same written here."""


class Radio(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Between any two nodes, each direction."""

    latency: str = "300us"
    jitter: str = "200us"
    mbit: Positive = 800.0
    busy: Share = 0.0
    """Of the bandwidth, taken by others at noon."""
    loss: Share = 0.0
    duplicate: Share = 0.0
    reorder: Share = 0.0
    """Of datagrams."""
    range_m: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Beyond it nothing arrives; from seven tenths of it on, less and less. 0: no limit."""


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What clients ask; every node that takes requests has one, who waits ``each`` between two."""

    each: str = "exponential(20s)"
    prompt: Span = (10, 120)
    tokens: Span = (10, 100)
    alike: Share = 0.0
    """Of prompts, those that begin as all such do, some longer, some shorter; sessions then begin with what others computed."""
    crowd_at: str = ""
    """From then on, for ``crowd_for``, they ask ``crowd`` times as often."""
    crowd_for: str = "30s"
    crowd: Positive = 10.0


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Something that happens ``at`` a time or ``every`` so often, to one node drawn from a kind, or a named one."""

    what: Literal[
        "crash",
        "power",
        "wipe",
        "restart",
        "update",
        "freeze",
        "partition",
        "one-way",
        "reset",
        "slow",
        "disk",
        "clock",
        "corrupt",
        "consul",
        "nomad",
        "drain",
    ]
    at: str = ""
    every: str = ""
    who: str = ""
    """A kind, a region or a name; empty: any node."""
    count: Count = 1
    """Nodes at once; more than there are: all of them."""
    duration: str = "uniform(1s, 5s)"
    factor: Positive = 5.0
    """By which ``slow`` and ``update`` lengthen every run; of ``disk``, milliseconds a write."""
    wave: str = "30s"
    """Of ``update``: until the next ``count`` nodes get it."""


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole file."""

    name: str
    about: str = ""
    time: str = "5m"
    profile: Literal["lan", "wan", "radio"] = "lan"
    consul: bool = False
    """Nodes find each other in a Consul, and its lock says who leads; else they are told of three others."""
    day: str = "24h"
    """How long the sun takes; shorter to see a night within a run."""
    nomad: bool = False
    """The scheduler follows a Nomad, by which an operator drains nodes; needs a ``policy``."""
    patience: str = "30s"
    """A client that has seen nothing for so long gives up."""
    replay: Literal["exact", "fast"] = "exact"
    recovery: Literal["warm", "hot"] = "warm"
    speculation: Literal["off", "on"] = "off"
    """Tokens are guessed; something comes of it where the model's ``vocabulary`` is small."""
    log: Literal["async", "off"] = "async"
    log_mib: Count = 256
    quiet: str = "20s"
    """At the end no fault begins any more for so long: what can be served must be served."""
    policy: str = ""
    """What an operator would apply: the scheduler places the model by it, and moves it. Empty: ranges are dealt out
    at the start."""
    moves: Count = 12
    """Loads that the scheduler begins in a minute at most."""
    model: Model = Model()
    radio: Radio = Radio()
    load: Load = Load()
    nodes: tuple[NodeKind, ...]
    faults: tuple[Fault, ...] = ()


_CHOICES: dict[str, tuple[str, ...]] = {
    key: get_args(kind)
    for table in (Scenario, Fault)
    for key, kind in get_type_hints(table).items()
    if get_origin(kind) is Literal
}


def read_scenario(
    text: str, name: str, fetch: Callable[[str], tuple[Interval, ...]] | None = None
) -> Scenario:
    """TOML, or JSON as ``--shrink`` writes it; ``fetch`` reads traces. Raises ``ConfigError`` that names file, line
    and what to write instead."""
    try:
        told = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
    try:
        scenario = msgspec.convert(told, Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(_located(str(error), text, name)) from None
    if fetch is not None:
        nodes = tuple(
            msgspec.structs.replace(k, trace="", intervals=fetch(k.trace)) if k.trace else k
            for k in scenario.nodes
        )
        scenario = msgspec.structs.replace(scenario, nodes=nodes)
    _check(scenario, text, name)
    return scenario


def _check(scenario: Scenario, text: str, name: str) -> None:
    """What types cannot say."""
    wrong = [
        _bad_times(scenario, ("time", "patience", "quiet", "day"), time_ns),
        _bad_times(scenario.model, ("load",), time_ns),
        _bad_times(scenario.radio, ("latency", "jitter"), time_ns),
        _bad_times(scenario.load, ("each",), draw),
        _bad_times(scenario.load, ("crowd_at", "crowd_for"), time_ns),
        *(_bad_times(n, ("up", "down", "charging", "out_of_range", "away"), draw) for n in scenario.nodes),
        *(_bad_times(f, ("every", "duration"), draw) for f in scenario.faults),
        *(_bad_times(n, ("lap",), time_ns) for n in scenario.nodes),
        *(_bad_times(f, ("at", "wave"), time_ns) for f in scenario.faults),
    ]
    for found in wrong:
        if found:
            raise ConfigError(f"{name}:{_line(text, *found[:2])}: {found[0]}: {found[2]}")
    edges = (0, *scenario.model.cuts, scenario.model.layers)
    if list(edges) != sorted(set(edges)):
        raise ConfigError(
            f"{name}:{_line(text, 'cuts')}: cuts must rise, between 0 and layers ({scenario.model.layers})"
        )
    if scenario.policy:
        policy = parse_policy(scenario.policy, f"{name}:{_line(text, 'policy')}: policy")
        if scenario.model.name not in policy.models:
            raise ConfigError(
                f"{name}:{_line(text, 'policy')}: the policy wants no replicas of {scenario.model.name}; "
                f"write [models.{scenario.model.name}] in it"
            )
    if scenario.nomad and not scenario.policy:
        raise ConfigError(
            f"{name}:{_line(text, 'nomad')}: nomad = true needs a policy: who drains nodes is followed by a scheduler"
        )
    hosts = sum(n.count for n in scenario.nodes if n.hosts)
    if not scenario.policy and hosts < len(edges) - 1:
        raise ConfigError(
            f"{name}:{_line(text, 'cuts')}: {len(edges) - 1} ranges of layers need as many nodes with hosts = true; there are {hosts}"
        )
    if not any(n.ingress for n in scenario.nodes):
        raise ConfigError(f"{name}: no node takes requests; give one kind ingress = true")
    if time_ns(scenario.time) <= time_ns(scenario.quiet):
        raise ConfigError(f"{name}:{_line(text, 'time')}: time must be longer than quiet ({scenario.quiet})")
    for key in ("prompt", "tokens"):
        least, most = getattr(scenario.load, key)
        if not 1 <= least <= most <= 1000:
            raise ConfigError(
                f"{name}:{_line(text, key)}: {key} is least and most, 1 to 1000: for example [10, 100]"
            )
    names = dict(names_of(scenario))
    known = {n.kind for n in scenario.nodes} | names.keys() | {region_of(n, k) for n, k in names.items()}
    for kind in scenario.nodes:
        for node, _, _ in kind.intervals:
            if names.get(node) != kind:
                raise ConfigError(
                    f"{name}: the trace of {kind.kind} has a node {node!r}; they are {kind.kind}-1 to {kind.kind}-{kind.count}"
                )
    for fault in scenario.faults:
        if fault.what in ("nomad", "drain") and not scenario.nomad:
            raise ConfigError(
                f"{name}:{_line(text, 'what', fault.what)}: {fault.what} needs nomad = true at the top of the scenario"
            )
        if bool(fault.at) == bool(fault.every):
            raise ConfigError(f"{name}:{_line(text, 'what', fault.what)}: a fault has either at or every")
        if fault.who and fault.who not in known:
            kinds = ", ".join(sorted({n.kind for n in scenario.nodes}))
            raise ConfigError(
                f"{name}:{_line(text, 'who', fault.who)}: who is {fault.who!r}; there are the kinds {kinds}, and nodes named KIND-1, KIND-2 ..."
            )


def names_of(scenario: Scenario) -> list[tuple[str, NodeKind]]:
    """All nodes by name, with what they are."""
    return [(f"{k.kind}-{i + 1}", k) for k in scenario.nodes for i in range(k.count)]


def region_of(name: str, kind: NodeKind) -> str:
    """Where a node stands."""
    if kind.region or kind.regions == 1:
        return kind.region
    return f"{kind.kind}-region-{int(name.rsplit('-', 1)[1]) % kind.regions + 1}"


def _bad_times(table: object, keys: tuple[str, ...], read: object) -> tuple[str, str, str] | None:
    for key in keys:
        value = getattr(table, key)
        try:
            if value:
                read(value)  # type: ignore[operator]
        except ValueError as error:
            return key, value, str(error)
    return None


def _located(said: str, text: str, name: str) -> str:
    """msgspec's error with the line that it is about, as far as that can be told from the key."""
    match = _PATH.fullmatch(said)
    what, path = (match[1], match[2]) if match else (said, "")
    unknown = _UNKNOWN.match(what)
    key = unknown[1] if unknown else re.sub(r"\[.*?\]", "", path).rsplit(".", 1)[-1]
    known = (
        f"unknown key {key!r}; remove it, or see simulations/README.md for those there are"
        if unknown
        else what
    )
    if what.startswith("Invalid enum value") and key in _CHOICES:
        known = f"{what.removeprefix('Invalid enum value ')} is none of {', '.join(_CHOICES[key])}"
    return f"{name}:{_line(text, key)}: {path.strip('.') or key}: {known}"


def _line(text: str, key: str, value: str = "") -> int:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*(\[+)?{re.escape(key)}\b", line) and value in line:
            return number
    return 1
