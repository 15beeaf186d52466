"""From a job as Nomad has it and a placement to what may be registered, and what Nomad's dry run says of it. Pure.

- A job that is not ours, that somebody edited, or that says ``mesh.managed = false`` is left alone.
- Cuts and affinities are written once and at a change of version: Nomad restarts a group whose affinities change.
- Counts have one writer. Once registered they are the operator's (``nomad job scale``), or the Autoscaler's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mesh.errors import InputError
from mesh.types import LayerRange
from scheduler.nomad_job import (
    AUTOSCALER,
    COUNTS,
    DIGEST,
    LEASE_MIB,
    MANAGED,
    MODEL,
    RENDERED,
    RENDERED_BY,
    RENDERER,
    LeaseGroup,
    ModelJob,
    fingerprint,
    job_spec,
)

_GROUP = re.compile(r"layers-([0-9]{1,4})-([0-9]{1,4})")
_UPDATES = {
    "Place": "placed",
    "Canary": "as canaries",
    "InPlaceUpdate": "updated in place",
    "DestructiveUpdate": "replaced",
    "Migrate": "moved",
    "Stop": "stopped",
    "Ignore": "as they are",
}


@dataclass(frozen=True, slots=True)
class Change:
    """What would be registered. ``index`` is the job's as it was read: Nomad refuses when it has moved on."""

    spec: Mapping[str, Any]
    index: int
    rolls_out: bool
    """Another version, or the first."""
    keeps_counts: bool
    notes: tuple[str, ...] = ()


def change(
    current: Mapping[str, Any] | None, wanted: ModelJob, replicas: int | None = None, recut: bool = False
) -> Change:
    """``replicas``: counts that somebody asks for; ``recut``: cut and place anew, although that interrupts.

    Raises ``InputError`` where the job must be left alone.
    """
    if current is None or current.get("Stop"):
        return Change(job_spec(wanted), int(current["JobModifyIndex"]) if current else 0, True, False)
    leave_alone(current, wanted)
    meta = current["Meta"]
    counts_by_machine = meta.get(COUNTS) == AUTOSCALER
    if replicas is not None and counts_by_machine and wanted.settings.autoscale is None:
        raise InputError(
            f"counts of {wanted.id} are the Autoscaler's ({COUNTS} = {AUTOSCALER}); give it bounds with --autoscale, "
            "or take them back in the job"
        )
    before = groups_of_job(current)
    rolls_out = version_of(current) != version_of(job_spec(wanted))
    groups, notes = wanted.groups, []
    if not recut:
        groups = _kept_groups(before, wanted.groups, rolls_out)
        if [g.layers for g in groups] != [g.layers for g in wanted.groups]:
            notes.append("the cuts stay as they are; --recut places anew, and interrupts what is generated")
    if replicas is not None:
        groups = tuple(replace(g, count=replicas) for g in groups)
    spec = job_spec(replace(wanted, groups=groups))
    return Change(spec, int(current["JobModifyIndex"]), rolls_out or recut, replicas is None, tuple(notes))


def leave_alone(current: Mapping[str, Any], wanted: ModelJob) -> None:
    """Raises ``InputError`` with the reason, if there is one."""
    meta = current.get("Meta") or {}
    if MODEL not in meta:
        raise InputError(
            f"there is a job {wanted.id} that is no model's; give this one another name with --job"
        )
    if meta[MODEL] != wanted.model:
        raise InputError(
            f"the job {wanted.id} holds {meta[MODEL]}, not {wanted.model}; give it another name with --job"
        )
    if str(meta.get(MANAGED, "true")).lower() == "false":
        raise InputError(
            f"the job {wanted.id} says {MANAGED} = false: it is its operator's, and was left as it is"
        )
    if meta.get(RENDERED_BY) != RENDERER:
        raise InputError(
            f"the job {wanted.id} was rendered by another version of mesh; 'mesh job render' shows this one's"
        )
    if edited(current):
        raise InputError(
            f"the job {wanted.id} was edited since mesh rendered it, and was left as it is; set {MANAGED} = false in it "
            "to keep it so, or stop it to have it placed anew"
        )


def edited(current: Mapping[str, Any]) -> bool:
    """Whether somebody changed more than counts."""
    return bool((current.get("Meta") or {}).get(RENDERED) != fingerprint(current))


def version_of(spec: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What a roll-out changes: the model's file, and how it is held."""
    arguments = spec["TaskGroups"][0]["Tasks"][0]["Config"]["args"]
    return spec["Meta"].get(DIGEST, ""), tuple(a for a in arguments[2:] if not a.startswith("${"))


def groups_of_job(spec: Mapping[str, Any]) -> tuple[LeaseGroup, ...]:
    """The groups of a job of ours; raises ``InputError`` for a group of another name."""
    found = []
    for group in spec["TaskGroups"]:
        match = _GROUP.fullmatch(group["Name"])
        if not match:
            raise InputError(f"the job {spec['ID']} has a group {group['Name']!r} that mesh did not make")
        nodes = tuple(a["RTarget"] for a in group.get("Affinities") or ())
        memory = int(group["Tasks"][0]["Resources"]["MemoryMB"]) - LEASE_MIB
        layers = LayerRange(int(match[1]), int(match[2]))
        found.append(LeaseGroup(layers, int(group["Count"]), memory, nodes))
    return tuple(found)


def _kept_groups(
    before: tuple[LeaseGroup, ...], planned: tuple[LeaseGroup, ...], rolls_out: bool
) -> tuple[LeaseGroup, ...]:
    new = {g.layers: g for g in planned}
    return tuple(
        replace(new[g.layers], count=g.count) if rolls_out and g.layers in new else g for g in before
    )


# -- Nomad's dry run --------------------------------------------------------------------------------


def dry_run(answer: Mapping[str, Any], what: Change) -> list[str]:
    """What Nomad would do, a line for each group. Raises ``InputError`` for what must not be done."""
    lines, replaced = [], []
    for name, update in sorted(_updates(answer).items()):
        done = [f"{update[k]} {words}" for k, words in _UPDATES.items() if update.get(k)]
        lines.append(f"{name}: {', '.join(done) or 'nothing'}")
        if update.get("DestructiveUpdate") or update.get("Stop"):
            replaced.append(name)
    unplaced = nowhere(answer)
    if unplaced:
        raise InputError("no client has room: " + "; ".join(unplaced))
    if replaced and not what.rolls_out:
        raise InputError(
            f"Nomad would replace replicas of {', '.join(replaced)} although the version stays: {_why(answer)}; "
            "nothing was changed"
        )
    return lines


def _updates(answer: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
    return (answer.get("Annotations") or {}).get("DesiredTGUpdates") or {}


def nowhere(answer: Mapping[str, Any]) -> list[str]:
    """Nomad's reasons, a line for each group that it could not place."""
    lines = []
    for name, metric in sorted((answer.get("FailedTGAllocs") or {}).items()):
        why = [f"{n} of them by {rule}" for rule, n in _pairs(metric, "ConstraintFiltered")]
        why += [f"{n} of class {kind}" for kind, n in _pairs(metric, "ClassFiltered")]
        why += [f"{n} have too little {what}" for what, n in _pairs(metric, "DimensionExhausted")]
        evaluated = metric.get("NodesEvaluated") or 0
        if not evaluated:
            why.append(
                "no client is ready in " + (", ".join(metric.get("NodesAvailable") or ()) or "the datacenter")
            )
        lines.append(
            f"{name}: {evaluated} clients looked at, {metric.get('NodesFiltered', 0)} ruled out, {', '.join(why)}"
        )
    return lines


def _pairs(metric: Mapping[str, Any], key: str) -> list[tuple[str, int]]:
    return sorted((metric.get(key) or {}).items())


def _why(answer: Mapping[str, Any]) -> str:
    found = []
    for group in ((answer.get("Diff") or {}).get("TaskGroups")) or ():
        found += _edits(group, str(group.get("Name", "")))
        for task in group.get("Tasks") or ():
            found += _edits(task, f"{group.get('Name', '')}/{task.get('Name', '')}")
    return ", ".join(found[:4]) or "see 'nomad job plan'"


def _edits(part: Mapping[str, Any], where: str) -> list[str]:
    fields = [str(f.get("Name", "")) for f in part.get("Fields") or () if f.get("Type") != "None"]
    objects = [str(o.get("Name", "")) for o in part.get("Objects") or () if o.get("Type") != "None"]
    return [f"{where} {name}" for name in [*fields, *objects]]
