"""A placed model as a Nomad job: a group for each range of layers, ``count`` replicas, a task that holds the lease.

As Nomad's HTTP API takes it (durations in nanoseconds); ``nomad_hcl`` writes the same for people. A job carries the fingerprint of what was rendered, so that what others changed since
is seen and left alone. Nothing newer than Nomad 1.1 is in it. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import InputError
from mesh.types import LayerRange
from scheduler.policy import ModelPolicy

RENDERER = "1"
"""Of the shape below: fingerprints of another one say nothing about edits."""
MODEL, DIGEST, MANAGED = "mesh.model", "mesh.digest", "mesh.managed"
COUNTS, RENDERED, RENDERED_BY = "mesh.counts", "mesh.rendered", "mesh.renderer"
OPERATOR, AUTOSCALER = "operator", "autoscaler"
"""Who sets counts once the job is registered."""
S = 1_000_000_000
_CPU_MHZ = 50
LEASE_MIB = 64
"""The lease's own process, beside the memory it reserves for its agent."""
_AFFINITY = 100
_KILL_S, _HEALTHY_S, _HEALTHY_DEADLINE_S, _PROGRESS_S = 15, 5, 600, 900
_NODE_ATTRIBUTES = {"node": "${node.unique.name}", "region": "${node.region}"}


@dataclass(frozen=True, slots=True)
class LeaseGroup:
    """Replicas of a range of layers. ``nodes``: names of the clients that the placement chose."""

    layers: LayerRange
    count: int
    memory_mib: int
    """Of weights and KV cache of one replica."""
    nodes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"layers-{self.layers.start}-{self.layers.end}"


def layers_of(group: str) -> LayerRange | None:
    """Of a group by its name; ``None`` for groups that hold no replica."""
    match = re.fullmatch(r"layers-([0-9]{1,4})-([0-9]{1,4})", group)
    if not match or int(match[1]) >= int(match[2]):
        return None
    return LayerRange(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Constraint:
    """As Nomad writes them: ``attribute operator value``."""

    attribute: str
    operator: str
    value: str


@dataclass(frozen=True, slots=True)
class Autoscale:
    """Bounds for the Nomad Autoscaler, and the load that it keeps: the share of KV memory that is in use."""

    least: int
    most: int
    load: float = 0.7
    prometheus: str = "prometheus"
    """Name of the Autoscaler's APM plugin."""


@dataclass(frozen=True, slots=True)
class JobSettings:
    """How the job is run, whatever it places."""

    name: str = ""
    """Empty: the model's."""
    datacenters: tuple[str, ...] = ("dc1",)
    namespace: str = "default"
    driver: str = "raw_exec"
    command: str = "mesh"
    agent: str = "${attr.unique.network.ip-address}:7070"
    """Where a lease finds the agent of its client."""
    cluster: str = "default"
    canaries: int = 1
    """Replicas of a new version beside the old ones, until somebody promotes them; 0: one after the other."""
    consul: bool = True
    """Whether a check in Consul says that a replica serves; else a task that runs counts as healthy."""
    autoscale: Autoscale | None = None


@dataclass(frozen=True, slots=True)
class ModelJob:
    """Everything that a job is rendered from."""

    model: str
    digest: str
    runtime: str
    quantization: str
    sessions: int
    context: int
    groups: tuple[LeaseGroup, ...]
    constraints: tuple[Constraint, ...] = ()
    settings: JobSettings = JobSettings()

    @property
    def id(self) -> str:
        return self.settings.name or self.model

    def arguments(self, group: LeaseGroup) -> list[str]:
        """Of the task."""
        layers = group.layers
        health = ["--health", "${NOMAD_ADDR_health}"] if self.settings.consul else []
        return [
            "lease",
            f"{self.model}@{self.digest[:12]}:{layers.start}-{layers.end}",
            *("--agent", self.settings.agent),
            *("--cluster", self.settings.cluster),
            *("--runtime", self.runtime),
            *("--quantization", self.quantization),
            *("--sessions", str(self.sessions)),
            *("--context", str(self.context)),
            *health,
        ]


def groups_of(report: Mapping[str, Any]) -> tuple[LeaseGroup, ...]:
    """Of a plan as ``/mesh/v1/plan`` reports it: stages of the same layers are replicas of each other."""
    ranges: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for stage in report["stages"]:
        ranges.setdefault((stage["layers"][0], stage["layers"][1]), []).append(stage)
    return tuple(
        LeaseGroup(
            LayerRange(start, end),
            len(stages),
            max(-(-int(s["memory_bytes"]) // 2**20) for s in stages),
            tuple(sorted(s["name"] for s in stages)),
        )
        for (start, end), stages in sorted(ranges.items())
    )


def constraints_of(policy: ModelPolicy) -> tuple[Constraint, ...]:
    """A policy's rules about labels, over the clients' ``meta``. Raises ``InputError`` for what Nomad cannot say."""
    found = [_denied(label) for label in policy.deny]
    if policy.allow:
        keys = sorted({label.partition("=")[0] for label in policy.allow})
        if len(keys) > 1:
            raise InputError(
                f"allow names labels of several keys ({', '.join(keys)}); a Nomad job allows values of one"
            )
        values = sorted({label.partition("=")[2] for label in policy.allow})
        attribute = _attribute(keys[0])
        found.append(
            Constraint(attribute, "is_set", "")
            if "*" in values
            else Constraint(attribute, "set_contains_any", ",".join(values))
        )
    if policy.spread:
        raise InputError(
            "spread is not written into Nomad jobs; their replicas stand on different clients always"
        )
    return tuple(found)


def _denied(label: str) -> Constraint:
    key, _, value = label.partition("=")
    return (
        Constraint(_attribute(key), "is_not_set", "")
        if value == "*"
        else Constraint(_attribute(key), "!=", value)
    )


def _attribute(key: str) -> str:
    return _NODE_ATTRIBUTES.get(key, f"${{meta.{key}}}")


# -- for Nomad's API -------------------------------------------------------------------------------


def job_spec(job: ModelJob) -> dict[str, Any]:
    """What ``/v1/jobs`` takes as ``Job``."""
    settings = job.settings
    spec: dict[str, Any] = {
        "ID": job.id,
        "Name": job.id,
        "Type": "service",
        "Namespace": settings.namespace,
        "Datacenters": list(settings.datacenters),
        "Constraints": [_constraint(c) for c in job.constraints],
        "Update": _update(settings),
        "TaskGroups": [_group(job, g) for g in job.groups],
        "Meta": {
            MODEL: job.model,
            DIGEST: job.digest,
            MANAGED: "true",
            COUNTS: AUTOSCALER if settings.autoscale else OPERATOR,
            RENDERED_BY: RENDERER,
        },
    }
    spec["Meta"][RENDERED] = fingerprint(spec)
    return spec


def _constraint(one: Constraint) -> dict[str, str]:
    return {"LTarget": one.attribute, "Operand": one.operator, "RTarget": one.value}


def _health(settings: JobSettings) -> str:
    return "checks" if settings.consul else "task_states"


def _update(settings: JobSettings) -> dict[str, Any]:
    return {
        "MaxParallel": 1,
        "Canary": settings.canaries,
        "AutoRevert": True,
        "AutoPromote": False,
        "HealthCheck": _health(settings),
        "MinHealthyTime": _HEALTHY_S * S,
        "HealthyDeadline": _HEALTHY_DEADLINE_S * S,
        "ProgressDeadline": _PROGRESS_S * S,
        "Stagger": 30 * S,
    }


def _group(job: ModelJob, group: LeaseGroup) -> dict[str, Any]:
    settings = job.settings
    made: dict[str, Any] = {
        "Name": group.name,
        "Count": group.count,
        "Constraints": [{"LTarget": "", "Operand": "distinct_hosts", "RTarget": "true"}],
        "Affinities": [
            {"LTarget": "${node.unique.name}", "Operand": "=", "RTarget": n, "Weight": _AFFINITY}
            for n in group.nodes
        ],
        "RestartPolicy": {"Attempts": 3, "Interval": 120 * S, "Delay": 5 * S, "Mode": "fail"},
        "ReschedulePolicy": {
            "Attempts": 0,
            "Interval": 0,
            "Delay": 5 * S,
            "DelayFunction": "exponential",
            "MaxDelay": 300 * S,
            "Unlimited": True,
        },
        "Migrate": {
            "MaxParallel": 1,
            "HealthCheck": _health(settings),
            "MinHealthyTime": _HEALTHY_S * S,
            "HealthyDeadline": _HEALTHY_DEADLINE_S * S,
        },
        "EphemeralDisk": {"SizeMB": 20, "Sticky": False, "Migrate": False},
        "Scaling": _scaling(job, group),
        "Tasks": [
            {
                "Name": "lease",
                "Driver": settings.driver,
                "Config": {"command": settings.command, "args": job.arguments(group)},
                "Resources": {"CPU": _CPU_MHZ, "MemoryMB": group.memory_mib + LEASE_MIB},
                "LogConfig": {"MaxFiles": 2, "MaxFileSizeMB": 5},
                "KillTimeout": _KILL_S * S,
            }
        ],
    }
    if settings.consul:
        made["Networks"] = [{"DynamicPorts": [{"Label": "health"}]}]
        made["Services"] = [
            {
                "Name": "mesh-lease",
                "PortLabel": "health",
                "Tags": [job.model, group.name],
                "Checks": [{"Type": "tcp", "PortLabel": "health", "Interval": 5 * S, "Timeout": 2 * S}],
            }
        ]
    return made


def _scaling(job: ModelJob, group: LeaseGroup) -> dict[str, Any]:
    scale = job.settings.autoscale
    if scale is None:
        return {"Min": 1, "Max": 64, "Enabled": True, "Policy": {}}
    check = {
        "source": scale.prometheus,
        "query": load_query(job, group),
        "strategy": [{"target-value": [{"target": scale.load}]}],
    }
    policy = {"cooldown": "2m", "evaluation_interval": "20s", "check": [{"load": [check]}]}
    return {"Min": scale.least, "Max": scale.most, "Enabled": True, "Policy": policy}


def load_query(job: ModelJob, group: LeaseGroup) -> str:
    """PromQL, from the agents' ``/metrics``: the share of these replicas' KV memory that sessions have reserved."""
    shard = f'shard_id="{job.model}:{group.layers}/{job.runtime}-{job.quantization}"'
    return f"sum(mesh_kv_reserved_bytes{{{shard}}}) / sum(mesh_kv_budget_bytes{{{shard}}})"


# -- what others made of it -------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {
    "Type": None,
    "Datacenters": None,
    "Constraints": None,
    "TaskGroups": {
        "Name": None,
        "Constraints": None,
        "Affinities": None,
        "Update": None,
        "RestartPolicy": None,
        "Tasks": {
            "Name": None,
            "Driver": None,
            "Config": None,
            "Env": None,
            "Resources": {"CPU": None, "MemoryMB": None},
            "KillTimeout": None,
        },
    },
}
"""What a fingerprint covers. Counts are not in it: they have a writer of their own."""
_UPDATE = ("MaxParallel", "Canary", "AutoRevert", "AutoPromote", "HealthCheck")


def fingerprint(spec: Mapping[str, Any]) -> str:
    """Of what was rendered, the same before Nomad has filled in its defaults and after."""
    covered = _covered(_SHAPE, spec)
    covered["Constraints"] = _ours(covered.get("Constraints"))
    for group in covered.get("TaskGroups", ()):
        group["Constraints"] = _ours(group.get("Constraints"))
        # Nomad copies the job's update into its groups, and empties the job's.
        update = group.pop("Update", None) or spec.get("Update") or {}
        group["Update"] = {k: update.get(k) for k in _UPDATE}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:16]


def _ours(constraints: Sequence[Mapping[str, str]] | None) -> list[Mapping[str, str]]:
    """Without those that Nomad implies (signals that a client must know, a version of Consul): they are of ``attr``."""
    return [c for c in constraints or () if not c.get("LTarget", "").startswith("${attr.")]


def _covered(shape: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in shape.items():
        have = value.get(key)
        if isinstance(inner, Mapping) and isinstance(have, Sequence):
            found[key] = [_covered(inner, each) for each in have]
        elif isinstance(inner, Mapping) and isinstance(have, Mapping):
            found[key] = _covered(inner, have)
        elif have:
            found[key] = have
    return found
