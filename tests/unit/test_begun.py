import asyncio

import pytest

from mesh.adapters.begun import Begun


def test_the_first_step_is_taken_at_once_and_the_rest_when_it_is_awaited() -> None:
    async def scene() -> None:
        seen: list[str] = []
        gate = asyncio.get_running_loop().create_future()

        async def writes() -> None:
            seen.append("began")
            await gate
            seen.append("went on")
            await asyncio.sleep(0)
            seen.append("ended")

        begun = Begun(writes())
        assert seen == ["began"]
        asyncio.get_running_loop().call_later(0.01, gate.set_result, None)
        await begun
        assert seen == ["began", "went on", "ended"]

    asyncio.run(scene())


def test_what_needs_no_waiting_is_over_at_once() -> None:
    async def scene() -> None:
        async def writes() -> None:
            pass

        await Begun(writes())

    asyncio.run(scene())


def test_an_error_is_raised_where_it_is_awaited() -> None:
    async def scene() -> None:
        async def breaks(first: bool) -> None:
            if not first:
                await asyncio.sleep(0)
            raise OSError("the stream is gone")

        for first in (True, False):
            begun = Begun(breaks(first))
            with pytest.raises(OSError, match="the stream is gone"):
                await begun

    asyncio.run(scene())


def test_cancelling_the_waiter_ends_it() -> None:
    async def scene() -> None:
        ended: list[str] = []

        async def writes() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended.append("ended")

        begun = Begun(writes())

        async def wait() -> None:
            await begun

        waiter = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert ended == ["ended"]

    asyncio.run(scene())


def test_it_can_be_given_up_before_anybody_waits() -> None:
    async def scene() -> None:
        ended: list[str] = []

        async def writes() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended.append("ended")

        Begun(writes()).close()
        assert ended == ["ended"]

    asyncio.run(scene())
