"""The policy that this node knows: kept on disk, the later version wins, learned from peers by version."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from mesh.errors import ConfigError, RequestError
from mesh.types import NO_POLICY, NodeId, PolicyVersion
from node_agent.adapters.model_store import new_file
from node_agent.ports import PolicyFile
from scheduler.policy import Policy, parse_policy

log = logging.getLogger(__name__)


class _Stored(msgspec.Struct, frozen=True):
    counter: int
    writer: str
    text: str


class PolicyOnDisk:
    """A ``node_agent.ports.PolicyFile`` in a data directory."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "policy.json"

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        with new_file(self._path) as file:
            file.write(content)

    def __str__(self) -> str:
        return str(self._path)


class PolicyBook:
    """``version`` and ``text`` as they were applied, ``policy`` as read."""

    def __init__(self, file: PolicyFile, me: NodeId) -> None:
        self._file, self._me = file, me
        self.version, self.text, self.policy = NO_POLICY, "", Policy()
        try:
            content = file.read()
            if content is not None:
                stored = msgspec.json.decode(content, type=_Stored)
                self._take(PolicyVersion(stored.counter, NodeId(stored.writer)), stored.text)
        except (OSError, msgspec.MsgspecError, ConfigError) as error:
            log.warning("the policy in %s was left aside: %s", file, error)

    def apply(self, text: str, name: str, expected: PolicyVersion | None = None) -> PolicyVersion:
        """An operator's new policy; raises ``ConfigError`` pointing to what is wrong, ``RequestError`` when
        another one was applied meanwhile."""
        if expected is not None and expected != self.version:
            raise RequestError(
                "the policy was changed meanwhile; look at 'mesh plan' and apply again", status=409
            )
        if text.strip():
            parse_policy(text, name)
        self._keep(PolicyVersion(self.version.counter + 1, self._me), text)
        return self.version

    def learn(self, version: PolicyVersion, text: str) -> bool:
        """A peer's; true if it is later than ours and took its place."""
        if version <= self.version:
            return False
        try:
            self._keep(version, text)
        except ConfigError as error:
            log.warning("the policy that %s applied is not understood here: %s", version.writer, error)
            return False
        return True

    def _keep(self, version: PolicyVersion, text: str) -> None:
        self._take(version, text)
        self._file.write(msgspec.json.encode(_Stored(version.counter, version.writer, text)))

    def _take(self, version: PolicyVersion, text: str) -> None:
        policy = parse_policy(text, "policy") if text.strip() else Policy()
        self.version, self.text, self.policy = version, text, policy
