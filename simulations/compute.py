"""Modelled computation: how long a run takes is taken from measurements, what it gives depends on everything before.

A modelled shard computes no layers. It keeps a checksum over everything that it was fed, and adds it to what passes
through, once for each of its layers with that layer's weight: so one frame lost, doubled, out of order or of an old
epoch shows in every later token, and however the layers are cut, an undisturbed run gives the same tokens: those that
``expected`` says.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh.types import LayerRange, ShardInfo
from scheduler.speed import StageSpeed
from simulations.virtual_time import MachineClock, VirtualLoop

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NOTHING = 0
_BITS = 0xFFFFFFFF
_WARM_NS = 200_000
"""A step that begins this soon after another one finds its weights in the cache."""


def link(before: int, value: int) -> int:
    """The next of a chain of checksums."""
    return zlib.crc32(b"%d,%d" % (before, value))


def weight(layers: LayerRange) -> int:
    """Of these layers together."""
    return sum(zlib.crc32(b"layer %d" % i) | 1 for i in range(layers.start, layers.end)) & _BITS


def token_of(total: int, vocabulary: int) -> int:
    """The token that a last shard samples; never 0, which ends texts."""
    return link(_NOTHING, total) % (vocabulary - 2) + 1


def expected(prompt: Sequence[int], tokens: int, layers: int, vocabulary: int) -> list[int]:
    """The text that a prompt gets."""
    history, out = list(prompt), list[int]()
    whole, chain, at = weight(LayerRange(0, layers)), _NOTHING, 0
    while len(out) < tokens:
        for value in history[at:]:
            chain = link(chain, value)
        at = len(history)
        out.append(token_of(whole * chain & _BITS, vocabulary))
        history.append(out[-1])
    return out


class ModelledRuntime:
    """``node_agent.ports.Runtime``; ``took_us`` is what the last run would have taken."""

    provider, batch, batch_exact = "modelled", 64, True

    def __init__(self, info: ShardInfo, slots: int, capacity: int, speed: StageSpeed) -> None:
        self.info, self.slots, self.capacity, self.speed = info, slots, capacity, speed
        self.took_us = 0.0
        self.stepped = False
        """Whether the last run was a decode step."""
        self._weight = weight(info.layers)
        self._chains: list[list[int]] = [[] for _ in range(slots)]

    def decode(self, slot: int, positions: Sequence[int], inputs: Any, logits: bool = True) -> NDArray[Any]:
        self.took_us, self.stepped = self.speed.step(len(positions), max(positions)), True
        values = []
        for i, position in enumerate(positions):
            row_is_read = len(self._chains[slot + i]) >= position
            values.append(
                self._step(slot + i, position, *self._read(inputs[i])) if row_is_read else (_NOTHING, 0)
            )
        return self._written(values)

    def prefill(self, slot: int, position: int, inputs: Any, logits: int = 1) -> NDArray[Any]:
        self.took_us, self.stepped = self.speed.chunk(len(inputs), position), False
        values = [self._step(slot, position + i, *self._read(row)) for i, row in enumerate(inputs)]
        return self._written(values[len(values) - logits :] if self.info.last else values)

    def prepare(self) -> None:
        pass

    def hold_to_steps(self, inputs: Any) -> bool:
        return True

    def replay(self, slot: int, position: int, inputs: Any) -> NDArray[Any]:
        return self.prefill(slot, position, inputs, 0)  # in the time of a chunk, as LiteRT does it

    def _step(self, slot: int, position: int, value: int, total: int) -> tuple[int, int]:
        """The token of the position, which goes through all shards, and the sum so far."""
        chain = self._chains[slot]
        if len(chain) < position:
            raise AssertionError(f"position {position} came after {len(chain)}")
        del chain[position:]
        chain.append(link(chain[-1] if chain else _NOTHING, value))
        return value, (total + self._weight * chain[-1]) & _BITS

    def _read(self, row: Any) -> tuple[int, int]:
        return (int(row), 0) if self.info.first else (int(row[0]), (int(row[1]) << 16) | int(row[2]))

    def _written(self, values: list[tuple[int, int]]) -> NDArray[np.float32]:
        shape = self.info.model
        if self.info.last:
            out = np.zeros((len(values), shape.vocabulary), dtype=np.float32)
            out[range(len(values)), [token_of(v, shape.vocabulary) for _, v in values]] = 1.0
            return out
        out = np.zeros((len(values), shape.width), dtype=np.float32)
        out[:, :3] = [(token, v >> 16, v & 0xFFFF) for token, v in values]
        return out

    def copy(self, source: int, target: int, positions: int) -> None:
        if len(self._chains[source]) < positions:
            raise AssertionError(f"{positions} positions of {len(self._chains[source])} were to be copied")
        self._chains[target] = self._chains[source][:positions]

    def settle(self) -> None:
        """Nothing is left for later."""

    def release(self, slot: int) -> None:
        if self._chains:  # a run that ends after the close gives its slots back as well
            self._chains[slot] = []

    def close(self) -> None:
        self._chains.clear()


class ModelledCompute:
    """``node_agent.adapters.compute.Compute``: done after as long as the runtime says, times what slows the node down."""

    inline = False

    def __init__(
        self,
        loop: VirtualLoop,
        clock: MachineClock,
        runtime: ModelledRuntime,
        again: float,
        slowness: Callable[[], float],
        computed: Callable[[int], None],
    ) -> None:
        self._loop, self._clock, self._runtime = loop, clock, runtime
        self._again, self._slowness, self._computed = again, slowness, computed
        self._until_ns = 0

    def submit(self, work: Callable[[], Any], done: Callable[[Any, int, int], None]) -> None:
        started = self._clock.monotonic_ns()
        outcome = work()
        warm = self._loop.now_ns - self._until_ns <= _WARM_NS and self._runtime.stepped
        share = self._again if warm else 1.0
        took_ns = int(self._runtime.took_us * share * self._slowness() * 1000)
        self._computed(took_ns)
        self._until_ns = self._loop.now_ns + took_ns
        self._loop.at_ns(self._loop.now_ns + took_ns, done, outcome, started, started + took_ns)

    async def close(self, last: Callable[[], None]) -> None:
        await asyncio.sleep(max(0, self._until_ns - self._loop.now_ns) / 1e9)
        last()
