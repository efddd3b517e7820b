"""Answers to agents, from what a replica remembers."""

from collections.abc import Iterable, Sequence

from agent.protocol.manifest import ItemBody, ManifestAnswer
from controlplane.compile.snapshot import CompiledItem, Snapshot
from controlplane.services.caches import Published, TenantCache

ANSWER_BYTES = 4 << 20
"""An answer with items is cut short there."""
BROUGHT_BYTES = 64 << 10
"""So much of the items that a small change needs comes with the manifest."""


def answer(cache: TenantCache, site_id: str, published: Published, known: str | None) -> ManifestAnswer:
    """The site's manifest, as difference from the one with hash `known` if that is remembered."""
    revision = cache.view.revision if published.held_until is None else published.held_until
    if published.hash == known:
        return ManifestAnswer(hash=known, revision=revision, since=known)
    old = cache.digests.get((site_id, known)) if known else None
    if old is None:
        return ManifestAnswer(hash=published.hash, revision=revision, entries=published.snapshot.manifest.entries)
    new = published.snapshot.items
    differing = [item for key, item in new.items() if old.get(key) != item.hash]
    changed = tuple(item.entry for item in differing)
    removed = tuple(sorted(old.keys() - new.keys()))
    brought = fitting(differing, BROUGHT_BYTES)
    return ManifestAnswer(hash=published.hash, revision=revision, since=known, entries=changed, removed=removed, items=brought)


def named(snapshot: Snapshot, refs: Sequence[str]) -> dict[str, str]:
    """With the key of an item that names it."""
    naming = [item for item in snapshot.items.values() if b'"secret:' in item.body]
    found = ((ref, next((item.key for item in naming if f'"{ref}"'.encode() in item.body), None)) for ref in refs)
    return {ref: key for ref, key in found if key is not None}


def fitting(items: Iterable[CompiledItem], most: int) -> tuple[ItemBody, ...]:
    """The first ones that fit in so many bytes, at least one."""
    bodies: list[ItemBody] = []
    size = 0
    for item in items:
        size += len(item.body)
        if bodies and size > most:
            break
        bodies.append(ItemBody.model_construct(hash=item.hash, kind=item.kind, body=item.body.decode()))
    return tuple(bodies)
