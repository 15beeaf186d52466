"""What runs the graphs of a static shard, as ``static_runtime`` sees it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


class Ends(NamedTuple):
    """Names of a graph's inputs and outputs, in the order in which ``Engine.run`` wants them."""

    inputs: Sequence[str]
    outputs: Sequence[str]


class Engine(Protocol):
    """The graphs of a shard, loaded."""

    provider: str
    """What computes."""
    names: Collection[str]
    """Of the graphs."""

    def prepare(self, soon: Sequence[str], later: Sequence[str] = ()) -> None:
        """These may be run ``soon``, and those ``later``, some day: what must be opened for them is opened in the background, where
        that is quick enough to be done for what may never come. Names that there are not are passed over."""
        ...

    def ends(self, graph: str) -> Ends: ...

    def bind(self, memory: Array) -> Any:
        """Memory of ours as an input or output, for as long as it is not let go of."""
        ...

    def unbind(self, bound: Any) -> None: ...

    def together(self, bound: Sequence[Any]) -> Any:
        """Several of them, as ``run`` takes them: worth keeping, where the same run comes again."""
        ...

    def run(self, graph: str, inputs: Any, outputs: Any) -> None:
        """Compute; the outputs are written to what is bound."""
        ...

    def close(self) -> None: ...
