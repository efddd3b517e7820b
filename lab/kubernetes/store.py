"""Objects of one cluster, their versions, and the recent changes that watches replay."""

import asyncio
import json
import sqlite3
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from lab.kubernetes.refusal import conflict, expired, not_found
from lab.kubernetes.resource import RESOURCES, Resource
from lab.kubernetes.selector import Body

HISTORY = 2_000
"""Changes of each kind that can be replayed; who asks for older ones is told 410."""


class Key(NamedTuple):
    namespace: str
    """Empty for what belongs to no namespace."""
    name: str


@dataclass(frozen=True, eq=False)
class Object:
    """One version of an object; its body is never changed."""

    body: Body

    @cached_property
    def encoded(self) -> bytes:
        """JSON, shared by all lists and watches that show this version."""
        return json.dumps(self.body, separators=(",", ":")).encode()

    @property
    def version(self) -> int:
        return int(self.body["metadata"]["resourceVersion"])


@dataclass(frozen=True)
class Change:
    version: int
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    key: Key
    object: Object
    previous: Object | None


@dataclass
class Collection:
    """All objects of one kind, and their recent changes in order."""

    resource: Resource
    oldest: int
    """Changes after this version can be replayed."""
    objects: dict[Key, Object] = field(default_factory=dict)
    changes: deque[Change] = field(default_factory=deque)

    def since(self, version: int) -> Iterator[Change]:
        """Changes after `version`, in order; raises `Refusal` (410) when they are no longer known."""
        if version < self.oldest:
            raise expired(version)
        newer = []
        for change in reversed(self.changes):
            if change.version <= version:
                break
            newer.append(change)
        return reversed(newer)

    def at(self, version: int) -> dict[Key, Object]:
        """The objects as they were; raises `Refusal` (410) when that is no longer known."""
        objects = dict(self.objects)
        for change in reversed(list(self.since(version))):
            if change.previous is None:
                del objects[change.key]
            else:
                objects[change.key] = change.previous
        return objects

    def add(self, change: Change) -> None:
        self.changes.append(change)
        if len(self.changes) > HISTORY:
            self.oldest = self.changes.popleft().version


class Store:
    """Versions rise by one with every write of anything. They start at the clock, so that a cluster that was started
    anew refuses the versions of its predecessor.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.disk = _Disk(file)
        self.version = max(self.disk.version, int(time.time() * 1000))
        self.collections = {resource: Collection(resource, self.version) for resource in RESOURCES}
        for resource, key, body in self.disk.read():
            self.collections[resource].objects[key] = Object(body)
        self._changed = asyncio.Event()

    def get(self, resource: Resource, key: Key) -> Object:
        try:
            return self.collections[resource].objects[key]
        except KeyError:
            raise not_found(resource.plural, key.name) from None

    def put(self, resource: Resource, key: Key, body: Body, *, expected: str | None = None) -> Object:
        """Create or replace; `expected` is the version that the writer has seen. What changes nothing keeps its version."""
        previous = self.collections[resource].objects.get(key)
        if expected and (previous is None or expected != str(previous.version)):
            raise conflict(resource.plural, key.name)
        if previous is not None and _content(previous.body) == _content(body):
            return previous
        stored = Object(_versioned(body, self.version + 1))
        self._record(resource, Change(self.version + 1, "MODIFIED" if previous else "ADDED", key, stored, previous))
        return stored

    def delete(self, resource: Resource, key: Key) -> Object:
        previous = self.get(resource, key)
        last = Object(_versioned(previous.body, self.version + 1))
        self._record(resource, Change(self.version + 1, "DELETED", key, last, previous))
        return last

    def compact(self) -> None:
        """Forget all changes, as etcd does after five minutes, and one more that nobody was told of: so every watch is told 410."""
        self.version += 1
        for collection in self.collections.values():
            collection.changes.clear()
            collection.oldest = self.version
        self.wake()

    async def changed(self) -> None:
        """Until the next write."""
        await self._changed.wait()

    def wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _record(self, resource: Resource, change: Change) -> None:
        collection = self.collections[resource]
        if change.type == "DELETED":
            del collection.objects[change.key]
            self.disk.delete(resource, change)
        else:
            collection.objects[change.key] = change.object
            self.disk.put(resource, change)
        collection.add(change)
        self.version = change.version
        self.wake()


class _Disk:
    """What survives the process: nothing without a file. A killed process loses nothing, a crashed machine may."""

    def __init__(self, file: Path | None) -> None:
        self.database = sqlite3.connect(file or ":memory:", isolation_level=None)
        self.database.executescript(
            """
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = OFF;
            CREATE TABLE IF NOT EXISTS object (plural TEXT, namespace TEXT, name TEXT, version INTEGER, body BLOB, PRIMARY KEY (plural, namespace, name));
            CREATE TABLE IF NOT EXISTS last (id INTEGER PRIMARY KEY, version INTEGER);
            """
        )

    @property
    def version(self) -> int:
        row = self.database.execute("SELECT version FROM last").fetchone()
        return int(row[0]) if row else 0

    def read(self) -> Iterator[tuple[Resource, Key, Body]]:
        by_plural = {resource.plural: resource for resource in RESOURCES}
        for plural, namespace, name, body in self.database.execute("SELECT plural, namespace, name, body FROM object"):
            yield by_plural[plural], Key(namespace, name), json.loads(body)

    def put(self, resource: Resource, change: Change) -> None:
        row = (resource.plural, *change.key, change.version, change.object.encoded)
        self.database.execute("INSERT OR REPLACE INTO object VALUES (?, ?, ?, ?, ?)", row)
        self._last(change.version)

    def delete(self, resource: Resource, change: Change) -> None:
        self.database.execute("DELETE FROM object WHERE plural = ? AND namespace = ? AND name = ?", (resource.plural, *change.key))
        self._last(change.version)

    def _last(self, version: int) -> None:
        self.database.execute("INSERT OR REPLACE INTO last VALUES (1, ?)", (version,))


def _versioned(body: Body, version: int) -> Body:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": str(version)}}


def _content(body: Body) -> Body:
    """Everything but the version."""
    return {**body, "metadata": {name: value for name, value in body["metadata"].items() if name != "resourceVersion"}}
