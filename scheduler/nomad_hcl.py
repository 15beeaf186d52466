"""A model's Nomad job as HCL, to be kept in git and given to ``nomad job run``. Pure.

Everything is taken from what ``nomad_job.job_spec`` makes for the API, so that both say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from scheduler.nomad_job import LeaseGroup, ModelJob, S, job_spec, load_query


def job_text(job: ModelJob) -> str:
    """The job in HCL, to be kept in git and given to ``nomad job run``."""
    spec = job_spec(job)
    settings = job.settings
    lines = [
        f"# {job.model}@{job.digest[:12]} as the mesh would place it, rendered by 'mesh job render'.",
        "# Groups are ranges of layers, counts are replicas. A change of affinities restarts a group in Nomad: leave them",
        "# as they are until another version is rolled out. Needs Nomad 1.1"
        + (" and Consul." if settings.consul else "."),
        f"job {_text(job.id)} {{",
        *_assignments(
            2, {"type": "service", "namespace": settings.namespace, "datacenters": list(settings.datacenters)}
        ),
        *(line for c in spec["Constraints"] for line in _constraint_block(2, c)),
        *_block(2, "meta =", {_text(k): v for k, v in spec["Meta"].items()}),
        *_block(2, "update", _update_keys(spec["Update"])),
    ]
    for group, made in zip(job.groups, spec["TaskGroups"], strict=True):
        lines += _group_lines(job, group, made)
    return "\n".join([*lines, "}", ""])


def _update_keys(update: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "max_parallel": update["MaxParallel"],
        "canary": update["Canary"],
        "auto_revert": update["AutoRevert"],
        "health_check": update["HealthCheck"],
        "min_healthy_time": _seconds(update["MinHealthyTime"]),
        "healthy_deadline": _seconds(update["HealthyDeadline"]),
        "progress_deadline": _seconds(update["ProgressDeadline"]),
    }


def _group_lines(job: ModelJob, group: LeaseGroup, made: Mapping[str, Any]) -> list[str]:
    restart, again, migrate = made["RestartPolicy"], made["ReschedulePolicy"], made["Migrate"]
    task = made["Tasks"][0]
    lines = ["", f"  group {_text(group.name)} {{", *_assignments(4, {"count": group.count})]
    lines += _block(4, "constraint", {"operator": "distinct_hosts", "value": "true"})
    for one in made["Affinities"]:
        keys = {"attribute": one["LTarget"], "value": one["RTarget"], "weight": one["Weight"]}
        lines += _block(4, "affinity", keys)
    lines += _block(
        4,
        "restart",
        {
            "attempts": restart["Attempts"],
            "interval": _seconds(restart["Interval"]),
            "delay": _seconds(restart["Delay"]),
            "mode": restart["Mode"],
        },
    )
    lines += _block(
        4,
        "reschedule",
        {
            "delay": _seconds(again["Delay"]),
            "delay_function": again["DelayFunction"],
            "max_delay": _seconds(again["MaxDelay"]),
            "unlimited": again["Unlimited"],
        },
    )
    lines += _block(
        4,
        "migrate",
        {
            "max_parallel": migrate["MaxParallel"],
            "health_check": migrate["HealthCheck"],
            "min_healthy_time": _seconds(migrate["MinHealthyTime"]),
            "healthy_deadline": _seconds(migrate["HealthyDeadline"]),
        },
    )
    lines += _block(4, "ephemeral_disk", {"size": made["EphemeralDisk"]["SizeMB"]})
    lines += _scaling_lines(job, group)
    if job.settings.consul:
        lines += ["    network {", '      port "health" {}', "    }"]
        lines += _service_lines(made["Services"][0])
    lines += [
        '    task "lease" {',
        *_assignments(6, {"driver": task["Driver"], "kill_timeout": _seconds(task["KillTimeout"])}),
    ]
    lines += _block(6, "config", task["Config"])
    lines += _block(
        6, "resources", {"cpu": task["Resources"]["CPU"], "memory": task["Resources"]["MemoryMB"]}
    )
    lines += _block(6, "logs", {"max_files": 2, "max_file_size": 5})
    return [*lines, "    }", "  }"]


def _scaling_lines(job: ModelJob, group: LeaseGroup) -> list[str]:
    scale = job.settings.autoscale
    bounds = (1, 64) if scale is None else (scale.least, scale.most)
    lines = ["    scaling {", *_assignments(6, {"enabled": True, "min": bounds[0], "max": bounds[1]})]
    if scale is None:
        return [*lines, "      policy {}", "    }"]
    lines += [
        "      policy {",
        *_assignments(8, {"cooldown": "2m", "evaluation_interval": "20s"}),
        '        check "load" {',
    ]
    lines += _assignments(10, {"source": scale.prometheus, "query": load_query(job, group)})
    lines += _block(10, 'strategy "target-value"', {"target": scale.load})
    return [*lines, "        }", "      }", "    }"]


def _service_lines(service: Mapping[str, Any]) -> list[str]:
    check = service["Checks"][0]
    lines = [
        "    service {",
        *_assignments(6, {"name": service["Name"], "port": "health", "tags": service["Tags"]}),
    ]
    lines += _block(
        6,
        "check",
        {
            "type": check["Type"],
            "port": "health",
            "interval": _seconds(check["Interval"]),
            "timeout": _seconds(check["Timeout"]),
        },
    )
    return [*lines, "    }"]


def _constraint_block(indent: int, one: Mapping[str, str]) -> list[str]:
    keys = {"attribute": one["LTarget"], "operator": one["Operand"], "value": one["RTarget"]}
    return _block(indent, "constraint", {k: v for k, v in keys.items() if v})


def _block(indent: int, head: str, keys: Mapping[str, Any]) -> list[str]:
    pad = " " * indent
    return [f"{pad}{head} {{", *_assignments(indent + 2, keys), f"{pad}}}"]


def _assignments(indent: int, keys: Mapping[str, Any]) -> Iterable[str]:
    width = max(len(k) for k in keys)
    return [f"{' ' * indent}{k.ljust(width)} = {_value(v)}" for k, v in keys.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return _text(value)


def _text(text: str) -> str:
    # HCL evaluates ${...} and leaves what Nomad knows alone; quotes and backslashes are JSON's.
    return json.dumps(text)


def _seconds(ns: int) -> str:
    return f"{ns // S}s"
