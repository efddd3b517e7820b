"""How a pool's origins are reached from this site: which are dialled here, which through other sites, with what weight."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Concatenate, ParamSpec, TypeVar

from agent.envoy import names
from agent.envoy.inputs import Endpoint, Item, LocalState, OriginId, Scope, body
from agent.protocol.items import OriginPool

CACHE = 20_000
"""Entries of each memo: several versions of everything in a large tenant."""
SHARE = 1_000
"""Steps in which a pool's traffic is divided between this site and others."""
P = ParamSpec("P")
R = TypeVar("R")


def last(make: Callable[P, R]) -> Callable[P, R]:
    """A memo of what was made last: for what a node has one of, from values that are compared faster than it is made, and never changed in place."""
    held: list[tuple[object, R]] = []

    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (args, kwargs)
        if not held or held[0][0] != given:
            held[:] = [(given, make(*args, **kwargs))]
        return held[0][1]

    return remembering


def latest(make: Callable[Concatenate[Item, P], R]) -> Callable[Concatenate[Item, P], R]:
    """The same for each item: where endpoints are in it, which are many and other ones all the time."""
    of: Callable[[Item], Callable[Concatenate[Item, P], R]] = lru_cache(CACHE)(lambda _: last(make))

    def remembering(item: Item, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return of(item)(item, *args, **kwargs)

    return remembering


@dataclass(frozen=True, eq=False)
class PoolView:
    """A pool, and what the node knows of its origins now. `view` makes one, the same one while nothing of it changes."""

    item: Item
    scope: Scope
    local: tuple[tuple[Endpoint, ...], ...] | None
    """Endpoints of each origin that this site dials, in the pool's order; None when it dials none."""
    remote: tuple[tuple[str, int], ...] | None
    """Sites to use, with their healthy endpoints, sorted; None when no other site serves the pool."""
    spare: tuple[tuple[str, int], ...] = ()
    """Likewise those that drain or are lost: used when nothing else serves."""
    via: frozenset[tuple[str, str]] = frozenset()
    """Sites that are not reached directly, and by which path."""

    @property
    def key(self) -> str:
        return self.item.id.key

    @cached_property
    def pool(self) -> OriginPool:
        return body(self.item, OriginPool)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """Of the other sites that serve the pool, sorted, whether or not there is a path to them now."""
        sites = () if self.pool.selection == "LOCAL_ONLY" else _origins(self.item, self.scope.site_id)[1]
        return tuple(sorted({self.shard(site) for site in sites}))

    def shard(self, site_id: str) -> str:
        return self.scope.shard(site_id, self.key)

    @cached_property
    def servers(self) -> int:
        """Sites that can serve now, this one included."""
        return len(self.remote or ()) + len(self.spare) + any(self.local or ())

    @cached_property
    def crosses(self) -> bool:
        """Whether other sites may serve the pool's traffic."""
        return self.remote is not None and self.pool.selection != "LOCAL_ONLY"


@dataclass(frozen=True, eq=False)
class Reach:
    """What routes need to know of a pool; it stays the same while endpoints come and go within a power of two."""

    pool: str
    local: int | None
    """Weight of this site; None when it has no origins."""
    remote: int | None
    """Weight of the other sites; None when none is to be used."""
    selection: str

    def orders(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """Clusters in the order in which they are tried, with the share of requests that begin there."""
        here, away = names.pool(self.pool), names.remote(self.pool)
        if self.remote is None:
            return (((here,), SHARE),)
        if self.local is None:
            return (((away,), SHARE),)
        if self.selection == "LOCAL_PREFERRED":
            return (((here, away), SHARE),)
        return self._distributed(here, away)

    def _distributed(self, here: str, away: str) -> tuple[tuple[tuple[str, ...], int], ...]:
        local, remote = self.local or 0, self.remote or 0
        if not remote:
            return (((here, away), SHARE),)
        share = SHARE * local // (local + remote)
        orders = (((here, away), share), ((away, here), SHARE - share))
        return tuple((order, weight) for order, weight in orders if weight)


@lru_cache(CACHE)
def _origins(item: Item, site_id: str) -> tuple[tuple[OriginId, ...], tuple[str, ...]]:
    """Origins that the site dials itself, and the other sites that serve the pool."""
    origins = body(item, OriginPool).origins
    here = tuple(OriginId(item.id.key, origin.key) for origin in origins if origin.sites is None or site_id in origin.sites)
    elsewhere = {site for origin in origins if origin.sites is not None for site in origin.sites} - {site_id}
    return here, tuple(sorted(elsewhere))


def dials(item: Item, site_id: str) -> bool:
    """Whether the site itself dials some origin of the pool."""
    return bool(_origins(item, site_id)[0])


def view(
    item: Item,
    scope: Scope,
    local: LocalState,
    dialable: frozenset[str],
    draining: frozenset[str] = frozenset(),
    lost: frozenset[str] = frozenset(),
    via: Mapping[str, str] = MappingProxyType({}),
) -> PoolView:
    """`dialable`: ids of the sites that there are paths to; `draining` those of them that should not serve, `lost` those that are silent.

    `via`: the path in use to those where it is not the direct one.
    """
    here, elsewhere = _origins(item, scope.site_id)
    reachable = [site for site in elsewhere if site in dialable]
    endpoints = tuple([local.endpoints.get(origin, ()) for origin in here]) if here else None
    usable = tuple(_usable(item.id.key, reachable, local)) if reachable else None
    around = frozenset([(site, via[site]) for site in reachable if site in via]) if via else frozenset()
    if usable is None or not (draining or lost):
        return _view(item, scope, endpoints, usable, (), around)
    fate = body(item, OriginPool).lost_sites
    evicted = lost if fate == "evict" else frozenset()
    spared = draining | lost if fate == "deprioritise" else draining
    usable = tuple([found for found in usable if found[0] not in evicted])
    spare = tuple([found for found in usable if found[0] in spared])
    return _view(item, scope, endpoints, tuple([found for found in usable if found[0] not in spared]), spare, around)


_view = latest(PoolView)


def _usable(pool: str, sites: Iterable[str], local: LocalState) -> Iterable[tuple[str, int]]:
    for site in sites:
        peer = local.peers.get(site)
        healthy = 1 if peer is None else peer.exports.get(pool, 1)
        if healthy > 0 and (peer is None or peer.reachable is not False):
            yield site, healthy


def reach(view: PoolView) -> Reach:
    return _reach_of(view.item, view)


@latest
def _reach_of(_: Item, view: PoolView) -> Reach:
    local = None if view.local is None else bucket(sum(map(len, view.local)))
    remote = sum(healthy for _, healthy in view.remote or ()) if view.crosses else None
    selection = view.pool.selection
    if selection != "DISTRIBUTED" or local is None or remote is None:
        local, remote = (weight and 1 for weight in (local, remote))
    return _reach(view.key, local, remote, selection)


_reach = lru_cache(CACHE)(Reach)


def bucket(count: int) -> int:
    return 1 << (count.bit_length() - 1) if count else 0
