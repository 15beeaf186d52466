"""Virtual time for asyncio: a loop that jumps to the next timer, and machines whose events can be held or dropped.

Everything that the agent runs on an event loop runs here unchanged. A callback belongs to the machine in whose
context it was made: tasks, timers and what they start inherit it. While a machine is frozen its callbacks wait,
as those of a stopped process do; when it has crashed they are gone.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")
_NS = 1_000_000_000
_END_S = 60.0


class Power(enum.Enum):
    """What a machine does with its events."""

    ON = "on"
    FROZEN = "frozen"
    OFF = "off"


class Machine:
    """One process. ``run`` puts code into its context; restarting is another machine."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name, self.power = name, Power.ON
        self._loop = loop
        self._held: list[events.Handle] = []
        self._freezes = 0
        """Reasons for which it stands still."""
        self._context = contextvars.copy_context()
        self._context.run(_MACHINE.set, self)

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """Call ``work`` as this machine: what it starts belongs to it."""
        return self._context.copy().run(work, *args)

    def post(self, when_ns: int, work: Callable[..., object], *args: Any) -> None:
        """Call ``work`` as this machine at a later time."""
        self._loop.at_ns(when_ns, work, *args, context=self._context.copy())

    def freeze(self) -> None:
        """Hold everything until ``thaw``, once for each ``freeze``."""
        self._freezes += 1
        if self.power is Power.ON:
            self.power = Power.FROZEN

    def freeze_for(self, seconds: float) -> None:
        """Stand still for a while; may be called by the machine's own code, which first ends its turn."""
        self.freeze()
        at_ns = self._loop.now_ns + int(seconds * _NS)
        self._loop.at_ns(at_ns, self.thaw, context=contextvars.Context())

    def thaw(self) -> None:
        """Go on; what waited comes first, in order."""
        self._freezes -= 1
        if self.power is Power.FROZEN and not self._freezes:
            self.power = Power.ON
            held, self._held = self._held, []
            self._loop.put_back(held)

    def crash(self) -> None:
        """Nothing of it runs again."""
        self.power = Power.OFF
        held, self._held = self._held, []
        for handle in held:
            self._loop.drop(handle)

    def hold(self, handle: events.Handle) -> None:
        """It stands still: ``handle`` runs when it goes on."""
        self._held.append(handle)


_MACHINE: contextvars.ContextVar[Machine | None] = contextvars.ContextVar("machine", default=None)


def this_machine() -> Machine | None:
    """Whose code runs; ``None``: the simulation's own."""
    return _MACHINE.get()


class _Handle(events.TimerHandle):
    """Of a callback that is due now or at a time. Made and run in vast numbers: as little as that takes."""

    __slots__ = ()
    if TYPE_CHECKING:
        _context: contextvars.Context
        _callback: Callable[..., object] | None
        _args: Any
        _cancelled: bool
        _loop: Any
        _when: float
        _repr: Any
        _scheduled: bool
        _source_traceback: Any

    def __init__(
        self, loop: VirtualLoop, when: float, callback: Any, args: Any, context: contextvars.Context | None
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop, self._when, self._callback, self._args = loop, when, callback, args
        self._cancelled = self._scheduled = False
        self._repr = self._source_traceback = None

    def _run(self) -> None:
        machine = self._context.get(_MACHINE)
        if machine is None or machine.power is Power.ON or self._loop.ending:
            super()._run()
        elif machine.power is Power.FROZEN:
            machine.hold(self)
        else:
            self._loop.drop(self)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time in whole nanoseconds; two runs that are given the same do the same."""

    _ready: deque[events.Handle]

    def __init__(self) -> None:
        super().__init__()
        self._timers: list[tuple[int, int, _Handle]] = []
        """A heap: when each is due, and which was set first."""
        self._order = 0
        self.now_ns = 0
        self.callbacks = 0
        """Handles that ran or were to run: events of the simulation."""
        self._tasks: dict[asyncio.Task[Any], None] = {}
        """All that have not ended, those of crashed machines included: were they collected as garbage, their last
        words would come at a time that nobody can repeat."""
        self.ending = False
        self._last_words: list[events.Handle] = []
        """Steps of tasks of crashed machines: without its step a task could not even be cancelled."""
        self.failed: Callable[[str, BaseException], None] = lambda name, error: None
        """Told of tasks that ended with an error: an agent would end by it."""
        self.set_task_factory(self._make_task)

    def _make_task(self, loop: Any, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=self, **more)
        self._tasks[task] = None
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.ending:
            self.failed(task.get_name(), error)

    def wind_up(self) -> None:
        """The simulation is over: end every task, whatever became of its machine."""
        self.ending = True
        self.put_back(self._last_words)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        self.run_until_complete(asyncio.wait(tasks, timeout=_END_S) if tasks else asyncio.sleep(0))

    def time(self) -> float:
        return self.now_ns / _NS

    def _run_once(self) -> None:
        """One turn: what is due by now and what was ready before; with nothing ready, the clock jumps to the next timer."""
        ready, timers = self._ready, self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise RuntimeError("the simulation stands still: nothing is left that could happen")
            self.now_ns = max(self.now_ns, timers[0][0])
        while timers and timers[0][0] <= self.now_ns:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def at_ns(
        self, when_ns: int, work: Callable[..., object], *args: Any, context: Any = None
    ) -> events.TimerHandle:
        """``call_at`` in nanoseconds."""
        return self._at(max(when_ns, self.now_ns), work, args, context)

    def _at(self, when_ns: int, work: Any, args: Any, context: Any) -> events.TimerHandle:
        self.callbacks += 1
        self._order += 1
        timer = _Handle(self, when_ns / _NS, work, args, context)
        heapq.heappush(self._timers, (when_ns, self._order, timer))
        return timer

    def put_back(self, handles: list[events.Handle]) -> None:
        """What a machine held runs now."""
        self._ready.extend(handles)

    def drop(self, handle: events.Handle) -> None:
        """Of a crashed machine: it never runs, but for the end of its task when all is over."""
        if isinstance(getattr(handle._callback, "__self__", None), asyncio.Task):  # type: ignore[attr-defined]
            self._last_words.append(handle)

    def _call_soon(self, callback: Any, args: Any, context: Any) -> events.Handle:
        self.callbacks += 1
        handle = _Handle(self, 0.0, callback, args, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> events.TimerHandle:
        return self._at(_ns(when), callback, args, context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """At once: what the agent does on threads takes no virtual time."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _write_to_self(self) -> None:
        pass

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """A crashed machine's tasks never end; anything else is an error of ours or the agent's."""
        if "Task was destroyed" not in context.get("message", ""):
            super().default_exception_handler(context)


class MachineClock:
    """A node's own clocks: they may run fast or slow, and the wall clock may be wrong and jump."""

    def __init__(self, loop: VirtualLoop, drift_ppm: int = 0, wall_s: float = 1_700_000_000) -> None:
        self._loop, self.drift_ppm, self.wall_s = loop, drift_ppm, wall_s

    def monotonic_ns(self) -> int:
        now = self._loop.now_ns
        return now + now * self.drift_ppm // 1_000_000

    def monotonic(self) -> float:
        return self.monotonic_ns() / _NS

    def time(self) -> float:
        return self.wall_s + self.monotonic()


def _ns(seconds: float) -> int:
    return ceil(seconds * _NS)
