"""What must hold at any time and at the end of a run, whatever happened to the nodes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mesh.types import Term
from scheduler.plan import Plan
from simulations.virtual_time import Power

if TYPE_CHECKING:
    from simulations.node import SimNode
    from simulations.world import World

_MIB = 1 << 20
_MINUTE_NS = 60_000_000_000


def check_node(world: World, node: SimNode) -> None:
    """No replica promises more than it has, no node holds more than its memory, no plan wants more than there is."""
    name, held = node.spec.name, 0
    for replica in node.host.replicas.values():
        book = replica.book
        held += book.shard.weight_bytes + book.kv_budget_bytes
        if not 0 <= book.reserved_bytes <= book.kv_budget_bytes:
            world.violated(f"{name} reserved {book.reserved_bytes} of {book.kv_budget_bytes} bytes")
    if held > node.config.memory * _MIB:
        world.violated(f"{name} holds {held // _MIB} MiB, and has {node.config.memory}")
    for plan in node.control.answers.values():
        if isinstance(plan, Plan):
            _check_plan(world, plan)


def _check_plan(world: World, plan: Plan) -> None:
    wanted: dict[str, int] = {}
    for stage in plan.stages:
        wanted[stage.node] = wanted.get(stage.node, 0) + stage.memory_bytes
    for name, size in wanted.items():
        memory = world.specs[name].config.memory
        if size > memory * _MIB:
            world.violated(f"a plan wants {size // _MIB} MiB of {name}, which has {memory}")


class TermChecks:
    """Plans of two leaders never mix, and no minute sees more loads than its leaders may begin."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loads: deque[tuple[int, Term]] = deque()
        self._latest: dict[SimNode, Term] = {}

    def latest(self, node: SimNode) -> Term | None:
        """The latest whose wishes a node has met."""
        return self._latest.get(node)

    def obeyed(self, node: SimNode, term: Term, known: Term | None) -> None:
        """A node did what the leader of a term wanted, who asked when the node knew of ``known``."""
        if known is not None and term < known:
            self._world.violated(
                f"{node.id} obeyed term {term.counter} of {term.leader} after {known.counter} of {known.leader}"
            )
        self._latest[node] = max(term, self._latest.get(node, term))

    def loaded(self, node: SimNode) -> None:
        """A node has begun to load something, for the leader that it obeys."""
        term = node.replicas.term
        if term is None:
            return
        now = self._world.loop.now_ns
        loads = self._loads
        loads.append((now, term))
        while loads[0][0] <= now - _MINUTE_NS:
            loads.popleft()
        moves = node.config.moves
        ours = sum(1 for _, t in loads if t == term)
        if ours == moves + 1:
            self._world.violated(f"{term.leader} had more than {moves} shards loaded within a minute")


def check_end(world: World) -> None:
    """Nothing is left of what ended, and once all is well everybody knows it: no ghosts, nobody suspected."""
    for node in world.nodes.values():
        check_node(world, node)
        left = node.host.stages
        if left and node.machine.power is Power.ON:
            world.violated(f"{node.spec.name} still feeds {left} sessions that ended")
    if not 0 <= world.calm_ns <= world.loop.now_ns or not world.whole():
        return
    regions: dict[str, set[str]] = {}
    for name, node in world.nodes.items():
        regions.setdefault(node.config.region, set()).add(name)
    for node in world.nodes.values():
        names = regions[node.config.region]
        seen = {n.id for n in node.view.snapshot.alive()} | {node.id}
        for what, who in (("does not see", names - seen), ("still sees", seen - names)):
            if who:
                world.violated(f"{node.spec.name} {what} {', '.join(sorted(who))}")
