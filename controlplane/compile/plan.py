"""What all sites of a tenant share: which load balancer is where, who uses which pool, and the items that do not depend on the site.

Worked out once per intent. What depends on one object only is remembered per object, so that after a change the rest is looked up.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Literal, NamedTuple

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile import public_names
from controlplane.compile.intent import CACHE, Intent
from controlplane.compile.listeners import Placement, SiteListeners, placement, settle
from controlplane.compile.load_balancers import exempts_routes, load_balancer_item, lost_sites
from controlplane.compile.members import Topology, topology
from controlplane.compile.policies import CompiledPolicy, compile_policy
from controlplane.compile.pools import Locations, locations, pool_item
from controlplane.compile.publications import Publications, publications
from controlplane.compile.snapshot import CompiledItem, Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.healthcheck import Healthcheck
from controlplane.resources.origin_pool import OriginPool

LOAD_BALANCERS = ("http_loadbalancer", "tcp_loadbalancer")


class Use(NamedTuple):
    """That a load balancer calls a pool."""

    load_balancer: str
    protocol: Literal["http", "tcp"]
    sites: tuple[str, ...]
    """Customer edges where it is advertised: ids, sorted."""
    edges: tuple[str, ...]
    """Regional edges where it is."""
    policies: tuple[str, ...] | None
    policy_headers: tuple[str, ...]
    exempt_routes: bool


class Export(NamedTuple):
    pool: Key
    item: CompiledItem
    callers: frozenset[str]
    """Ids of other sites."""
    edges: frozenset[str]
    """Ids of regional edges that call it."""
    policies: frozenset[str]
    """Keys of those that apply here."""


@dataclass(frozen=True, eq=False)
class PlannedLoadBalancer:
    """One that listens somewhere. The same for the same circumstances."""

    placement: Placement
    sites: tuple[str, ...]
    """With the regional edges."""
    item: CompiledItem
    use: Use
    """What it does with each of its pools."""


@dataclass(frozen=True, eq=False)
class PlannedPool:
    """One that a load balancer uses. The same for the same circumstances."""

    key: Key
    item: CompiledItem
    locations: Locations
    local_only: bool
    uses: tuple[Use, ...]
    """Sorted."""


@dataclass(frozen=True, eq=False)
class Plan:
    intent: Intent
    topology: Topology
    wanted: Mapping[str, tuple[Placement, ...]]
    """By site, oldest first: the load balancers that are advertised there."""
    listeners: Mapping[str, SiteListeners]
    """By site."""
    load_balancers: Mapping[Placement, PlannedLoadBalancer]
    policies: Mapping[str, CompiledPolicy]
    """By key; all that are not disabled."""
    users: Mapping[Key, tuple[PlannedLoadBalancer, ...]]
    """By pool; also of pools that are not there."""
    pools: Mapping[Key, PlannedPool]
    refused: tuple[Condition, ...]
    """What regional edges do not do."""

    @cached_property
    def served(self) -> Mapping[str, tuple[PlannedPool, ...]]:
        """By site, the pools whose origins it may serve to others, or to its own TCP load balancers."""
        found: dict[str, list[PlannedPool]] = defaultdict(list)
        for pool in self.pools.values():
            here = set(pool.locations.all)
            if pool.locations.anywhere:
                here.update(site for use in pool.uses if use.protocol == "tcp" for site in use.sites)
            for site_id in here:
                found[site_id].append(pool)
        return {site_id: tuple(pools) for site_id, pools in found.items()}

    @cached_property
    def overruled(self) -> tuple[Condition, ...]:
        """Load balancers that want something else of lost sites than an older one that uses the same pool. Sorted."""
        found = (_overruled(key, oldest(users), user) for key, users in self.users.items() for user in users)
        return tuple(sorted((condition for condition in found if condition), key=attrgetter("kind", "key", "message")))

    @cached_property
    def publications(self) -> Mapping[str, Publications]:
        """By site, where there are any."""
        listening = ((each.placement, each.sites) for each in self.load_balancers.values())
        return publications(listening, self.intent.imports, self.topology)

    def accepted(self, site_id: str) -> tuple[Placement, ...]:
        listeners = self.listeners.get(site_id)
        return listeners.accepted if listeners else ()

    def called(self, placements: Iterable[Placement]) -> frozenset[PlannedPool]:
        """The pools that these load balancers use."""
        return frozenset(pool for placement in placements for key in placement.pools if (pool := self.pools.get(key)))

    def exports(self, site_id: str) -> tuple[Export, ...]:
        """What the site serves to gateways."""
        return tuple(made for pool in self.served.get(site_id, ()) if (made := export(site_id, pool)))

    def peers(self, site_id: str, exports: Iterable[Export]) -> frozenset[str]:
        """Ids of the other sites that this one calls, or serves with its exports. The relation is symmetric."""
        serving = (pool.locations.all for pool in self.called(self.accepted(site_id)) if not pool.local_only)
        return frozenset[str]().union(*serving, *(made.callers for made in exports)) - {site_id}


def _overruled(pool: Key, first: PlannedLoadBalancer, user: PlannedLoadBalancer) -> Condition | None:
    decided, wanted = (lost_sites(each.placement.stored.spec) for each in (first, user))
    if decided == wanted:
        return None
    winner, loser = first.placement.stored, user.placement.stored
    message = f"{winner.kind} {winner.key} is older and decides for origin_pool {pool} what becomes of lost sites: {decided}, not {wanted}"
    return Condition(loser.kind, loser.key, "Conflicted", message)


@lru_cache(64)
def plan(intent: Intent) -> Plan:
    where = topology(intent)
    placements = _placements(intent, where)
    barred = {each: found for each in placements if (found := public_names.barred(each, where, intent.names))}
    wanted = _by_site(placements, barred, where)
    listeners = {site_id: settle(site_id, where.sites[site_id].metadata.name, at_site) for site_id, at_site in wanted.items()}
    policies = {str(stored.key): compile_policy(stored, where) for stored in intent.enabled("service_policy")}
    load_balancers = _load_balancers(placements, listeners, policies, intent, where)
    users = _users(load_balancers.values())
    pools = _pools(users, where, intent)
    return Plan(
        intent, where, wanted, listeners, load_balancers, policies, users, pools, (*barred.values(), *_undialled(load_balancers, pools))
    )


def _undialled(load_balancers: Mapping[Placement, PlannedLoadBalancer], pools: Mapping[Key, PlannedPool]) -> Iterator[Condition]:
    """Regional edges dial nothing but tunnels."""
    for balancer, planned in load_balancers.items():
        for key in sorted(balancer.pools) if planned.use.edges else ():
            if key in pools and pools[key].locations.anywhere:
                message = f"regional edges reach what is at sites, and not the public origin servers of origin_pool {key}"
                yield Condition(balancer.stored.kind, balancer.stored.key, "Unreachable", message)


@lru_cache(CACHE)
def export(site_id: str, pool: PlannedPool) -> Export | None:
    """None when nobody may call the pool here.

    A site dials its own origins of HTTP load balancers directly, those of TCP load balancers through its own gateway.
    """
    made = (_export_use(site_id, use, pool) for use in pool.uses)
    allowed = tuple(use for use in made if use.peers or use.edges)
    if not allowed:
        return None
    return Export(
        pool=pool.key,
        item=CompiledItem.of(ItemKind.EXPORT, str(pool.key), items.Export(pool=str(pool.key), uses=allowed)),
        callers=frozenset(peer for use in allowed for peer in use.peers) - {site_id},
        edges=frozenset(edge for use in allowed for edge in use.edges),
        policies=frozenset(policy for use in allowed for policy in use.policies or ()),
    )


def _export_use(site_id: str, use: Use, pool: PlannedPool) -> items.ExportUse:
    open_to_others = not pool.local_only and site_id in pool.locations.all
    return items.ExportUse(
        load_balancer=use.load_balancer,
        protocol=use.protocol,
        peers=tuple(site for site in use.sites if (use.protocol == "tcp" if site == site_id else open_to_others)),
        edges=use.edges if open_to_others else (),
        policies=use.policies,
        policy_headers=use.policy_headers,
        exempt_routes=use.exempt_routes,
    )


def _placements(intent: Intent, where: Topology) -> list[Placement]:
    """Oldest first."""
    stored = (stored for kind in LOAD_BALANCERS for stored in intent.of(kind).values() if not stored.metadata.disable)
    return sorted((placement(each, where) for each in stored), key=attrgetter("rank"))


def _by_site(placements: Iterable[Placement], barred: Collection[Placement], where: Topology) -> Mapping[str, tuple[Placement, ...]]:
    """`barred`: those that may not be on regional edges."""
    found: dict[str, list[Placement]] = defaultdict(list)
    for candidate in placements:
        for site_id in candidate.claims:
            if site_id not in where.edges or candidate not in barred:
                found[site_id].append(candidate)
    return {site_id: tuple(at_site) for site_id, at_site in found.items()}


def _load_balancers(
    placements: Iterable[Placement],
    listeners: Mapping[str, SiteListeners],
    policies: Mapping[str, CompiledPolicy],
    intent: Intent,
    where: Topology,
) -> Mapping[Placement, PlannedLoadBalancer]:
    """In the order of `placements`, which is oldest first."""
    at: dict[Placement, list[str]] = defaultdict(list)
    for site_id in sorted(listeners):
        for balancer in listeners[site_id].accepted:
            at[balancer].append(site_id)
    pools = {key for key, stored in intent.of("origin_pool").items() if not stored.metadata.disable}
    found = {}
    for balancer in placements:
        if balancer not in at:
            continue
        sites = tuple(at[balancer])
        edges = tuple(site_id for site_id in sites if site_id in where.edges)
        applied = _applied(balancer.policies, policies, intent)
        found[balancer] = _load_balancer(balancer, sites, edges, balancer.pools - pools, *applied)
    return found


@lru_cache(CACHE)
def _load_balancer(
    placement: Placement,
    sites: tuple[str, ...],
    edges: tuple[str, ...],
    missing: frozenset[Key],
    policies: tuple[str, ...] | None,
    policy_headers: tuple[str, ...],
) -> PlannedLoadBalancer:
    item = load_balancer_item(placement.stored, missing, policies)
    customers = tuple(site_id for site_id in sites if site_id not in edges) if edges else sites
    use = Use(
        str(placement.stored.key),
        "tcp" if placement.tcp else "http",
        customers,
        edges,
        policies,
        policy_headers,
        exempts_routes(placement.stored.spec),
    )
    return PlannedLoadBalancer(placement, sites, item, use)


def _applied(
    asked: tuple[Key, ...] | None, policies: Mapping[str, CompiledPolicy], intent: Intent
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The policies that apply, and the headers that they look at.

    What is disabled does not apply; what is not there must not open a door, so then the rest decides, even if it is nothing.
    """
    if asked is None:
        return None, ()
    there = tuple(str(key) for key in asked if str(key) in policies)
    if not there and all(key in intent.of("service_policy") for key in asked):
        return None, ()
    return there, tuple(sorted(frozenset[str]().union(*(policies[key].headers for key in there))))


def _users(load_balancers: Iterable[PlannedLoadBalancer]) -> Mapping[Key, tuple[PlannedLoadBalancer, ...]]:
    found: dict[Key, list[PlannedLoadBalancer]] = defaultdict(list)
    for planned in load_balancers:
        for key in planned.placement.pools:
            found[key].append(planned)
    return {key: tuple(users) for key, users in found.items()}


def oldest(users: Iterable[PlannedLoadBalancer]) -> PlannedLoadBalancer:
    return min(users, key=lambda user: user.placement.rank)


def _pools(users: Mapping[Key, tuple[PlannedLoadBalancer, ...]], where: Topology, intent: Intent) -> Mapping[Key, PlannedPool]:
    found = ((key, intent.find("origin_pool", key), by) for key, by in users.items())
    return {key: _pool(stored, _health_checks(stored, intent), by, where) for key, stored, by in found if stored}


def _health_checks(pool: Stored[OriginPool], intent: Intent) -> tuple[Stored[Healthcheck], ...]:
    refs = pool.spec.healthcheck
    return tuple([found for ref in refs if (found := intent.find("healthcheck", ref.key))]) if refs else ()


@lru_cache(CACHE)
def _pool(
    stored: Stored[OriginPool],
    health_checks: tuple[Stored[Healthcheck], ...],
    users: tuple[PlannedLoadBalancer, ...],
    where: Topology,
) -> PlannedPool:
    """`LB_OVERRIDE` becomes the algorithm on which all load balancers that use the pool agree; else they hash, each in its own way.

    What becomes of lost sites the oldest of them decides.
    """
    at = locations(stored, where)
    algorithms = {user.placement.algorithm for user in users}
    item = pool_item(
        stored,
        health_checks,
        at.each,
        algorithms.pop() if len(algorithms) == 1 else "LB_OVERRIDE",
        lost_sites(oldest(users).placement.stored.spec),
    )
    uses = tuple(sorted((user.use for user in users), key=lambda use: use[:2]))
    return PlannedPool(stored.key, item, at, stored.spec.endpoint_selection == "LOCAL_ONLY", uses)
