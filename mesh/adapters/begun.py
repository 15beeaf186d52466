"""A coroutine that runs without a task: its first step is taken now, each further one by what it waits for.

A task takes its first step at the loop's next turn, and whoever awaits it goes on another turn after its last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Begun:
    """For a coroutine that needs no current task (no ``asyncio.timeout``) and waits for futures or a turn of the loop."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, None], then: Callable[[BaseException | None], None]
    ) -> None:
        """``then`` is called with how it ended, unless it ends before it waits for anything."""
        self._coroutine = coroutine
        self._waits_for: Any = None
        self._then: Callable[[BaseException | None], None] | None = None
        self.over = False
        self.error: BaseException | None = None
        self._step()
        self._then = then

    def _step(self, _: Any = None) -> None:
        try:
            self._waits_for = self._coroutine.send(None)
        except StopIteration:
            self._end(None)
        except (Exception, asyncio.CancelledError) as error:
            self._end(error)
        else:
            if self._waits_for is None:
                asyncio.get_running_loop().call_soon(self._step)
            else:
                self._waits_for._asyncio_future_blocking = False  # as a task says that it has seen it
                self._waits_for.add_done_callback(self._step)

    def _end(self, error: BaseException | None) -> None:
        self.over, self.error = True, error
        if self._then is not None:
            self._then(error)

    def close(self) -> None:
        """Give it up; nobody is told."""
        self._then = None
        if self._waits_for is not None:
            self._waits_for.remove_done_callback(self._step)
        self._coroutine.close()
