"""A lease held from outside the mesh: for as long as this runs, an agent keeps a shard loaded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from mesh.errors import LeaseRefused, PeerError, Unavailable
from mesh.types import Address
from node_agent.adapters.lease_streams import LeaseStreams
from node_agent.lease import Promise, ShardKey

_AGAIN_S = 0.5
_STILL_S = 2.0


@dataclass(frozen=True, slots=True)
class LeaseOrder:
    """What to hold, where, for whom. Times in seconds."""

    address: Address
    key: ShardKey
    digest: str
    """Of the model's file, hexadecimal, or its beginning; empty: whichever the agent has."""
    promise: Promise | None
    holder: str
    patience: float
    """How long the agent may be away: it is restarted, or updated."""
    load_timeout: float
    health_host: str
    health_port: int
    """Something listens there while the shard serves, and only then; 0: nothing does."""


class LeaseHolder:
    """Holds one lease; ``say`` gets a line at every change."""

    def __init__(self, order: LeaseOrder, streams: LeaseStreams, say: Callable[[str], None]) -> None:
        self._order, self._streams, self._say = order, streams, say
        self._what = f"{order.key.model}:{order.key.start}-{order.key.end}"
        self._serves = False
        self._since = time.monotonic()
        self._health: asyncio.Server | None = None

    async def run(self) -> None:
        """Until cancelled. Raises ``LeaseRefused`` where the agent cannot hold it or is too slow to load it, and
        ``Unavailable`` once no agent was there for ``patience``."""
        self._say(f"asking the agent at {self._order.address} for {self._what}")
        teller = asyncio.create_task(self._tell_of_loading(), name="tell of loading")
        try:
            await self._keep()
        finally:
            teller.cancel()
            await self._listen(False)
            self._say(f"let go of {self._what}")

    async def _keep(self) -> None:
        order, seen = self._order, time.monotonic()
        while True:
            try:
                async with contextlib.aclosing(self._stream()) as states:
                    while True:
                        left = None if self._serves else self._since + order.load_timeout - time.monotonic()
                        serves = await asyncio.wait_for(anext(states), left)
                        seen = time.monotonic()
                        await self._changed(serves)
            except StopAsyncIteration:
                reason = "it stops, or unloads the shard"
            except TimeoutError:
                raise LeaseRefused(f"{self._what} was not loaded within {order.load_timeout:g} s") from None
            except PeerError as error:
                reason = str(error)
            await self._changed(False)
            if time.monotonic() - seen > order.patience:
                raise Unavailable(f"no agent at {order.address} for {order.patience:g} s: {reason}")
            self._say(f"the agent at {order.address} is away ({reason}); asking again")
            await asyncio.sleep(_AGAIN_S)

    def _stream(self) -> AsyncGenerator[bool, None]:
        order = self._order
        return self._streams.keep(order.address, order.key, order.promise, order.holder, order.digest)

    async def _changed(self, serves: bool) -> None:
        if serves == self._serves:
            return
        took, self._since, self._serves = time.monotonic() - self._since, time.monotonic(), serves
        self._say(f"{self._what} serves, after {took:.1f} s" if serves else f"{self._what} serves no more")
        await self._listen(serves)

    async def _tell_of_loading(self) -> None:
        while True:
            await asyncio.sleep(_STILL_S)
            if not self._serves:
                self._say(f"{self._what} is loading, {time.monotonic() - self._since:.0f} s so far")

    async def _listen(self, serves: bool) -> None:
        order = self._order
        if serves and order.health_port:
            self._health = await asyncio.start_server(
                lambda _, writer: writer.close(), order.health_host, order.health_port
            )
        elif self._health is not None:
            self._health.close()
            self._health = None
