"""Which node holds which layers: from a model's demand, the snapshot and the policy to replicas.

Copies of the model are placed one after the other, each as the cheapest chain of nodes
(``scheduler.chain``): the first decides how fast an answer can be, the others how many losses it
survives. A layer's copies stand on different nodes; a later copy keeps to the cuts of the first
where that costs little, so that a route can mix them stage by stage.

"It cannot be done" is an answer: ``Infeasible`` names the limit that binds and what would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from mesh.types import LayerRange, NodeId
from scheduler.availability import availability
from scheduler.chain import Solution
from scheduler.cluster import ClusterSnapshot
from scheduler.copy_search import CopySearch
from scheduler.demand import ModelDemand
from scheduler.feasibility import (
    NOTHING_TAKEN,
    hosts_of,
    least_bytes,
    mib,
    no_room,
    positions_of,
    room_of,
    without,
)
from scheduler.plan import Infeasible, Plan
from scheduler.policy import ModelPolicy

NOBODY: Mapping[NodeId, str] = MappingProxyType({})
_COPIES_MAX = 64


def place(
    snapshot: ClusterSnapshot,
    demand: ModelDemand,
    policy: ModelPolicy,
    others: Sequence[ModelDemand] = (),
    held_off: Mapping[NodeId, str] = NOBODY,
    taken: Mapping[NodeId, int] = NOTHING_TAKEN,
) -> Plan | Infeasible:
    """Place a model. ``others``: the same model in other quantizations, to say what would fit.
    ``held_off``: nodes that get nothing for now, and why. ``taken``: bytes that plans of other models
    will take, beyond what is loaded."""
    answer = _place(snapshot, demand, policy, held_off, taken)
    if isinstance(answer, Infeasible) and answer.limit in ("memory", "replicas"):
        would_do = _would_do(snapshot, demand, policy, others, taken)
        return replace(answer, would_do=would_do or answer.would_do)
    return answer


def _place(
    snapshot: ClusterSnapshot,
    demand: ModelDemand,
    policy: ModelPolicy,
    held_off: Mapping[NodeId, str],
    taken: Mapping[NodeId, int],
) -> Plan | Infeasible:
    hosts, reasons = hosts_of(snapshot, demand, policy, taken)
    reasons |= {h.node.id: held_off[h.node.id] for h in hosts if h.node.id in held_off}
    hosts = [h for h in hosts if h.node.id not in held_off]
    if not hosts:
        return _nobody(snapshot, demand, policy, taken, reasons)
    plan = _copies(CopySearch(snapshot, hosts, demand, policy), reasons)
    if isinstance(plan, Infeasible):
        return plan
    if policy.max_tpot and plan.tpot_us > policy.max_tpot:
        return Infeasible(
            "tpot",
            f"the fastest plan takes {plan.tpot_us / 1000:.1f} ms per token, max_tpot is "
            f"{policy.max_tpot / 1000:.1f} ms",
            "Faster nodes or links, or a larger max_tpot",
            tuple(sorted(reasons.items())),
        )
    return plan


def _copies(search: CopySearch, reasons: dict[NodeId, str]) -> Plan | Infeasible:
    policy, hosts = search.policy, search.hosts
    copies: list[Solution] = []
    up = 0.0
    hazards = {h.node.id: h.hazard for h in hosts}
    while len(copies) < policy.replicas or up < policy.availability:
        found = search.next_copy([c.chain for c in copies]) if len(copies) < _COPIES_MAX else None
        if found is None:
            return search.why_not(len(copies), up, reasons)
        copies.append(found)
        held = [(hosts[n].node.id, LayerRange(a, b)) for c in copies for n, a, b in c.chain]
        up = availability(held, search.demand.layers, hazards)
    return search.plan(copies, up, reasons)


def _nobody(
    snapshot: ClusterSnapshot,
    demand: ModelDemand,
    policy: ModelPolicy,
    taken: Mapping[NodeId, int],
    reasons: dict[NodeId, str],
) -> Infeasible:
    listed = tuple(sorted(reasons.items()))
    if not reasons:
        return Infeasible("nodes", "there are no nodes")
    nodes = [without(snapshot.nodes[i], taken) for i in reasons]
    small = [n for n in nodes if reasons[n.id] == no_room(n, demand, policy)]
    if small:
        roomiest = max(small, key=lambda n: room_of(n, demand, policy))
        positions = positions_of(demand, policy)
        return Infeasible(
            "memory",
            f"one layer of {demand.shape.ref.name} fits on no node: it takes {mib(least_bytes(demand, policy))} "
            f"({mib(demand.layer_bytes + demand.shard_bytes)} weights, {mib(positions * demand.kv_layer_bytes)} KV for "
            f"{policy.sessions} sessions of {positions // policy.sessions}), and the roomiest is {reasons[roomiest.id]}",
            reasons=listed,
        )
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    told = "; ".join(f"{c} x {r}" if c > 1 else r for r, c in sorted(counts.items(), key=lambda i: -i[1])[:4])
    return Infeasible("nodes", f"none of {len(reasons)} nodes may host it: {told}", reasons=listed)


def _would_do(
    snapshot: ClusterSnapshot,
    demand: ModelDemand,
    policy: ModelPolicy,
    others: Sequence[ModelDemand],
    taken: Mapping[NodeId, int],
) -> str:
    """The nearest thing that would fit: what is asked for less, or smaller weights."""
    tries: list[tuple[str, ModelDemand, ModelPolicy]] = []
    sessions = policy.sessions
    while sessions > 1:
        sessions //= 2
        tries.append((f"sessions = {sessions} would fit", demand, replace(policy, sessions=sessions)))
    context = min(policy.context, demand.shape.context_max)
    while context >= 512:
        context //= 2
        less = replace(policy, context=context)
        tries.append((f"context = {context} would fit", demand, less))
        tries.append((f"context = {context} with one session would fit", demand, replace(less, sessions=1)))
    for other in others:
        if other.layer_bytes < demand.layer_bytes:
            tries.append((f"{other.quantization} shards would fit", other, policy))
    for replicas in range(policy.replicas - 1, 0, -1):
        tries.append((f"replicas = {replicas} would fit", demand, replace(policy, replicas=replicas)))
    for text, smaller, milder in tries:
        if isinstance(_place(snapshot, smaller, milder, NOBODY, taken), Plan):
            return text
    return ""
