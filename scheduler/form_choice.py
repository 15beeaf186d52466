"""Which form a model is placed in where its policy leaves that open: one for the whole mesh. Pure.

Routes of one form are exact and routes of several are not, so it is not every node's own choice. Another form than the usual one is
taken where every node that may host has measured it, and it is clearly faster for all of them together, or the only one that they know.
"""

from __future__ import annotations

from collections import Counter

from mesh.forms import DEFAULT_RUNTIME, choices, fastest
from mesh.types import LayerRange, ModelShape
from scheduler.cluster import ClusterSnapshot, Node
from scheduler.policy import ModelPolicy, forbidden


def chosen_form(snapshot: ClusterSnapshot, shape: ModelShape, policy: ModelPolicy) -> tuple[str, str]:
    """Runtime and quantization. The form that schedulers placed before counts as the usual one: what is loaded is not
    exchanged for a little."""
    forms = choices(policy.runtime, policy.quantization)
    if len(forms) == 1:
        return next(iter(forms.items()))
    placed = _placed(snapshot, shape)
    usual = placed if placed in forms else DEFAULT_RUNTIME
    hosts = [n for n in snapshot.alive() if shape.ref.name in n.models and forbidden(n, policy) is None]
    times = {r: _token_us(hosts, shape, r, q) for r, q in forms.items()}
    known = {r: us for r, us in times.items() if us is not None}
    if usual not in known and (placed in forms or not known):
        return usual, forms[usual]
    chosen = fastest(known, usual)
    return chosen, forms[chosen]


def _placed(snapshot: ClusterSnapshot, shape: ModelShape) -> str | None:
    """The runtime of most replicas that a scheduler's lease holds."""
    found = Counter(
        r.shard.runtime
        for n in snapshot.alive()
        for r in n.replicas
        if r.term is not None and r.shard.model.ref == shape.ref
    )
    return max(sorted(found), key=lambda r: found[r], default=None)


def _token_us(hosts: list[Node], shape: ModelShape, runtime: str, quantization: str) -> float | None:
    """What a token takes if every host works at its own rate, microseconds; ``None`` where one has not measured it."""
    wanted, whole = (shape.ref.digest, runtime, quantization), LayerRange(0, shape.layers)
    rates = []
    for host in hosts:
        known = [s for s in host.layer_speeds if (s.model, s.runtime, s.quantization) == wanted]
        if not known or known[0].stage(whole, shape.layers) <= 0:
            return None
        rates.append(1 / known[0].stage(whole, shape.layers))
    return len(rates) / sum(rates) if rates else None
