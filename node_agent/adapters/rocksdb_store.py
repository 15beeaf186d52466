"""Token log in RocksDB, with checksums of our own.

RocksDB's write-ahead log survives ``kill -9`` but silently drops records after a damaged one, so
every record carries a CRC and a reader stops at the first gap.

Keys (``a`` is the hop logs'): ``s`` + session (16 bytes) holds expiry and prompt; ``t`` + session + position (big-endian)
holds one token.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rocksdict import Options, Rdict, ReadOptions, WriteOptions

from mesh.errors import ConfigError
from mesh.types import SessionId

_HEAD = struct.Struct("<dI")
_RECORD = struct.Struct("<II")
_POSITION = struct.Struct(">I")
_WRITE_BUFFER = 4 << 20
_LOG_FILES_KEPT = 2


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
        """With ``sync`` a token is past the disk's cache before it is shown: power may fail then."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(_WRITE_BUFFER)
        options.set_max_write_buffer_number(2)
        options.set_keep_log_file_num(_LOG_FILES_KEPT)
        options.set_max_background_jobs(2)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._db = Rdict(str(folder), options)
            how = WriteOptions()
            how.sync = sync
            self._db.set_write_options(how)
        except Exception as error:  # rocksdict's own kind
            if "lock" in str(error).lower():
                raise ConfigError(
                    f"the data directory {folder.parent} is in use by another agent; give this one its own --data-dir"
                ) from error
            raise ConfigError(
                f"the token log {folder} cannot be opened: {error}; move it away to start with an empty one"
            ) from error

    @property
    def db(self) -> Rdict:
        """The database, which hop logs live in as well."""
        return self._db

    def begin(self, session: SessionId, prompt: Sequence[int], expires_at: float) -> None:
        body = _HEAD.pack(expires_at, len(prompt)) + struct.pack(f"<{len(prompt)}I", *prompt)
        with _os_errors():
            self._db[b"s" + bytes.fromhex(session)] = body + struct.pack("<I", zlib.crc32(body))

    def append(self, session: SessionId, position: int, tokens: Sequence[int]) -> None:
        prefix = b"t" + bytes.fromhex(session)
        with _os_errors():
            for offset, token in enumerate(tokens):
                key = prefix + _POSITION.pack(position + offset)
                self._db[key] = _RECORD.pack(token, zlib.crc32(struct.pack("<I", token), position + offset))

    def read(self, session: SessionId) -> tuple[list[int], list[int]] | None:
        prefix = bytes.fromhex(session)
        with _os_errors():
            head = self._db.get(b"s" + prefix)
            prompt = _read_head(head) if isinstance(head, bytes) else None
            if prompt is None:
                return None
            tokens: list[int] = []
            position = len(prompt[1])
            while isinstance(value := self._db.get(b"t" + prefix + _POSITION.pack(position)), bytes):
                token = _read_record(value, position)
                if token is None:
                    break
                tokens.append(token)
                position += 1
            return prompt[1], tokens

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
                if head is None or head[0] <= now:
                    gone.append(SessionId(key[1:].hex()))
        for session in gone:
            self.forget(session)
        return gone

    def close(self) -> None:
        with _os_errors():
            self._db.close()


def _read_head(value: bytes) -> tuple[float, list[int]] | None:
    """Expiry and prompt; ``None`` if the record is damaged."""
    if len(value) < _HEAD.size + 4:
        return None
    body, check = value[:-4], value[-4:]
    expires_at, count = _HEAD.unpack_from(body)
    if struct.pack("<I", zlib.crc32(body)) != check or len(body) != _HEAD.size + 4 * count:
        return None
    return expires_at, list(struct.unpack_from(f"<{count}I", body, _HEAD.size))


def _read_record(value: bytes, position: int) -> int | None:
    if len(value) != _RECORD.size:
        return None
    token, check = _RECORD.unpack(value)
    return int(token) if zlib.crc32(struct.pack("<I", token), position) == check else None
