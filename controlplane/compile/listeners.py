"""Which load balancers listen at a site, and which of them had to give way."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.claims import LoadBalancer, claimed, published
from controlplane.compile.intent import CACHE, Target
from controlplane.compile.load_balancers import Algorithm, algorithm, lost_sites
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem, Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.claim import Claim, Place, Protocol
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer


class Service(NamedTuple):
    """One of a site's own cluster that is to stand for a load balancer."""

    site_id: str
    key: str
    """`namespace/service`."""
    ports: tuple[int, ...]


class Needs(NamedTuple):
    """What a load balancer asks of others."""

    pools: frozenset[Key]
    policies: tuple[Key, ...] | None
    """In the order of evaluation; None: no policy was asked for."""
    algorithm: Algorithm
    lost_sites: items.LostSites


@dataclass(frozen=True, eq=False)
class Placement:
    """All that others need to know of a load balancer in a topology.

    The very same while that is the same, whatever it does with requests: so it is a cheap key of caches, and most changes are changes of nothing else.
    """

    target: Target
    key: str
    """`namespace/name`."""
    rank: tuple[int, str, Key]
    """Who comes first in a conflict: the oldest."""
    needs: Needs
    claims: dict[str, tuple[Claim, ...]]
    """By site; both are sorted."""
    services: dict[str, dict[str, tuple[int, ...]]]
    """By site and `namespace/service`: sorted ports."""

    @property
    def tcp(self) -> bool:
        return self.target[0] == TcpLoadBalancer.kind


@dataclass
class _Listener:
    """A place while it is being given away."""

    protocol: Protocol
    owners: dict[str, Placement] = field(default_factory=dict)
    """By domain."""

    def winner(self, claim: Claim) -> Placement | None:
        """Whoever has what is claimed."""
        if self.protocol != claim.protocol:
            return next(iter(self.owners.values()))
        return self.owners.get(claim.domain)


@dataclass(frozen=True, eq=False)
class SiteListeners:
    accepted: tuple[Placement, ...]
    """Oldest first, as is `rejected`."""
    rejected: tuple[Placement, ...]
    items: tuple[CompiledItem, ...]
    conflicts: tuple[Condition, ...]

    @cached_property
    def holders(self) -> frozenset[Placement]:
        """The accepted ones."""
        return frozenset(self.accepted)

    @cached_property
    def pools(self) -> tuple[Key, ...]:
        """That these use. Sorted."""
        return tuple(sorted(frozenset[Key]().union(*(each.needs.pools for each in self.accepted))))


@lru_cache(CACHE)
def placement(stored: Stored[LoadBalancer], topology: Topology) -> Placement:
    spec = stored.spec
    policies = tuple(ref.key for ref in spec.active_service_policies.policies) if spec.active_service_policies else None
    needs = Needs(_pools(spec), policies, algorithm(spec), lost_sites(spec))
    return _placement(
        (stored.kind, stored.key), stored.created_revision, needs, claimed(stored, topology), frozenset(_services(spec, topology))
    )


@lru_cache(CACHE)
def _placement(target: Target, created_revision: int, needs: Needs, claims: frozenset[Claim], services: frozenset[Service]) -> Placement:
    by_site: dict[str, list[Claim]] = defaultdict(list)
    for claim in sorted(claims):
        by_site[claim.site_id].append(claim)
    return Placement(
        target=target,
        key=str(target[1]),
        rank=(created_revision, *target),
        needs=needs,
        claims={site_id: tuple(at_site) for site_id, at_site in by_site.items()},
        services=_by_site(services),
    )


@lru_cache(1024)
def settle(site_id: str, site: str, wanted: tuple[Placement, ...]) -> SiteListeners:
    """`wanted` is sorted by rank. Who does not get all that it claims at the site gets nothing there."""
    listeners: dict[Place, _Listener] = {}
    accepted: list[Placement] = []
    rejected: list[Placement] = []
    conflicts: list[Condition] = []
    for candidate in wanted:
        claims = candidate.claims[site_id]
        lost = next(((claim, winner) for claim in claims if (winner := _winner(listeners, claim))), None)
        if lost:
            rejected.append(candidate)
            conflicts.append(_conflicted((site_id, site), candidate, *lost))
            continue
        accepted.append(candidate)
        for claim in claims:
            listeners.setdefault(claim.place, _Listener(claim.protocol)).owners[claim.domain] = candidate
    return SiteListeners(tuple(accepted), tuple(rejected), _items(listeners), tuple(conflicts))


def _pools(spec: LoadBalancer) -> frozenset[Key]:
    if isinstance(spec, TcpLoadBalancer):
        uses = [*spec.origin_pools_weights]
    else:
        uses = [*spec.default_pools, *(use for route in spec.routes if route.simple_route for use in route.simple_route.origin_pools)]
    return frozenset(use.pool.key for use in uses if use.pool)


def _services(spec: LoadBalancer, topology: Topology) -> Iterator[Service]:
    return (Service(site_id, f"{to.namespace}/{to.service}", ports) for site_id, to, ports in published(spec, topology))


def _by_site(services: Iterable[Service]) -> dict[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for service in sorted(services):
        at = found[service.site_id]
        at[service.key] = tuple(sorted({*at.get(service.key, ()), *service.ports}))
    return dict(found)


def _winner(listeners: dict[Place, _Listener], claim: Claim) -> Placement | None:
    listener = listeners.get(claim.place)
    return listener.winner(claim) if listener else None


def _conflicted(site: tuple[str, str], loser: Placement, claim: Claim, winner: Placement) -> Condition:
    what = f"{claim.protocol} {place_key(claim.place)}" + (f" for {claim.domain}" if claim.domain else "")
    site_id, name = site
    message = f"at site {name} {winner.target[0]} {winner.key} is older and has the listener of {what}"
    return Condition(*loser.target, "Conflicted", message, site_id)


def _items(listeners: dict[Place, _Listener]) -> tuple[CompiledItem, ...]:
    return tuple(
        _item(place, listener.protocol, tuple(dict.fromkeys(owner.key for owner in listener.owners.values())))
        for place, listener in listeners.items()
    )


@lru_cache(CACHE)
def _item(place: Place, protocol: Protocol, load_balancers: tuple[str, ...]) -> CompiledItem:
    body = items.Listener(
        network=place.network, address=place.address or None, port=place.port, protocol=protocol, load_balancers=load_balancers
    )
    return CompiledItem.of(ItemKind.LISTENER, place_key(place), body)


def place_key(place: Place) -> str:
    return f"{place.network}/{place.address or '*'}/{place.port}"
