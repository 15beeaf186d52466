"""Membership machines over a virtual network: time, loss and partitions are values."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mesh.gossip import Fact, MemberState
from mesh.membership import Membership
from mesh.membership_events import (
    Changed,
    Effect,
    Event,
    Found,
    Leave,
    PingStream,
    Received,
    Send,
    StreamAnswered,
    Sync,
    Synced,
    SyncReceived,
    Tick,
    TwinSeen,
)
from mesh.profiles import LAN, Profile
from mesh.types import Address, NodeId

MS = 1_000_000
S = 1_000_000_000


@dataclass
class Change:
    """Somebody changed its mind about a member."""

    at: int
    observer: NodeId
    member: NodeId
    state: MemberState | None
    reason: str


class VirtualNetwork:
    """Nodes ``n0`` ... at addresses of the same name. ``loss`` is per packet and direction; streams
    (syncs, stream pings) are reliable but take a round trip, and fail to who is down or cut off."""

    def __init__(
        self,
        nodes: int,
        seed: int = 0,
        profile: Profile = LAN,
        loss: float = 0.0,
        delay: tuple[int, int] = (1 * MS, 5 * MS),
        streams: bool = True,
    ) -> None:
        self.now = 0
        self.rng = Random(seed)
        self.profile, self.loss, self.delay, self.streams = profile, loss, delay, streams
        self.machines: dict[Address, Membership] = {}
        self.down: set[Address] = set()
        self.frozen: dict[Address, list[Event]] = {}
        self.cut: Callable[[Address, Address], bool] = lambda a, b: False
        self.changes: list[Change] = []
        self.twins: list[tuple[Address, TwinSeen]] = []
        self.packets = 0
        self._heap: list[tuple[int, int, Address, Event | None]] = []
        self._order = 0
        self._ticks: dict[Address, int] = {}
        for i in range(nodes):
            self.start(f"n{i}")

    def start(self, name: str, node: str = "", instance: int = 0, region: str = "") -> Membership:
        """Boot a node; it knows nobody until ``meet``."""
        address = Address(name)
        me = Fact(NodeId(node or name), address, instance or 1_000 + self.now // MS, region=region)
        machine = Membership(me, self.profile, Random(self.rng.randrange(1 << 30)), self.now)
        self.machines[address] = machine
        self.down.discard(address)
        self._arm(address)
        return machine

    def meet(self, seed: str = "n0") -> None:
        """Everybody is told of one agent."""
        for address in list(self.machines):
            if address != seed:
                self.give(address, Found(Address(seed), "static"))

    def knit(self) -> None:
        """Everybody knows everybody, at once: the start of long runs."""
        facts = tuple(m.me for m in self.machines.values())
        for machine in self.machines.values():
            machine.handle(SyncReceived(facts[0], facts), self.now)
            machine._rumours._kept.clear()
        self.changes.clear()

    def kill(self, name: str) -> None:
        """kill -9."""
        self.down.add(Address(name))

    def leave(self, name: str) -> None:
        self.give(Address(name), Leave())
        self.down.add(Address(name))

    def freeze(self, name: str) -> None:
        """SIGSTOP: packets wait in its socket."""
        self.frozen[Address(name)] = []

    def thaw(self, name: str) -> None:
        """SIGCONT: what waited is read, then timers fire late."""
        for event in self.frozen.pop(Address(name)):
            self.give(Address(name), event)
        self._arm(Address(name))

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        until = self.now + int(seconds * S)
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, address, event = heapq.heappop(heap)
            if address in self.down:
                continue
            if address in self.frozen:
                if event is not None:
                    self.frozen[address].append(event)
                continue
            if event is None:
                if self._ticks.get(address) == self.now:
                    del self._ticks[address]
                    self.give(address, Tick())
            else:
                self.give(address, event)
        self.now = until

    def give(self, address: Address, event: Event) -> None:
        """Hand an event to a machine and carry out what it asks for."""
        machine = self.machines[address]
        for effect in machine.handle(event, self.now):
            self._carry_out(address, machine, effect)
        self._arm(address)

    def _arm(self, address: Address) -> None:
        due = self.machines[address].next_deadline()
        if due is None:
            return
        due = max(due, self.now)
        armed = self._ticks.get(address)
        if armed is None or due < armed or armed < self.now:
            self._ticks[address] = due
            self._push(due, address, None)

    def _push(self, due: int, address: Address, event: Event | None) -> None:
        self._order += 1
        heapq.heappush(self._heap, (due, self._order, address, event))

    def _lost(self) -> bool:
        return self.loss > 0 and self.rng.random() < self.loss

    def _transit(self) -> int:
        low, high = self.delay
        return low + int((high - low) * self.rng.random())

    def _carry_out(self, address: Address, machine: Membership, effect: Effect) -> None:
        match effect:
            case Send(target, packet):
                self.packets += 1
                if target in self.machines and not self._lost() and not self.cut(address, target):
                    due = self.now + self._transit()
                    self._push(due, target, Received(packet, address, due))
            case Changed(node):
                member = machine.members.get(node)
                state = member.fact.state if member else None
                reason = member.reason if member else ""
                self.changes.append(Change(self.now, machine.me.node, node, state, reason))
            case Sync(target):
                self._sync(address, machine, target)
            case PingStream(target, _, seq):
                if self.streams and self._up(address, target) and target not in self.frozen:
                    due = self.now + 2 * self._transit()
                    self._push(due, address, StreamAnswered(seq, self.machines[target].me))
            case TwinSeen():
                self.twins.append((address, effect))

    def _up(self, address: Address, target: Address) -> bool:
        return target in self.machines and target not in self.down and not self.cut(address, target)

    def _sync(self, address: Address, machine: Membership, target: Address) -> None:
        due = self.now + 2 * self._transit()
        if not self._up(address, target) or target in self.frozen:
            self._push(due, address, Synced(target, error="no answer"))
            return
        other = self.machines[target]
        answer = Synced(target, other.me, other.facts(), other.summaries())
        self._push(due - 1, target, SyncReceived(machine.me, machine.facts(), machine.summaries()))
        self._push(due, address, answer)

    # -- what is asked of it -------------------------------------------------------------------

    def state(self, observer: str, member: str) -> MemberState | None:
        found = self.machines[Address(observer)].members.get(NodeId(member))
        return found.fact.state if found else None

    def states(self, member: str) -> set[MemberState | None]:
        """What the running others hold of ``member``."""
        return {
            self.state(a, member)
            for a in self.machines
            if a != member and a not in self.down and a not in self.frozen
        }

    def until(self, what: Callable[[], bool], limit_s: float, step_s: float = 0.02) -> float:
        """Seconds until ``what`` holds; raises ``AssertionError`` at the limit."""
        begin = self.now
        while not what():
            if self.now - begin > limit_s * S:
                raise AssertionError(f"not within {limit_s} s of virtual time")
            self.run(step_s)
        return (self.now - begin) / S
