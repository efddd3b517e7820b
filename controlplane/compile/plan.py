"""What all sites of a tenant share: which load balancer is where, who uses which pool, and the items that do not depend on the site.

Worked out once per intent, from the plan of the intent before it: what both share is taken over, so that a change costs what it touches.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeVar

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
from controlplane.compile.references import Target
from controlplane.compile.snapshot import CompiledItem, Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.healthcheck import Healthcheck
from controlplane.resources.origin_pool import OriginPool

LOAD_BALANCERS = ("http_loadbalancer", "tcp_loadbalancer")
POOL = "origin_pool"

G = TypeVar("G", bound=Hashable)
M = TypeVar("M", bound=Hashable)


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
    """Of all load balancers that are not disabled, oldest first."""
    barred: Mapping[Placement, Condition]
    """Why some may not be on regional edges, oldest first."""
    wanted: Mapping[str, tuple[Placement, ...]]
    """By site, oldest first: the load balancers that are advertised there."""
    listeners: Mapping[str, SiteListeners]
    """By site."""
    load_balancers: Mapping[Placement, PlannedLoadBalancer]
    """Oldest first."""
    users: Mapping[Key, tuple[PlannedLoadBalancer, ...]]
    """By pool; also of pools that are not there."""
    pools: Mapping[Key, PlannedPool]
    served: Mapping[str, tuple[PlannedPool, ...]]
    """By site, the pools that have it among their `sites`."""

    @cached_property
    def refused(self) -> tuple[Condition, ...]:
        """What regional edges do not do."""
        return (*self.barred.values(), *_undialled(self.load_balancers, self.pools))

    @cached_property
    def overruled(self) -> tuple[Condition, ...]:
        """Load balancers that want something else of lost sites than an older one that uses the same pool. Sorted."""
        found = (_overruled(key, oldest(users), user) for key, users in self.users.items() for user in users)
        return tuple(sorted((condition for condition in found if condition), key=attrgetter("kind", "key", "message")))

    @cached_property
    def publications(self) -> Mapping[str, Publications]:
        """By site, where there are any."""
        listening = ((each.placement, each.sites) for each in self.load_balancers.values() if each.placement.publishes)
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
    """The same whichever intent was before."""
    where = topology(intent)
    before = intent.before and intent.before()
    known = plan(before) if before else None
    if known is None or known.topology is not where or not _comparable(known.intent, intent):
        known = _nothing(intent, where)
    return _changed(known, intent)


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


def _changed(known: Plan, intent: Intent) -> Plan:
    """The plan of an intent that differs from a known plan's in nothing but load balancers and pools."""
    where = known.topology
    others = {(kind, key) for kind in LOAD_BALANCERS for key in _differing(kind, known.intent, intent)}
    gone = {known.placements[target] for target in others & known.placements.keys()}
    new = {placement(stored, where) for target in others if (stored := intent.find(*target))}
    placements = _placements(known, others, new)
    barred = _barred(known, placements.values(), new, intent)
    claimed = ((site_id, each) for each in new for site_id in each.claims if site_id not in where.edges or each not in barred)
    wanted = _regrouped(known.wanted, ((site_id, each) for each in gone for site_id in each.claims), claimed, attrgetter("rank"))
    listeners = {site_id: _listeners(site_id, at_site, known) for site_id, at_site in wanted.items()}

    pools = _differing(POOL, known.intent, intent)
    affected = {
        *gone,
        *new,
        *_displaced(known.listeners, listeners),
        *(user.placement for key in pools for user in known.users.get(key, ())),
    }
    planned = {each: _planned(each, listeners, known.policies, intent, where) for each in affected - (gone - new)}
    load_balancers = {
        each: found for each in placements.values() if (found := planned[each] if each in planned else known.load_balancers.get(each))
    }
    unused = ((key, known.load_balancers[each]) for each in affected & known.load_balancers.keys() for key in each.pools)
    used = ((key, found) for each, found in planned.items() if found for key in each.pools)
    users = _regrouped(known.users, unused, used, attrgetter("rank"))

    pools |= {key for each in affected for key in each.pools}
    made = {key: pool for key in pools if (pool := _planned_pool(key, users.get(key, ()), intent, where))}
    replaced = {key: known.pools[key] for key in pools & known.pools.keys()}
    kept = {key: pool for key, pool in known.pools.items() if key not in pools}
    served = _regrouped(known.served, _serving(replaced), _serving(made), attrgetter("key"))
    return Plan(intent, where, known.policies, placements, barred, wanted, listeners, load_balancers, users, {**kept, **made}, served)


def _differing(kind: str, before: Intent, intent: Intent) -> set[Key]:
    """Keys of the objects that are not the very same in both."""
    old, new = before.of(kind), intent.of(kind)
    if old is new:
        return set()
    return {key for key, stored in new.items() if old.get(key) is not stored} | (old.keys() - new.keys())


def _regrouped(
    groups: Mapping[G, tuple[M, ...]], leaving: Iterable[tuple[G, M]], joining: Iterable[tuple[G, M]], order: Callable[[M], Any]
) -> dict[G, tuple[M, ...]]:
    """The groups with other members, each sorted; one without members is none."""
    out: dict[G, set[M]] = defaultdict(set)
    for group, member in leaving:
        out[group].add(member)
    into: dict[G, list[M]] = defaultdict(list)
    for group, member in joining:
        into[group].append(member)
    found = dict(groups)
    for group in out.keys() | into.keys():
        left = out.get(group, ())
        members = [*(member for member in found.pop(group, ()) if member not in left), *into.get(group, ())]
        if members:
            found[group] = tuple(sorted(members, key=order))
    return found


def _serving(pools: Mapping[Key, PlannedPool]) -> Iterator[tuple[str, PlannedPool]]:
    return ((site_id, pool) for pool in pools.values() for site_id in pool.sites)


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


def _placements(known: Plan, others: Collection[Target], new: Iterable[Placement]) -> dict[Target, Placement]:
    """Oldest first. `others`: load balancers of which nothing known holds."""
    added = {(each.stored.kind, each.stored.key): each for each in new}
    if added.keys() == others and all(
        target in known.placements and known.placements[target].rank == added[target].rank for target in others
    ):
        return {**known.placements, **added}
    kept = {target: each for target, each in known.placements.items() if target not in others}
    return dict(sorted({**kept, **added}.items(), key=lambda item: item[1].rank))


def _barred(known: Plan, placements: Iterable[Placement], new: Iterable[Placement], intent: Intent) -> dict[Placement, Condition]:
    """`placements` are all, oldest first."""
    fresh = {each: found for each in new if (found := public_names.barred(each, known.topology, intent.names))}
    every = {**known.barred, **fresh}
    return {each: every[each] for each in placements if each in every}


def _listeners(site_id: str, wanted: tuple[Placement, ...], known: Plan) -> SiteListeners:
    if known.wanted.get(site_id) is wanted:
        return known.listeners[site_id]
    return settle(site_id, known.topology.sites[site_id].metadata.name, wanted)


def _displaced(before: Mapping[str, SiteListeners], after: Mapping[str, SiteListeners]) -> Iterator[Placement]:
    """Load balancers that listen at other sites than before."""
    for site_id in before.keys() | after.keys():
        if (old := before.get(site_id)) is not (new := after.get(site_id)):
            yield from (old.holders if old else frozenset()) ^ (new.holders if new else frozenset())


def _planned(
    balancer: Placement, listeners: Mapping[str, SiteListeners], policies: Mapping[str, CompiledPolicy], intent: Intent, where: Topology
) -> PlannedLoadBalancer | None:
    """None if it listens nowhere."""
    sites = tuple([site_id for site_id in balancer.claims if site_id in listeners and balancer in listeners[site_id].holders])
    if not sites:
        return None
    edges = tuple([site_id for site_id in sites if site_id in where.edges])
    missing = frozenset([key for key in balancer.pools if not intent.find(POOL, key)])
    return _load_balancer(balancer, sites, edges, missing, *_applied(balancer.policies, policies, intent))


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


def oldest(users: Iterable[PlannedLoadBalancer]) -> PlannedLoadBalancer:
    return min(users, key=lambda user: user.placement.rank)


def _planned_pool(key: Key, users: tuple[PlannedLoadBalancer, ...], intent: Intent, where: Topology) -> PlannedPool | None:
    """None if nothing uses it, or it is not there."""
    stored = intent.find(POOL, key) if users else None
    return _pool(stored, _health_checks(stored, intent), users, where) if stored else None


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
