"""A coroutine that is driven by what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mesh.adapters.begun import Begun


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_first_step_is_taken_at_once_and_the_rest_as_what_it_waits_for_comes() -> None:
    async def scene() -> None:
        seen: list[str] = []
        gate = asyncio.get_running_loop().create_future()

        async def writes() -> None:
            seen.append("began")
            await gate
            seen.append("went on")
            await asyncio.sleep(0)
            seen.append("ended")

        begun = Begun(writes(), lambda error: seen.append(f"over: {error}"))
        assert seen == ["began"]
        assert not begun.over
        gate.set_result(None)
        await turns()
        assert seen == ["began", "went on", "ended", "over: None"]
        assert begun.over

    asyncio.run(scene())


def test_what_needs_no_waiting_is_over_at_once_and_tells_nobody() -> None:
    async def scene() -> None:
        async def writes(broken: bool) -> None:
            if broken:
                raise OSError("the stream is gone")

        told: list[BaseException | None] = []
        for broken in (False, True):
            begun = Begun(writes(broken), told.append)
            assert begun.over
            assert (begun.error is not None) is broken
        await turns()
        assert told == []

    asyncio.run(scene())


def _breaks(gate: asyncio.Future[None]) -> None:
    gate.set_exception(OSError("the stream is gone"))


def _is_cancelled(gate: asyncio.Future[None]) -> None:
    gate.cancel()


@pytest.mark.parametrize(("how", "kind"), [(_breaks, OSError), (_is_cancelled, asyncio.CancelledError)])
def test_an_error_that_comes_later_is_told(
    how: Callable[[asyncio.Future[None]], None], kind: type[BaseException]
) -> None:
    async def scene() -> None:
        gate = asyncio.get_running_loop().create_future()

        async def writes() -> None:
            await gate

        told: list[BaseException | None] = []
        Begun(writes(), told.append)
        how(gate)
        await turns()
        assert [type(e) for e in told] == [kind]

    asyncio.run(scene())


def test_it_can_be_given_up() -> None:
    async def scene() -> None:
        seen: list[str] = []
        gate = asyncio.get_running_loop().create_future()

        async def writes() -> None:
            try:
                await gate
            finally:
                seen.append("ended")

        Begun(writes(), lambda error: seen.append("told")).close()
        assert seen == ["ended"]
        gate.set_result(None)
        await turns()
        assert seen == ["ended"]

    asyncio.run(scene())
