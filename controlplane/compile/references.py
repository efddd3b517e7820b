"""Who refers to what, and which references lead nowhere."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any

from controlplane.compile.intent import CACHE, Intent, Target
from controlplane.compile.snapshot import Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.registry import refs


@lru_cache(CACHE)
def references(stored: Stored[Any]) -> frozenset[Target]:
    """What the object needs besides its namespace."""
    found = refs(stored.kind, stored.metadata, stored.spec)
    return frozenset((ref.kind, ref.key) for ref in found if ref.kind != "namespace")


@lru_cache(64)
def referrers(intent: Intent) -> Mapping[Target, tuple[Stored[Any], ...]]:
    """Objects that are not disabled, by what they refer to."""
    found: dict[Target, list[Stored[Any]]] = defaultdict(list)
    for stored in _enabled(intent):
        for target in references(stored):
            found[target].append(stored)
    return {target: tuple(by) for target, by in found.items()}


@lru_cache(64)
def dangling(intent: Intent) -> tuple[Condition, ...]:
    """What is compiled without something that it refers to: sites may go at any time, anything may be disabled. Sorted."""
    wanted = frozenset[Target]().union(*map(references, _enabled(intent)))
    missing = frozenset(target for target in wanted if not intent.find(*target))
    found = (_condition(by, *target) for by in _enabled(intent) if missing for target in references(by) & missing)
    return tuple(sorted(found, key=attrgetter("kind", "key", "type", "message")))


def _enabled(intent: Intent) -> Iterator[Stored[Any]]:
    return (stored for of_kind in intent.objects.values() for stored in of_kind.values() if not stored.metadata.disable)


def _condition(by: Stored[Any], kind: str, key: Key) -> Condition:
    if kind == "site":
        return Condition(by.kind, by.key, "SiteGone", f"site {key.name} is gone or disabled")
    return Condition(by.kind, by.key, "Unresolved", f"{kind} {key} is gone or disabled")
