"""How often peers are probed and how long silence is borne: a profile for each kind of network.

Every profile trades traffic for the time until a loss is seen. A peer that stops is suspected
(and out of new routes) after about ``probe_interval + 2 * probe_timeout``, and declared dead
``suspicion_min`` later if several agree, up to ``suspicion_max`` if only one accuses.
"""

from __future__ import annotations

from dataclasses import dataclass

_MS = 1_000_000
_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Profile:
    """Times are nanoseconds."""

    name: str
    probe_interval: int
    """A node begins ``probe_fanout`` probes in each; small meshes probe everybody in it."""
    probe_fanout: int
    probe_timeout: int
    """For an answer, before others are asked; as long again for theirs. Longer than the worst
    round trip of a healthy link, or lossy links will be asked about needlessly."""
    helpers: int
    """Peers asked to probe on our behalf before we accuse."""
    suspicion_min: int
    """Time that the accused has to refute, when others confirm the suspicion."""
    suspicion_max: int
    """The same when nobody confirms it: more, because then it may be us."""
    gossip_interval: int
    gossip_fanout: int
    retransmit: int
    """News is passed on ``retransmit * ceil(log10(n + 1))`` times by each node."""
    sync_interval: int
    """Whole views are exchanged with one peer so often: heals what gossip missed."""
    dead_probe_interval: int
    """One dead or unresolved peer is tried so often: how fast partitions heal."""
    forget: int
    """The dead are kept so long."""
    train_interval: int
    """Bandwidth to one peer is measured so often, with ``train_packets`` of ``train_bytes``."""
    train_packets: int
    train_bytes: int
    stall: int
    """A timer of ours that is so late says that we were held up: no silence of that time counts."""


LAN = Profile(
    name="lan",
    probe_interval=_S,
    probe_fanout=4,
    probe_timeout=350 * _MS,
    helpers=2,
    suspicion_min=4 * _S,
    suspicion_max=12 * _S,
    gossip_interval=200 * _MS,
    gossip_fanout=3,
    retransmit=4,
    sync_interval=30 * _S,
    dead_probe_interval=_S,
    forget=600 * _S,
    train_interval=60 * _S,
    train_packets=8,
    train_bytes=1200,
    stall=200 * _MS,
)
WAN = Profile(
    name="wan",
    probe_interval=3 * _S,
    probe_fanout=3,
    probe_timeout=1500 * _MS,
    helpers=2,
    suspicion_min=15 * _S,
    suspicion_max=60 * _S,
    gossip_interval=500 * _MS,
    gossip_fanout=3,
    retransmit=4,
    sync_interval=60 * _S,
    dead_probe_interval=5 * _S,
    forget=3600 * _S,
    train_interval=300 * _S,
    train_packets=8,
    train_bytes=1200,
    stall=500 * _MS,
)
RADIO = Profile(
    name="radio",
    probe_interval=10 * _S,
    probe_fanout=1,
    probe_timeout=3 * _S,
    helpers=2,
    suspicion_min=30 * _S,
    suspicion_max=120 * _S,
    gossip_interval=2 * _S,
    gossip_fanout=2,
    retransmit=3,
    sync_interval=300 * _S,
    dead_probe_interval=20 * _S,
    forget=6 * 3600 * _S,
    train_interval=900 * _S,
    train_packets=4,
    train_bytes=600,
    stall=1000 * _MS,
)
PROFILES = {p.name: p for p in (LAN, WAN, RADIO)}
