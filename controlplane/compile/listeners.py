"""Which load balancers listen at a site, and which of them had to give way."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.claims import LoadBalancer, advertised, claimed
from controlplane.compile.intent import CACHE
from controlplane.compile.load_balancers import Algorithm, algorithm
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem, Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.claim import Claim, Place, Protocol
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer


@dataclass(frozen=True, eq=False)
class Placement:
    """A load balancer in a topology, and what others need to know of it. The same for the same two, so it is a cheap key of caches."""

    stored: Stored[LoadBalancer]
    key: str
    """`namespace/name`."""
    rank: tuple[int, str, Key]
    """Who comes first in a conflict: the oldest."""
    tcp: bool
    claims: dict[str, tuple[Claim, ...]]
    """By site; both are sorted."""
    pools: frozenset[Key]
    policies: tuple[Key, ...] | None
    """In the order of evaluation; None: no policy was asked for."""
    algorithm: Algorithm
    publishes: bool
    """Whether Services of clusters are to stand for it, or may: those of imports do for any that speaks TCP."""


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


@lru_cache(CACHE)
def placement(stored: Stored[LoadBalancer], topology: Topology) -> Placement:
    claims: dict[str, list[Claim]] = {}
    for claim in sorted(claimed(stored, topology)):
        claims.setdefault(claim.site_id, []).append(claim)
    spec = stored.spec
    return Placement(
        stored=stored,
        key=str(stored.key),
        rank=(stored.created_revision, stored.kind, stored.key),
        tcp=isinstance(spec, TcpLoadBalancer),
        claims={site_id: tuple(at_site) for site_id, at_site in claims.items()},
        pools=_pools(spec),
        policies=tuple(ref.key for ref in spec.active_service_policies.policies) if spec.active_service_policies else None,
        algorithm=algorithm(spec),
        publishes=isinstance(spec, TcpLoadBalancer) or any(where.publish for where in advertised(spec)),
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


def _winner(listeners: dict[Place, _Listener], claim: Claim) -> Placement | None:
    listener = listeners.get(claim.place)
    return listener.winner(claim) if listener else None


def _conflicted(site: tuple[str, str], loser: Placement, claim: Claim, winner: Placement) -> Condition:
    what = f"{claim.protocol} {place_key(claim.place)}" + (f" for {claim.domain}" if claim.domain else "")
    site_id, name = site
    message = f"at site {name} {winner.stored.kind} {winner.key} is older and has the listener of {what}"
    return Condition(loser.stored.kind, loser.stored.key, "Conflicted", message, site_id)


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
