"""Follows Nomad while this agent leads: its clients, allocations and deployments. The event stream, from the last index on;
blocking queries where there is none. Nomad's absence changes nothing: what was known last stays."""

from __future__ import annotations

import logging
import random
import threading
from typing import Any

from mesh.errors import InputError, MeshError
from node_agent.adapters.nomad_api import NomadAccess, NomadApi
from scheduler.nomad_view import NomadFacts, NomadView

log = logging.getLogger(__name__)

_WAIT_S = 15
"""For news of clients; how old allocations and deployments may be without a stream."""
_AGAIN_S, _AGAIN_MAX_S = 1.0, 60.0


class NomadFollower:
    """A thread of its own: python-nomad and its session block."""

    def __init__(self, access: NomadAccess) -> None:
        self._access = access
        self._facts = NomadFacts()
        self._refused = ""
        """Why we may not see jobs, as it was logged last."""
        self._stop: threading.Event | None = None

    def facts(self) -> NomadFacts:
        """As Nomad said last; nothing while we do not follow."""
        return self._facts

    def follow(self, on: bool) -> None:
        """Begin, or end within the seconds that Nomad leaves between two lines."""
        if on and self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), name="follow nomad", daemon=True).start()
        elif not on and self._stop is not None:
            self._stop.set()
            self._stop, self._facts = None, NomadFacts()

    def _run(self, stop: threading.Event) -> None:
        api, view, wait_s = NomadApi(self._access), NomadView(), _AGAIN_S
        streams = True
        try:
            while not stop.is_set():
                try:
                    self._list(api, view, stop)
                    wait_s = _AGAIN_S
                    if streams:
                        self._stream(api, view, stop)
                    else:
                        self._poll(api, view, stop)
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

    def _list(
        self, api: NomadApi, view: NomadView, stop: threading.Event, index: int = 0, wait_s: int = 0
    ) -> None:
        # Clients first: the stream goes on from their index, and what it repeats of the others does no harm.
        clients, index = api.nodes(index, wait_s)
        view.replace(index, clients, *self._work(api))
        self._tell(view, stop)

    def _work(self, api: NomadApi) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        try:
            return api.work()
        except InputError as error:
            # A token may have a right to clients and none to jobs. Clients are what is decided by.
            if str(error) != self._refused:
                log.info("no allocations and deployments of Nomad (%s)", error)
            self._refused = str(error)
            return [], []

    def _stream(self, api: NomadApi, view: NomadView, stop: threading.Event) -> None:
        for index, events in api.events(view.index + 1):
            if stop.is_set():
                return
            if not view.apply(index, events):
                log.info("Nomad's index went back from %d to %d: listing everything anew", view.index, index)
                return
            self._tell(view, stop)

    def _poll(self, api: NomadApi, view: NomadView, stop: threading.Event) -> None:
        while not stop.is_set():
            self._list(api, view, stop, view.index, _WAIT_S)
            stop.wait(_AGAIN_S)

    def _tell(self, view: NomadView, stop: threading.Event) -> None:
        facts, before = view.facts(), self._facts
        if stop.is_set():
            return
        for name in facts.avoid.keys() - before.avoid.keys():
            log.info("%s: %s", name, facts.avoid[name])
        known = {r.id: r.status for r in before.rollouts}
        for rollout in facts.rollouts:
            if known.get(rollout.id) != rollout.status:
                log.info("%s: version %d: %s", rollout.job, rollout.version, rollout.said)
        self._facts = facts
