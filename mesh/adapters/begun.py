"""Taking the first step of a coroutine now, where a task would take it at the loop's next turn."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class Begun:
    """A coroutine that has begun; who awaits it, once, goes on with it. What its first step raises is raised there.

    For a coroutine that needs no current task before it first waits (no ``asyncio.timeout``).
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._waits_for: Any = None
        self._error: BaseException | None = None
        self._over = False
        try:
            self._waits_for = coroutine.send(None)
        except StopIteration:
            self._over = True
        except Exception as error:
            self._error = error

    def __await__(self) -> Generator[Any, Any, None]:
        if self._error is not None:
            raise self._error
        if self._over:
            return
        try:
            yield self._waits_for
        except asyncio.CancelledError:
            self._coroutine.close()
            raise
        yield from self._coroutine.__await__()

    def close(self) -> None:
        """Give it up."""
        self._coroutine.close()
