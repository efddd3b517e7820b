"""Which sites an object concerns, without compiling them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from controlplane.compile.claims import LoadBalancer
from controlplane.compile.discoveries import watching
from controlplane.compile.intent import Intent, Target
from controlplane.compile.listeners import Placement, placement
from controlplane.compile.plan import LOAD_BALANCERS, Plan, plan
from controlplane.compile.pools import locations
from controlplane.compile.references import referrers
from controlplane.resources.base import Key, Stored
from controlplane.resources.discovery import Discovery
from controlplane.resources.origin_pool import OriginPool
from controlplane.resources.site_mesh_group import SiteMeshGroup


def concerned_sites(kind: str, key: Key, intent: Intent) -> frozenset[str]:
    """Ids of the sites to whose snapshot the object contributes."""
    made = plan(intent)
    if kind == "origin_pool":
        return _of_pool(key, made)
    if kind == "site":
        return _of_site(key, made)
    stored = intent.find(kind, key)
    if stored is None or kind not in _DIRECTLY:
        return _of_referrers(kind, key, intent)
    return _DIRECTLY[kind](stored, made)


def changed_sites(kind: str, key: Key, before: Intent, after: Intent) -> frozenset[str]:
    """Ids of all sites whose snapshot may be another one, if this is the object that is not the same in both."""
    if kind in LOAD_BALANCERS:
        return _of_changed_load_balancer((kind, key), plan(before), plan(after))
    return concerned_sites(kind, key, before) | concerned_sites(kind, key, after)


def _of_changed_load_balancer(target: Target, before: Plan, after: Plan) -> frozenset[str]:
    """Where it is wanted, and where the pools are that it changes: most changes leave them as they were."""
    both = [(made, balancer) for made in (before, after) if (balancer := made.placements.get(target))]
    wanted = frozenset(site_id for _, balancer in both for site_id in balancer.claims)
    pools = {key for made, balancer in both for each in (balancer, *_competing(balancer, made)) for key in each.needs.pools}
    changed = [key for key in pools if before.pools.get(key) is not after.pools.get(key)]
    return wanted.union(*(_of_pool(key, made) for key in changed for made in (before, after)))


def _of_referrers(kind: str, key: Key, intent: Intent) -> frozenset[str]:
    by = referrers(intent).get((kind, key), ())
    return frozenset[str]().union(*(concerned_sites(stored.kind, stored.key, intent) for stored in by))


def _of_mesh(group: Stored[SiteMeshGroup], made: Plan) -> frozenset[str]:
    """With the spokes, if it is one of hubs."""
    found = (made.topology.meshes.get(key) for key in (group.key, *_naming(group, made.intent)))
    return frozenset[str]().union(*(mesh.sites for mesh in found if mesh))


def _naming(group: Stored[SiteMeshGroup], intent: Intent) -> Iterable[Key]:
    return (stored.key for stored in referrers(intent).get((group.kind, group.key), ()))


def _of_discovery(discovery: Stored[Discovery], made: Plan) -> frozenset[str]:
    return watching(discovery, made.topology)


def _of_pool(key: Key, made: Plan) -> frozenset[str]:
    pool = made.pools.get(key)
    calling = (site_id for user in made.users.get(key, ()) for site_id in user.sites)
    return frozenset(calling) | (pool.locations.all if pool else frozenset())


def _of_load_balancer(stored: Stored[LoadBalancer], made: Plan) -> frozenset[str]:
    """Where it is wanted, and where it calls. Where it competes, who gives way to whom decides for other load balancers, too."""
    balancer = placement(stored, made.topology)
    return frozenset(balancer.claims) | _behind((balancer, *_competing(balancer, made)), made)


def _competing(balancer: Placement, made: Plan) -> Iterator[Placement]:
    """All that want to listen where not everybody can."""
    contested = (site_id for site_id in balancer.claims if site_id in made.listeners and made.listeners[site_id].conflicts)
    return (other for site_id in contested for other in made.wanted[site_id])


def _of_site(key: Key, made: Plan) -> frozenset[str]:
    site_id = made.topology.ids.get(key)
    gone = _of_referrers("site", key, made.intent)
    if site_id is None:
        return gone
    located = (_of_pool(pool, made) for pool, planned in made.pools.items() if site_id in planned.locations.all)
    named = (
        _of_referrers("service_policy", _key(policy), made.intent) for policy, found in made.policies.items() if site_id in found.sites
    )
    here = _behind(made.wanted.get(site_id, ()), made)
    return gone.union({site_id}, here, *located, *named)


def _behind(balancers: Iterable[Placement], made: Plan) -> frozenset[str]:
    """Where their pools are, even if nothing calls them yet; for pools of which load balancers say something, where they are called."""
    keys = {key for balancer in balancers for key in balancer.needs.pools}
    pools = [stored for key in keys if (stored := made.intent.find("origin_pool", key))]
    served = (locations(stored, made.topology).all for stored in pools)
    overridden = (_of_pool(stored.key, made) for stored in pools if _is_overridden(stored, made))
    return frozenset[str]().union(*served, *overridden)


def _is_overridden(pool: Stored[OriginPool], made: Plan) -> bool:
    """Whether something of its item is for its load balancers to say."""
    users = made.users.get(pool.key, ())
    balancing = pool.spec.loadbalancer_algorithm == "LB_OVERRIDE"
    return balancing or any(user.placement.needs.lost_sites != "deprioritise" for user in users)


def _key(text: str) -> Key:
    return Key(*text.split("/", 1))


_DIRECTLY: Mapping[str, Callable[[Stored[Any], Plan], frozenset[str]]] = {
    "http_loadbalancer": _of_load_balancer,
    "tcp_loadbalancer": _of_load_balancer,
    "discovery": _of_discovery,
    "site_mesh_group": _of_mesh,
}
"""Kinds that nothing refers to. The others concern whoever refers to them."""
