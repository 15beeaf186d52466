"""Follows Nomad's clients while this agent leads: the event stream, from the last index on; blocking queries where there
is none. Nomad's absence changes nothing: what was known last stays."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping

from mesh.errors import InputError, MeshError
from node_agent.adapters.nomad_api import NomadAccess, NomadApi
from scheduler.nomad_nodes import NomadNodes

log = logging.getLogger(__name__)

_WAIT_S = 60
_AGAIN_S, _AGAIN_MAX_S = 1.0, 60.0


class NomadFollower:
    """A thread of its own: python-nomad and its session block."""

    def __init__(self, access: NomadAccess) -> None:
        self._access = access
        self._avoid: Mapping[str, str] = {}
        self._stop: threading.Event | None = None

    def avoid(self) -> Mapping[str, str]:
        """Clients by name that are to get nothing new, and why."""
        return self._avoid

    def follow(self, on: bool) -> None:
        """Begin, or end within the seconds that Nomad leaves between two lines."""
        if on and self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), name="follow nomad", daemon=True).start()
        elif not on and self._stop is not None:
            self._stop.set()
            self._stop, self._avoid = None, {}

    def _run(self, stop: threading.Event) -> None:
        api, nodes, wait_s = NomadApi(self._access), NomadNodes(), _AGAIN_S
        streams = True
        try:
            while not stop.is_set():
                try:
                    self._list(api, nodes, stop)
                    wait_s = _AGAIN_S
                    if streams:
                        self._stream(api, nodes, stop)
                    else:
                        self._poll(api, nodes, stop)
                except InputError as error:
                    # No such endpoint, or no right to it: queries that block need less.
                    log.info(
                        "no event stream of Nomad (%s)%s", error, ": asking it instead" if streams else ""
                    )
                    streams, wait_s = False, min(_AGAIN_MAX_S, 2 * wait_s)
                except MeshError as error:
                    log.warning("%s; placing goes on by what it said last", error)
                    wait_s = min(_AGAIN_MAX_S, 2 * wait_s)
                # Many agents must not come back at the same moment.
                stop.wait(wait_s * (0.5 + random.random()))
        finally:
            api.close()

    def _list(self, api: NomadApi, nodes: NomadNodes, stop: threading.Event) -> None:
        nodes.replace(*api.nodes())
        self._tell(nodes, stop)

    def _stream(self, api: NomadApi, nodes: NomadNodes, stop: threading.Event) -> None:
        for index, events in api.events(nodes.index + 1):
            if stop.is_set():
                return
            if not nodes.apply(index, events):
                log.info(
                    "Nomad's index went back from %d to %d: listing its clients anew", nodes.index, index
                )
                return
            self._tell(nodes, stop)

    def _poll(self, api: NomadApi, nodes: NomadNodes, stop: threading.Event) -> None:
        while not stop.is_set():
            listed, index = api.wait_for_nodes(nodes.index, _WAIT_S)
            nodes.replace(listed, index)
            self._tell(nodes, stop)

    def _tell(self, nodes: NomadNodes, stop: threading.Event) -> None:
        avoid = nodes.avoid()
        if stop.is_set() or avoid == self._avoid:
            return
        for name in avoid.keys() - self._avoid.keys():
            log.info("%s: %s", name, avoid[name])
        self._avoid = avoid
