"""A LiteRT model seen as some of its graphs: the library compiles all that a file lists, whether anybody runs them or not. Pure.

Lists of graphs and of signatures are lists of offsets, so shorter ones are a few bytes in a private copy of the file; weights
and graphs stay where they are. Format: https://github.com/google-ai-edge/LiteRT, ``schema.fbs``, and FlatBuffers' own.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from flatbuffers import encode, number_types
from flatbuffers.table import Table

from mesh.errors import ShardError

_SUBGRAPHS, _SIGNATURES = 8, 18
"""Fields of a model."""
_KEY, _SUBGRAPH = 8, 12
"""Fields of a signature."""
_OFFSET = number_types.UOffsetTFlags.bytewidth


@dataclass(frozen=True, slots=True)
class _Signature:
    name: str
    table: Table
    graph: int

    def renumber(self, graph: int) -> None:
        """Its graph has another number from now on; who names none means the first, which stays the first."""
        field = self.table.Offset(_SUBGRAPH)
        if field:
            struct.pack_into("<I", self.table.Bytes, self.table.Pos + field, graph)


class _List:
    """One of a model's lists of tables."""

    def __init__(self, model: Table, field: int) -> None:
        offset = model.Offset(field)
        self._length = model.VectorLen(offset) if offset else 0
        if not self._length:
            raise ShardError("it lists no graphs")
        self._data, self._start = model.Bytes, model.Vector(offset)

    def tables(self) -> list[int]:
        """Where they are."""
        places = range(self._start, self._start + self._length * _OFFSET, _OFFSET)
        return [p + encode.Get(number_types.UOffsetTFlags.packer_type, self._data, p) for p in places]

    def keep(self, tables: Sequence[int]) -> None:
        """Those alone, in that order."""
        for i, table in enumerate(tables):
            place = self._start + i * _OFFSET
            struct.pack_into("<I", self._data, place, table - place)
        struct.pack_into("<I", self._data, self._start - _OFFSET, len(tables))


def graph_names(data: Any) -> tuple[str, ...]:
    """Of the signatures, as the file lists them. ``data``: its bytes. Raises ``ShardError``."""
    return tuple(s.name for s in _read(data)[1])


def keep_graphs(data: Any, names: Collection[str]) -> None:
    """Take all other graphs out of a model's lists. ``data``: its bytes, which can be written. Raises ``ShardError``."""
    model, signatures = _read(data)
    kept = [s for s in signatures if s.name in names]
    graphs = sorted({s.graph for s in kept})
    try:
        listed = _List(model, _SUBGRAPHS)
        tables = listed.tables()
        listed.keep([tables[g] for g in graphs])
        for signature in kept:
            signature.renumber(graphs.index(signature.graph))
        _List(model, _SIGNATURES).keep([s.table.Pos for s in kept])
    except (struct.error, IndexError):
        raise ShardError("its lists of graphs cannot be read") from None


def _read(data: Any) -> tuple[Table, list[_Signature]]:
    try:
        model = Table(data, encode.Get(number_types.UOffsetTFlags.packer_type, data, 0))
        found = []
        for place in _List(model, _SIGNATURES).tables():
            table = Table(data, place)
            key, field = table.Offset(_KEY), table.Offset(_SUBGRAPH)
            graph = table.Get(number_types.Uint32Flags, place + field) if field else 0
            found.append(_Signature(table.String(place + key).decode(), table, graph))
    except (struct.error, IndexError, TypeError, ValueError):
        raise ShardError("its list of graphs cannot be read") from None
    return model, found
