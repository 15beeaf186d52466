"""Token log in RocksDB, with checksums of our own.

RocksDB's write-ahead log survives ``kill -9`` but silently drops records after a damaged one, so
every record carries a CRC and a reader stops at the first gap.

Keys (``a`` is the hop logs'): ``s`` + session (16 bytes) holds expiry, owner, prompt and request; ``t`` + session +
position (big-endian) holds one token.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan, nan
from pathlib import Path

import msgspec
from rocksdict import Options, Rdict, ReadOptions, WriteBatch, WriteOptions

from mesh.errors import ConfigError
from mesh.types import Epoch, LayeredRoute, NodeId, SessionId, Token
from node_agent.adapters.frame_store import WRITE_EVERY_S
from node_agent.adapters.later import Later
from node_agent.ports import NO_EPOCH, LoggedSession

log = logging.getLogger(__name__)

_TOKEN = struct.Struct("<If")
_POSITION = struct.Struct(">I")
_WRITE_BUFFER = 4 << 20
_LOG_FILES_KEPT = 2


class _Head(msgspec.Struct, frozen=True, array_like=True):
    expires_at: float
    counter: int
    owner: str
    prompt: tuple[int, ...]
    request: bytes
    route: LayeredRoute | None = None


@contextmanager
def _os_errors() -> Iterator[None]:
    """rocksdict raises bare Exceptions; the port promises ``OSError``."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error


class RocksTokenLog:
    """``node_agent.ports.TokenLog`` on disk."""

    def __init__(self, folder: Path, sync: bool = False) -> None:
        """With ``sync`` a token is past the disk's cache before it is shown: power may fail then. Copies get there within
        ``WRITE_EVERY_S``, as hop logs do: whoever has them sampled waits for one disk, the owner's, and not for two."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(_WRITE_BUFFER)
        options.set_max_write_buffer_number(2)
        options.set_keep_log_file_num(_LOG_FILES_KEPT)
        options.set_max_background_jobs(2)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._db = Rdict(str(folder), options)
            self._how = WriteOptions()
            self._how.sync = sync
            self._db.set_write_options(self._how)
            self._quick = WriteOptions()
        except Exception as error:  # rocksdict's own kind
            if "lock" in str(error).lower():
                raise ConfigError(
                    f"the data directory {folder.parent} is in use by another agent; give this one its own --data-dir"
                ) from error
            raise ConfigError(
                f"the token log {folder} cannot be opened: {error}; move it away to start with an empty one"
            ) from error

        self._copies = Later("token log", WRITE_EVERY_S, self._sync_copies) if sync else None

    def _sync_copies(self) -> None:
        try:
            self._db.flush_wal(True)
        except Exception as error:  # rocksdict's own kind
            log.error("copies of tokens cannot be written to the disk: %s", error)

    @property
    def db(self) -> Rdict:
        """The database, which hop logs live in as well."""
        return self._db

    def begin(
        self,
        session: SessionId,
        prompt: Sequence[int],
        expires_at: float,
        epoch: Epoch = NO_EPOCH,
        request: bytes = b"",
        route: LayeredRoute | None = None,
    ) -> None:
        head = _Head(expires_at, epoch.counter, epoch.owner, tuple(prompt), request, route)
        self._write_head(session, head)

    def _write_head(self, session: SessionId, head: _Head) -> None:
        body = msgspec.msgpack.encode(head)
        with _os_errors():
            self._db[b"s" + bytes.fromhex(session)] = body + struct.pack("<I", zlib.crc32(body))

    def append(self, session: SessionId, tokens: Sequence[Token], copy: bool = False) -> None:
        prefix, how = b"t" + bytes.fromhex(session), self._quick if copy else self._how
        with _os_errors():
            if len(tokens) == 1:
                self._db.put(prefix + _POSITION.pack(tokens[0].position), _record(tokens[0]), how)
            else:
                batch = WriteBatch(raw_mode=True)
                for token in tokens:
                    batch.put(prefix + _POSITION.pack(token.position), _record(token))
                self._db.write(batch, how)
        if copy and self._copies is not None:
            self._copies.ask()

    def read(self, session: SessionId) -> LoggedSession | None:
        prefix = bytes.fromhex(session)
        with _os_errors():
            value = self._db.get(b"s" + prefix)
            head = _read_head(value) if isinstance(value, bytes) else None
            if head is None:
                return None
            tokens: list[Token] = []
            position = len(head.prompt)
            while isinstance(value := self._db.get(b"t" + prefix + _POSITION.pack(position)), bytes):
                token = _read_record(value, position)
                if token is None:
                    break
                tokens.append(token)
                position += 1
        epoch = Epoch(head.counter, NodeId(head.owner))
        return LoggedSession(head.prompt, tuple(tokens), epoch, head.request, head.route)

    def take(self, session: SessionId, expected: Epoch, wanted: Epoch) -> bool:
        with _os_errors():
            value = self._db.get(b"s" + bytes.fromhex(session))
        head = _read_head(value) if isinstance(value, bytes) else None
        if head is None or (head.counter, head.owner) != (expected.counter, expected.owner):
            return False
        self._write_head(session, msgspec.structs.replace(head, counter=wanted.counter, owner=wanted.owner))
        return True

    def forget(self, session: SessionId) -> None:
        prefix = bytes.fromhex(session)
        with _os_errors():
            self._db.delete_range(b"t" + prefix, b"t" + prefix + b"\xff" * 5)
            del self._db[b"s" + prefix]

    def expire(self, now: float) -> Iterable[SessionId]:
        gone = []
        with _os_errors():
            for key, value in self._db.items(from_key=b"s", read_opt=ReadOptions()):
                if not isinstance(key, bytes) or not key.startswith(b"s"):
                    break
                head = _read_head(value) if isinstance(value, bytes) else None
                if head is None or head.expires_at <= now:
                    gone.append(SessionId(key[1:].hex()))
        for session in gone:
            self.forget(session)
        return gone

    def close(self) -> None:
        if self._copies is not None:
            self._copies.close()
        with _os_errors():
            self._db.close()


def _read_head(value: bytes) -> _Head | None:
    """``None`` if the record is damaged."""
    body, check = value[:-4], value[-4:]
    if struct.pack("<I", zlib.crc32(body)) != check:
        return None
    try:
        return msgspec.msgpack.decode(body, type=_Head)
    except msgspec.MsgspecError:
        return None


def _record(token: Token) -> bytes:
    body = _TOKEN.pack(token.token, nan if token.logprob is None else token.logprob)
    return body + struct.pack("<I", zlib.crc32(body, token.position))


def _read_record(value: bytes, position: int) -> Token | None:
    body, check = value[:-4], value[-4:]
    if len(body) != _TOKEN.size or struct.pack("<I", zlib.crc32(body, position)) != check:
        return None
    token, logprob = _TOKEN.unpack(body)
    return Token(position, int(token), None if isnan(logprob) else float(logprob))
