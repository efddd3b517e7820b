"""What a replica remembers of a tenant: its view, the snapshots compiled from it, and the agents that wait for others."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar
from uuid import UUID

from agent.protocol.items import ItemKind
from controlplane.compile.edge import tenant_of
from controlplane.compile.snapshot import CompiledItem, ItemId, Snapshot
from controlplane.services.view import View

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Digest = Mapping[ItemId, str]
"""See `Snapshot.digest`."""


class Recent(Generic[K, V]):
    """The latest values whose weights sum up to no more than `capacity`."""

    def __init__(self, capacity: int, weight: Callable[[V], int]) -> None:
        self._capacity = capacity
        self._weight = weight
        self._held = 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        if key in self._values:
            self._values.move_to_end(key)
            return
        self._values[key] = value
        self._held += self._weight(value)
        while self._held > self._capacity:
            self._held -= self._weight(self._values.popitem(last=False)[1])


@dataclass(frozen=True)
class Published:
    """What a site should have."""

    snapshot: Snapshot
    held_until: int | None = None
    """None: it holds at the view's revision. Otherwise a newer one is not compiled, and it is known to hold only up to this revision."""

    @property
    def hash(self) -> str:
        return self.snapshot.manifest.hash


@dataclass(eq=False)
class TenantCache:
    """One tenant in this replica. All of it is touched by the event loop only."""

    id: UUID
    view: View
    used_at: float
    caught_up_at: float
    failing: bool = False
    """Whether the last look failed; said once, not at every attempt."""
    published: dict[str, Published] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    """Sites whose snapshot is to be compiled before it is used again."""
    compiling: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    waiting: dict[str, dict[UUID, asyncio.Future[bool]]] = field(default_factory=dict)
    """By site and node; the result says whether to look again."""
    to_wake: set[str] = field(default_factory=set)
    waker: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while catching up."""
    next_look: asyncio.Task[None] | None = None
    """Catches up, and has not begun to read: whoever wants to see the latest may share it."""
    digests: Recent[tuple[str, str], Digest] = field(default_factory=lambda: Recent(200_000, len))
    """By site and the manifest's hash."""
    superseded: Recent[tuple[str, str], CompiledItem] = field(default_factory=lambda: Recent(32 << 20, lambda item: len(item.body)))
    """By site and the item's hash: of manifests before, which a node of the site may still be fetching."""

    def outdate(self, site_ids: AbstractSet[str]) -> None:
        """After the view's revision these sites may have to have another snapshot."""
        self.stale |= site_ids
        for site_id in site_ids & self.published.keys():
            if self.published[site_id].held_until is None:
                self.published[site_id] = replace(self.published[site_id], held_until=self.view.revision)

    def publish(self, site_id: str, snapshot: Snapshot, revision: int) -> None:
        """From now on this is what the site should have: compiled at that revision, after which it may have become stale again."""
        before = self.published.get(site_id)
        self.published[site_id] = Published(snapshot, revision if site_id in self.stale else None)
        self.digests.put((site_id, snapshot.manifest.hash), snapshot.digest)
        for item in _replaced(before.snapshot, snapshot) if before else ():
            self.superseded.put((site_id, item.hash), item)


def _replaced(before: Snapshot, after: Snapshot) -> Iterator[CompiledItem]:
    """Items that there were and are no more as they were."""
    return (before.items[id] for id, hash in before.digest.items() if after.digest.get(id) != hash)


@dataclass(frozen=True)
class OnEdges:
    """One tenant's part of what regional edges should have."""

    tenant_id: UUID
    revision: int
    """Of the tenant, up to which it is compiled."""
    operator: TenantCache
    published: Mapping[str, Published]
    """By id of the edge."""

    def of(self, site_id: str, revision: int) -> Published:
        """What an edge should have, held to revisions of the tenant. Of one that cannot be compiled it is not known what it has of whom."""
        found = self.published[site_id]
        good = self.revision >= revision and found.held_until is None
        return replace(found, held_until=None if good else revision - 1)

    def is_told(self, site_id: str, applied_hash: str | None) -> bool:
        """Whether the manifest of that hash has the tenant's part as it should be, whatever it has of others."""
        current = self.published[site_id]
        if applied_hash == current.hash:
            return True
        digest = self.operator.digests.get((site_id, applied_hash)) if applied_hash else None
        return digest is not None and self._own(digest) == self._own(current.snapshot.digest)

    def _own(self, digest: Digest) -> Digest:
        """Without the relay, which changes with every site, and is no object's."""
        return {key: hash for key, hash in digest.items() if key[0] != ItemKind.RELAY and tenant_of(key[1]) == str(self.tenant_id)}
