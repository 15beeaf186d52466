"""What discovery says of an agent: a small advert, the same in every directory.

An advert is text pairs (mDNS TXT items, Consul service meta). It comes from the network and is
believed only as far as "knock there": identity, liveness and capabilities are asked of the agent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mesh.errors import PeerError
from mesh.types import Address, NodeId

ADVERT_VERSION = "1"
ITEM_BYTES_MAX = 255
"""Of ``key=value``: the limit of a TXT item (RFC 6763, section 6.1)."""
ADVERT_BYTES_MAX = 1300
"""Of a whole advert: one mDNS packet (RFC 6763, section 6.2)."""
LOCK_TTL_S = 10
"""Life of the leader's session in Consul; a leader that cannot renew it stops before."""
LOCK_DELAY_S = 5
"""A lock whose session expired is given to nobody for so long."""
_NODE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{16}|")
_NUMBER = re.compile(r"[0-9]{1,18}")
_REGION = re.compile(r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True, slots=True)
class Advert:
    """``digest`` is that of the node's capabilities, ``instance`` when its process started (ms)."""

    cluster: str
    node: NodeId
    name: str
    address: Address
    instance: int
    digest: str = ""
    region: str = ""
    version: str = ""

    def items(self) -> dict[str, str]:
        """As text pairs; a name that is too long is cut."""
        return {
            "v": ADVERT_VERSION,
            "cluster": self.cluster,
            "node": self.node,
            "name": self.name.encode()[:200].decode(errors="ignore"),
            "address": self.address,
            "instance": str(self.instance),
            "digest": self.digest,
            "region": self.region,
            "version": self.version,
        }


@dataclass(frozen=True, slots=True)
class Sighting:
    """An advert that was seen, and the addresses to knock at."""

    node: NodeId
    addresses: tuple[Address, ...]
    digest: str = ""
    instance: int = 0


def read_advert(items: Mapping[str, str], cluster: str) -> Advert | None:
    """The advert in text pairs; ``None`` if it is another cluster's. Raises ``PeerError`` naming what
    is wrong. Unknown pairs are ignored."""
    size = sum(len(k.encode()) + len(v.encode(errors="replace")) + 2 for k, v in items.items())
    if size > ADVERT_BYTES_MAX:
        raise PeerError(f"an advert of {size} bytes; the limit is {ADVERT_BYTES_MAX}")
    found = items.get("cluster", "")
    if found != cluster:
        return None
    if items.get("v") != ADVERT_VERSION:
        raise PeerError(
            f"an advert of version {items.get('v', '')[:20]!r}; this agent reads {ADVERT_VERSION}"
        )
    for key, pattern in (
        ("node", _NODE),
        ("digest", _DIGEST),
        ("instance", _NUMBER),
        ("region", _REGION),
    ):
        if not pattern.fullmatch(items.get(key, "")):
            raise PeerError(f"an advert whose {key} is {items.get(key, '')[:60]!r}")
    return Advert(
        cluster,
        NodeId(items["node"]),
        items.get("name", "")[:200],
        Address(items.get("address", "")),
        int(items["instance"]),
        items.get("digest", ""),
        items.get("region", ""),
        items.get("version", "")[:40],
    )


class Discovery(Protocol):
    """A directory of agents: mDNS, Consul, a list. ``run`` serves until it is cancelled, through every
    failure of the directory; ``status`` says how it is, for people."""

    name: str

    async def run(
        self,
        advert: Advert,
        found: Callable[[str, Sighting], None],
        gone: Callable[[str, Sighting], None],
    ) -> None: ...

    def update(self, advert: Advert) -> None:
        """Advertise this from now on."""

    def status(self) -> str: ...
