"""What a route costs: the terms of ARCHITECTURE.md's page "What a route costs", each with its unit.

All times are microseconds for one position unless a name says otherwise. ``Terms`` is what
``mesh route --explain`` shows; routing minimises ``total``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mesh.links import LinkEstimate
from mesh.types import NodeId
from scheduler.cluster import Node, Replica
from scheduler.speed import StageSpeed, guess

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Places = NDArray[np.intp]

_Number = TypeVar("_Number", float, "Floats")
"""Of one link or of many."""

FRAME_HEAD_BYTES = 100
"""What an activation frame carries beside its floats."""
TOKEN_BYTES = 100
UNKNOWN_RTT_US = 2000.0
UNKNOWN_BITS_S = 50e6
"""Of a link that nobody measured and that has no coordinates: an ordinary wireless one."""
RETRANSMIT_US = 200_000.0
"""What a lost segment costs a stream: TCP's least retransmission timeout on Linux."""
HAZARD_PRIOR_S = 86_400.0
"""Losses of a node are expected once in this time, until it was watched for longer."""
RECOVERY_US = 2e6
"""Until a session goes on after the loss of a stage; measured figures will replace it."""
RUNNING_DRY_S = 600.0
"""A battery that lasts less than this is about to be a loss."""
STAGE_US = 250.0
"""What a stage costs beside its computation: a frame's way through an agent, until ingresses have measured
it (``scheduler.learning``)."""
TYPICAL_POSITION = 256.0
"""At which a plan, which knows no request, prices a step."""
BUSY_WAIT = 0.5
"""Of a step: what a frame waits on average at a replica that others use."""


class Percentile(Enum):
    """Which of a distribution a route is chosen by."""

    P50 = 50
    P99 = 99


@dataclass(frozen=True, slots=True)
class Terms:
    """Cost of one stage and of the hop that leads to it, microseconds a position. ``risk`` and ``policy`` are
    no time that passes: they weigh a stage against others."""

    compute: float
    queue: float
    hop: float
    transfer: float
    risk: float
    policy: float = 0.0

    @property
    def time(self) -> float:
        """What a clock should show."""
        return self.compute + self.queue + self.hop + self.transfer

    @property
    def total(self) -> float:
        return self.time + self.risk + self.policy


def speed_of(node: Node, replica: Replica) -> StageSpeed:
    """Measured, or guessed from the machine."""
    return replica.speed or guess(replica.shard, node.capabilities)


def compute_us(
    speed: StageSpeed,
    sessions: int,
    percentile: Percentile,
    stage_us: float = STAGE_US,
    position: float = 0.0,
) -> float:
    """A decode step with ours, at ``position``, among ``sessions`` others, which are computed together, and
    the frame's way through the agent."""
    step = stage_us + speed.step(sessions + 1, position)
    return step if percentile is Percentile.P50 else step + max(0.0, speed.decode_p99 - speed.decode)


def queue_us(speed: StageSpeed, sessions: int) -> float:
    """Waiting for a step of others to end."""
    return BUSY_WAIT * speed.step(sessions) if sessions else 0.0


def hop_us(link: LinkEstimate | None, apart_s: float | None, percentile: Percentile) -> float:
    """One way: half the round trip as measured, else by coordinates (``apart_s``, a round trip), else
    a guess; and what losses cost a stream."""
    if link is None:
        return (UNKNOWN_RTT_US if apart_s is None else apart_s * 1e6) / 2
    rtt = (link.rtt_p50 if percentile is Percentile.P50 else link.rtt_p99) / 1000
    return _way_us(rtt, link.loss_out)


def _way_us(rtt_us: _Number, loss: _Number) -> _Number:
    return rtt_us / 2 + loss * (RETRANSMIT_US + rtt_us)


def transfer_us(link: LinkEstimate | None, size: int) -> float:
    """``size`` bytes over the bandwidth of that direction."""
    bits_s = link.bandwidth_out_p50 if link and link.bandwidth_out_p50 > 0 else UNKNOWN_BITS_S
    return _bits_us(size, bits_s)


def _bits_us(size: int, bits_s: _Number) -> _Number:
    return size * 8 / bits_s * 1e6


def battery_left_s(node: Node) -> float:
    """How long the battery lasts at what is drawn now; ``inf`` if nothing limits it."""
    battery = node.capabilities.battery
    if battery is None or battery.charging or not battery.power_w > 0:
        return float("inf")
    return max(0.0, battery.energy_wh * 3600 / battery.power_w)


def hazard_per_s(node: Node, now_s: float = 0.0) -> float:
    """Expected losses of a node per second: those seen over the time that it was watched, with one loss in
    ``HAZARD_PRIOR_S`` to begin with; and a battery that runs dry."""
    watched = max(0.0, now_s - node.known_since_s) if node.known_since_s else 0.0
    hazard = (1 + node.losses) / (HAZARD_PRIOR_S + watched)
    left_s = battery_left_s(node)
    return hazard + (1 / max(left_s, 1.0) if left_s < RUNNING_DRY_S else 0.0)


def risk_us(hazard: _Number, step_us: _Number, recovery_us: float = RECOVERY_US) -> _Number:
    """The chance that a node of this ``hazard_per_s`` is lost during a step, times what that would cost."""
    return hazard * (recovery_us / 1e6) * step_us


def battery_us(node: Node, step_us: float, mission_us: float) -> float:
    """Joules left against joules needed for the mission: a node that has but half of them counts half a
    step more."""
    left_s = battery_left_s(node)
    return step_us * max(0.0, 1 - left_s * 1e6 / mission_us) if mission_us > 0 else 0.0


def apart_s(a: Node, b: Node) -> float | None:
    """Round trip by network coordinates, seconds."""
    if a.coordinate is None or b.coordinate is None:
        return None
    return max(0.0, a.coordinate.rtt_to(b.coordinate))


def link_between(a: Node, b: Node) -> LinkEstimate | None:
    """What is known of the direction from ``a`` to ``b``: its own measurement, else b's turned around."""
    own = a.links.get(b.id)
    if own is not None:
        return own
    back = b.links.get(a.id)
    if back is None:
        return None
    return LinkEstimate(
        rtt_p50=back.rtt_p50,
        rtt_p99=back.rtt_p99,
        jitter=back.jitter,
        loss_out=back.loss_in,
        loss_in=back.loss_out,
        bandwidth_out_p50=back.bandwidth_in_p50,
        bandwidth_in_p50=back.bandwidth_out_p50,
    )


def ways_us(
    before: Sequence[Node], after: Sequence[Node], size: int, percentile: Percentile
) -> tuple[Floats, Floats]:
    """``way_us`` from each of ``before`` to each of ``after``, two matrices: all pairs by coordinates, then those that
    were measured."""
    shape = (len(before), len(after))
    latency = np.full(shape, hop_us(None, None, percentile))
    transfer = np.full(shape, transfer_us(None, size))
    rows = [i for i, n in enumerate(before) if n.coordinate is not None]
    columns = [k for k, n in enumerate(after) if n.coordinate is not None]
    if rows and columns:
        latency[np.ix_(rows, columns)] = _apart_us([before[i] for i in rows], [after[k] for k in columns]) / 2
    where, rtt_us, loss, bits_s = _measured(before, after, percentile)
    latency[where] = _way_us(rtt_us, loss)
    transfer[where] = _bits_us(size, bits_s)
    columns_of = _places(after)
    for row, node in enumerate(before):
        for column in columns_of.get(node.id, ()):
            latency[row, column] = transfer[row, column] = 0.0
    return latency, transfer


def _measured(
    before: Sequence[Node], after: Sequence[Node], percentile: Percentile
) -> tuple[tuple[Places, Places], Floats, Floats, Floats]:
    """``link_between`` of every pair of which something was measured: rows and columns, round trips in microseconds,
    shares lost, bits a second."""
    rows_of, columns_of = _places(before), _places(after)
    median = percentile is Percentile.P50
    found: list[tuple[float, ...]] = []
    for row, node in enumerate(before):
        for peer in node.links.keys() & columns_of.keys():
            link = node.links[peer]
            rtt = link.rtt_p50 if median else link.rtt_p99
            found += [(row, k, rtt, link.loss_out, link.bandwidth_out_p50) for k in columns_of[peer]]
    for column, node in enumerate(after):
        for peer in node.links.keys() & rows_of.keys():
            if node.id in before[rows_of[peer][0]].links:
                continue  # its own measurement counts
            link = node.links[peer]
            rtt = link.rtt_p50 if median else link.rtt_p99
            found += [(i, column, rtt, link.loss_in, link.bandwidth_in_p50) for i in rows_of[peer]]
    rows, columns, rtts, loss, rates = np.array(found, dtype=np.float64).reshape(-1, 5).T
    where = rows.astype(np.intp), columns.astype(np.intp)
    return where, rtts / 1000, loss, np.where(rates > 0, rates, UNKNOWN_BITS_S)


def _places(nodes: Sequence[Node]) -> dict[NodeId, list[int]]:
    found: dict[NodeId, list[int]] = {}
    for i, node in enumerate(nodes):
        found.setdefault(node.id, []).append(i)
    return found


def _apart_us(before: Sequence[Node], after: Sequence[Node]) -> Floats:
    """``Coordinate.rtt_to`` of every pair, microseconds."""
    sides = []
    for nodes in (before, after):
        places = [n.coordinate for n in nodes if n.coordinate is not None]
        sides.append(
            (
                np.array([p.vector for p in places]),
                np.array([p.height for p in places]),
                np.array([p.adjustment for p in places]),
            )
        )
    (va, ha, aa), (vb, hb, ab) = sides
    raw = np.sqrt(((va[:, None, :] - vb[None, :, :]) ** 2).sum(axis=2)) + ha[:, None] + hb[None, :]
    adjusted = raw + aa[:, None] + ab[None, :]
    result: Floats = np.maximum(0.0, np.where(adjusted > 0, adjusted, raw)) * 1e6
    return result


def way_us(a: Node, b: Node, size: int, percentile: Percentile) -> tuple[float, float]:
    """Latency and transfer from ``a`` to ``b``; nothing within a node."""
    if a.id == b.id:
        return 0.0, 0.0
    link = link_between(a, b)
    apart = apart_s(a, b) if link is None else None
    return hop_us(link, apart, percentile), transfer_us(link, size)
