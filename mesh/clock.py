"""What time it is, as a port: the ``time`` module in an agent, a node's virtual clock in the simulator."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The functions of ``time`` that the agent uses."""

    def monotonic_ns(self) -> int:
        """Nanoseconds; never goes back."""
        ...

    def monotonic(self) -> float:
        """The same in seconds."""
        ...

    def time(self) -> float:
        """Seconds since the epoch, as this machine believes; may jump."""
        ...
