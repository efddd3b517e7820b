"""What all sites of a tenant share: which load balancer is where, who uses which pool, and the items that do not depend on the site.

Worked out once per intent, from the plan of the intent before it: what both share is taken over, so that a change costs what it touches.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeVar

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile import public_names
from controlplane.compile.claims import LoadBalancer
from controlplane.compile.intent import CACHE, Intent, Target
from controlplane.compile.listeners import Placement, SiteListeners, placement, settle
from controlplane.compile.load_balancers import Algorithm, exempts_routes, load_balancer_item
from controlplane.compile.members import Topology, topology
from controlplane.compile.policies import CompiledPolicy, compile_policy
from controlplane.compile.pools import Locations, locations, pool_item
from controlplane.compile.publications import Publications, publications
from controlplane.compile.snapshot import CompiledItem, Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.healthcheck import Healthcheck
from controlplane.resources.origin_pool import OriginPool

LOAD_BALANCERS = ("http_loadbalancer", "tcp_loadbalancer")
POOL = "origin_pool"

K = TypeVar("K", bound=Hashable)
M = TypeVar("M", bound=Hashable)
V = TypeVar("V")


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

    @property
    def rank(self) -> tuple[int, str, Key]:
        return self.placement.rank


@dataclass(frozen=True, eq=False)
class PlannedPool:
    """One that a load balancer uses. The same for the same circumstances."""

    key: Key
    item: CompiledItem
    locations: Locations
    local_only: bool
    uses: tuple[Use, ...]
    """Sorted."""

    @cached_property
    def sites(self) -> frozenset[str]:
        """Ids of those that may serve its origins to others, or to their own TCP load balancers."""
        if not self.locations.anywhere:
            return self.locations.all
        return self.locations.all.union(*(use.sites for use in self.uses if use.protocol == "tcp"))


@dataclass(frozen=True, eq=False)
class Plan:
    intent: Intent
    topology: Topology
    policies: Mapping[str, CompiledPolicy]
    """By key; all that are not disabled."""
    placements: Mapping[Target, Placement]
    """Of all load balancers that are not disabled."""
    barred: Mapping[Placement, Condition]
    """Why some may not be on regional edges."""
    wanted: Mapping[str, tuple[Placement, ...]]
    """By site, oldest first: the load balancers that are advertised there."""
    listeners: Mapping[str, SiteListeners]
    """By site."""
    load_balancers: Mapping[Placement, PlannedLoadBalancer]
    users: Mapping[Key, tuple[PlannedLoadBalancer, ...]]
    """By pool; also of pools that are not there."""
    pools: Mapping[Key, PlannedPool]
    served: Mapping[str, tuple[PlannedPool, ...]]
    """By site, the pools that have it among their `sites`."""

    @cached_property
    def refused(self) -> tuple[Condition, ...]:
        """What regional edges do not do, for the oldest load balancers first."""
        undialled = _undialled(sorted(self.load_balancers.values(), key=attrgetter("rank")), self.pools)
        return (*(self.barred[each] for each in sorted(self.barred, key=attrgetter("rank"))), *undialled)

    @cached_property
    def overruled(self) -> tuple[Condition, ...]:
        """Load balancers that want something else of lost sites than an older one that uses the same pool. Sorted."""
        found = (_overruled(key, oldest(users), user) for key, users in self.users.items() for user in users)
        return tuple(sorted((condition for condition in found if condition), key=attrgetter("kind", "key", "message")))

    def publications(self, site_id: str) -> Publications:
        return publications(site_id, self.accepted(site_id), self.intent.imports, self.topology)

    def accepted(self, site_id: str) -> tuple[Placement, ...]:
        listeners = self.listeners.get(site_id)
        return listeners.accepted if listeners else ()

    def called(self, site_id: str) -> tuple[PlannedPool, ...]:
        """The pools that load balancers use there, sorted by key."""
        listeners = self.listeners.get(site_id)
        return tuple([pool for key in listeners.pools if (pool := self.pools.get(key))]) if listeners else ()

    def exports(self, site_id: str) -> tuple[Export, ...]:
        """What the site serves to gateways."""
        return tuple(made for pool in self.served.get(site_id, ()) if (made := export(site_id, pool)))

    def peers(self, site_id: str) -> frozenset[str]:
        """Ids of the other sites that this one calls, or serves with its exports. The relation is symmetric."""
        return peers(site_id, self.called(site_id), self.exports(site_id))


def peers(site_id: str, called: Iterable[PlannedPool], exports: Iterable[Export]) -> frozenset[str]:
    """See `Plan.peers`."""
    serving = (pool.locations.all for pool in called if not pool.local_only)
    return frozenset[str]().union(*serving, *(made.callers for made in exports)) - {site_id}


def _overruled(pool: Key, first: PlannedLoadBalancer, user: PlannedLoadBalancer) -> Condition | None:
    decided, wanted = (each.placement.needs.lost_sites for each in (first, user))
    if decided == wanted:
        return None
    kind, key = first.placement.target
    message = f"{kind} {key} is older and decides for origin_pool {pool} what becomes of lost sites: {decided}, not {wanted}"
    return Condition(*user.placement.target, "Conflicted", message)


@lru_cache(64)
def plan(intent: Intent) -> Plan:
    """The same whichever intent was before."""
    where = topology(intent)
    before = intent.before and intent.before()
    known = plan(before) if before else None
    if known and known.topology is where and _comparable(known.intent, intent):
        return _changed(known, intent, intent.touched)
    return _changed(_nothing(intent, where), intent, {(kind, key) for kind in (*LOAD_BALANCERS, POOL) for key in intent.of(kind)})


def _comparable(before: Intent, intent: Intent) -> bool:
    """Whether nothing is different on which a load balancer or pool may depend that did not change itself."""
    return before.names == intent.names and all(
        before.objects.get(kind) is intent.objects.get(kind) for kind in ("service_policy", "healthcheck")
    )


def _nothing(intent: Intent, where: Topology) -> Plan:
    """The plan without load balancers and pools."""
    rest = {kind: of_kind for kind, of_kind in intent.objects.items() if kind not in (*LOAD_BALANCERS, POOL)}
    policies = {str(stored.key): compile_policy(stored, where) for stored in intent.enabled("service_policy")}
    return Plan(replace(intent, objects=rest), where, policies, {}, {}, {}, {}, {}, {}, {}, {})


def _changed(known: Plan, intent: Intent, touched: Iterable[Target]) -> Plan:
    """The plan of an intent that differs from a known plan's in nothing but these load balancers and pools.

    Only what they lead to is looked at. Of the rest there are copies of whole mappings, which are cheap.
    """
    where = known.topology
    targets = {(kind, key) for kind, key in touched if kind in LOAD_BALANCERS}
    before = {target: known.placements[target] for target in targets & known.placements.keys()}
    after = {target: placement(stored, where) for target in targets if (stored := intent.find(*target))}
    gone, new = {*before.values()} - {*after.values()}, {*after.values()} - {*before.values()}
    barred = _with(known.barred, gone, {each: why for each in new if (why := public_names.barred(each, where, intent.names))})
    leaving = [(site_id, each) for each in gone for site_id in each.claims]
    joining = [(site_id, each) for each in new for site_id in each.claims if site_id not in where.edges or each not in barred]
    wanted = _regrouped(known.wanted, leaving, joining, attrgetter("rank"))
    settled = {site_id for site_id, _ in (*leaving, *joining)}
    listeners = _with(known.listeners, settled, _listeners(settled & wanted.keys(), wanted, where))

    pools = {key for kind, key in touched if kind == POOL}
    displaced = (each for site_id in settled for each in _displaced(known.listeners.get(site_id), listeners.get(site_id)))
    calling = (user.placement for key in pools for user in known.users.get(key, ()))
    affected = {*before.values(), *after.values(), *displaced, *calling}
    planned = {each: _planned(each, listeners, known.policies, intent, where) for each in affected - gone}
    load_balancers = _with(known.load_balancers, affected, {each: found for each, found in planned.items() if found})
    replaced = _differing(known.load_balancers, load_balancers, affected)
    users = _regrouped(known.users, _using(known.load_balancers, replaced), _using(load_balancers, replaced), attrgetter("rank"))

    pools |= {key for each in replaced for key in each.needs.pools}
    made = {key: pool for key in pools if (pool := _planned_pool(key, users.get(key, ()), intent, where))}
    every = _with(known.pools, pools, made)
    remade = _differing(known.pools, every, pools)
    served = _regrouped(known.served, _serving(known.pools, remade), _serving(every, remade), attrgetter("key"))
    placements = _with(known.placements, before, after)
    return Plan(intent, where, known.policies, placements, barred, wanted, listeners, load_balancers, users, every, served)


def _with(known: Mapping[K, V], gone: Iterable[K], new: Mapping[K, V]) -> Mapping[K, V]:
    """Without some keys, but with others. What stays in its place is copied fastest."""
    lost = [key for key in gone if key in known and key not in new]
    changed = {key: value for key, value in new.items() if known.get(key) is not value}
    if not lost and not changed:
        return known
    found = {**known, **changed}
    for key in lost:
        del found[key]
    return found


def _differing(before: Mapping[K, V], after: Mapping[K, V], keys: Iterable[K]) -> tuple[K, ...]:
    """Those of the keys whose values are not the very same."""
    return tuple([key for key in keys if before.get(key) is not after.get(key)])


def _regrouped(
    groups: Mapping[K, tuple[M, ...]], leaving: Iterable[tuple[K, M]], joining: Iterable[tuple[K, M]], order: Callable[[M], Any]
) -> Mapping[K, tuple[M, ...]]:
    """The groups with other members, each sorted; one without members is none."""
    out: dict[K, set[M]] = defaultdict(set)
    for group, member in leaving:
        out[group].add(member)
    into: dict[K, list[M]] = defaultdict(list)
    for group, member in joining:
        into[group].append(member)
    changed = out.keys() | into.keys()
    members = {group: [*(each for each in groups.get(group, ()) if each not in out[group]), *into[group]] for group in changed}
    return _with(groups, changed, {group: tuple(sorted(own, key=order)) for group, own in members.items() if own})


def _using(
    load_balancers: Mapping[Placement, PlannedLoadBalancer], placements: Iterable[Placement]
) -> Iterator[tuple[Key, PlannedLoadBalancer]]:
    """Pools, and who of these uses them."""
    return ((key, found) for each in placements if (found := load_balancers.get(each)) for key in each.needs.pools)


def _serving(pools: Mapping[Key, PlannedPool], keys: Iterable[Key]) -> Iterator[tuple[str, PlannedPool]]:
    """Sites, and which of these they may serve."""
    return ((site_id, pool) for key in keys if (pool := pools.get(key)) for site_id in pool.sites)


def _undialled(load_balancers: Iterable[PlannedLoadBalancer], pools: Mapping[Key, PlannedPool]) -> Iterator[Condition]:
    """Regional edges dial nothing but tunnels."""
    for balancer in load_balancers:
        for key in sorted(balancer.placement.needs.pools) if balancer.use.edges else ():
            if key in pools and pools[key].locations.anywhere:
                message = f"regional edges reach what is at sites, and not the public origin servers of origin_pool {key}"
                yield Condition(*balancer.placement.target, "Unreachable", message)


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


def _listeners(site_ids: Iterable[str], wanted: Mapping[str, tuple[Placement, ...]], where: Topology) -> dict[str, SiteListeners]:
    return {site_id: settle(site_id, where.sites[site_id].metadata.name, wanted[site_id]) for site_id in site_ids}


def _displaced(before: SiteListeners | None, after: SiteListeners | None) -> frozenset[Placement]:
    """Load balancers that listen there now and did not before, or the other way round."""
    return (before.holders if before else frozenset()) ^ (after.holders if after else frozenset())


def _planned(
    balancer: Placement, listeners: Mapping[str, SiteListeners], policies: Mapping[str, CompiledPolicy], intent: Intent, where: Topology
) -> PlannedLoadBalancer | None:
    """None if it listens nowhere."""
    sites = tuple([site_id for site_id in balancer.claims if site_id in listeners and balancer in listeners[site_id].holders])
    if not sites:
        return None
    edges = tuple([site_id for site_id in sites if site_id in where.edges])
    stored = intent.of(balancer.target[0])[balancer.target[1]]
    missing = frozenset([key for key in balancer.needs.pools if not intent.find(POOL, key)])
    return _load_balancer(stored, balancer, sites, edges, missing, *_applied(balancer.needs.policies, policies, intent))


@lru_cache(CACHE)
def _load_balancer(
    stored: Stored[LoadBalancer],
    placement: Placement,
    sites: tuple[str, ...],
    edges: tuple[str, ...],
    missing: frozenset[Key],
    policies: tuple[str, ...] | None,
    policy_headers: tuple[str, ...],
) -> PlannedLoadBalancer:
    item = load_balancer_item(stored, missing, policies)
    customers = tuple(site_id for site_id in sites if site_id not in edges) if edges else sites
    use = Use(
        placement.key,
        "tcp" if placement.tcp else "http",
        customers,
        edges,
        policies,
        policy_headers,
        exempts_routes(stored.spec),
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


def oldest(users: Iterable[PlannedLoadBalancer]) -> PlannedLoadBalancer:
    return min(users, key=lambda user: user.placement.rank)


def _planned_pool(key: Key, users: tuple[PlannedLoadBalancer, ...], intent: Intent, where: Topology) -> PlannedPool | None:
    """None if nothing uses it, or it is not there.

    `LB_OVERRIDE` becomes the algorithm on which all load balancers that use the pool agree; else they hash, each in its own way. What becomes
    of lost sites the oldest of them decides.
    """
    stored = intent.find(POOL, key) if users else None
    if stored is None:
        return None
    algorithms = {user.placement.needs.algorithm for user in users}
    algorithm = algorithms.pop() if len(algorithms) == 1 else "LB_OVERRIDE"
    uses = tuple(sorted((user.use for user in users), key=lambda use: use[:2]))
    return _pool(stored, _health_checks(stored, intent), algorithm, oldest(users).placement.needs.lost_sites, uses, where)


def _health_checks(pool: Stored[OriginPool], intent: Intent) -> tuple[Stored[Healthcheck], ...]:
    refs = pool.spec.healthcheck
    return tuple([found for ref in refs if (found := intent.find("healthcheck", ref.key))]) if refs else ()


@lru_cache(CACHE)
def _pool(
    stored: Stored[OriginPool],
    health_checks: tuple[Stored[Healthcheck], ...],
    algorithm: Algorithm,
    lost_sites: items.LostSites,
    uses: tuple[Use, ...],
    where: Topology,
) -> PlannedPool:
    at = locations(stored, where)
    item = pool_item(stored, health_checks, at.each, algorithm, lost_sites)
    return PlannedPool(stored.key, item, at, stored.spec.endpoint_selection == "LOCAL_ONLY", uses)
