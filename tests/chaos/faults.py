"""What breaks, and how it is mended."""

from __future__ import annotations

import signal
import time

from tests.chaos.ballast import anonymous_bytes, settle
from tests.chaos.fleet import PORT, Fleet

KINDS = ("kill", "freeze", "cut", "partition")
NEED_A_LAN = ("cut", "partition")
VICTIMS = ("first", "middle", "last", "two", "ingress")


def victims(fleet: Fleet, ingress: str, session: str, victim: str) -> list[str]:
    """Names of the agents to break: of the route that the session is on now."""
    if victim == "ingress":
        return [ingress]
    stages = fleet.session(ingress, session)["stages"]
    last = len(stages) - 1
    places = {"first": [0], "middle": [last // 2], "last": [last], "two": [0, (last + 1) // 2]}[victim]
    return [fleet.by_node(stages[i]["node"]) for i in places]


def break_(fleet: Fleet, kind: str, names: list[str]) -> float:
    """Break agents; the instant when it was done."""
    left = sum(anonymous_bytes(fleet.agents[name].process.pid) for name in names) if kind == "kill" else 0
    for name in names:
        agent = fleet.agents[name]
        match kind:
            case "kill":
                agent.process.kill()
            case "freeze":
                agent.sends(signal.SIGSTOP)
            case "partition":
                assert fleet.lan is not None
                fleet.lan.cut(fleet.place(name))
            case "cut":
                assert fleet.lan is not None
                fleet.lan.reset_streams(fleet.place(name), int(PORT))
    fleet.ballast.hold(left)
    return time.monotonic()


def mend(fleet: Fleet, kind: str, names: list[str]) -> None:
    """Bring them back, and wait until the fleet is whole."""
    fleet.ballast.free()
    for name in names:
        agent = fleet.agents[name]
        match kind:
            case "kill":
                agent.end()
                fleet.start(name)
            case "freeze":
                agent.sends(signal.SIGCONT)
            case "partition":
                assert fleet.lan is not None
                fleet.lan.heal(fleet.place(name))
    fleet.wait_whole()
    if kind == "kill":
        settle()
