"""What the compilers produce."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from agent.protocol.base import Body, content_hash
from agent.protocol.items import ItemKind
from agent.protocol.manifest import Entry, Manifest
from controlplane.resources.base import Key

ItemId = tuple[ItemKind, str]
"""Kind and key."""


@dataclass(frozen=True)
class CompiledItem:
    """An item as it is hashed, stored and sent."""

    kind: ItemKind
    key: str
    body: bytes
    hash: str

    @classmethod
    def of(cls, kind: ItemKind, key: str, body: Body) -> "CompiledItem":
        data = body.canonical()
        return cls(kind, key, data, content_hash(data))

    @cached_property
    def id(self) -> ItemId:
        return self.kind, self.key

    @cached_property
    def entry(self) -> Entry:
        """Its line in a manifest."""
        return Entry(kind=self.kind, key=self.key, hash=self.hash)


@dataclass(frozen=True)
class Condition:
    """Something that a user should know about one of their objects."""

    kind: str
    key: Key
    type: str
    """`Conflicted`, `NotYours`, `SiteGone`, `Unreachable` or `Unresolved`."""
    message: str
    site_id: str = ""
    """Where it holds; empty: everywhere."""


@dataclass(frozen=True)
class Snapshot:
    """Everything one site needs to know. Items are keyed and sorted by (kind, key)."""

    site_id: str
    items: Mapping[ItemId, CompiledItem]

    @cached_property
    def manifest(self) -> Manifest:
        """Its entries are checked already."""
        return Manifest.model_construct(entries=tuple([item.entry for item in self.items.values()]))

    @cached_property
    def digest(self) -> Mapping[ItemId, str]:
        """Hashes: what the manifest says."""
        return {id: item.hash for id, item in self.items.items()}

    def worked_out(self) -> "Snapshot":
        """The same, once manifest, hash and digest are there: for who would rather have them made now than when they are asked for."""
        _ = self.manifest.hash, self.digest
        return self


def snapshot_of(site_id: str, items: Iterable[CompiledItem]) -> Snapshot:
    """Of items in any order, each once or more often."""
    return Snapshot(site_id, {item.id: item for item in sorted(items, key=attrgetter("id"))})
