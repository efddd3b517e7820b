"""What a regional edge needs to know: of each tenant, whom it relays for, and the load balancers that are advertised on it.

Keys lead with the tenant's id, so that nobody's objects can meet another's: `<tenant id>/<namespace>/<name>`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from agent.protocol import items
from agent.protocol.base import Body
from agent.protocol.items import TYPES, ItemKind
from controlplane.compile.intent import CACHE, Intent, Observations, Tenant
from controlplane.compile.plan import Plan, peers, plan
from controlplane.compile.site import site_item
from controlplane.compile.snapshot import CompiledItem, Snapshot, snapshot_of
from controlplane.resources.base import Stored
from controlplane.resources.site import Site


@dataclass(frozen=True)
class Share:
    """One tenant's part of the snapshots of all regional edges."""

    relay: CompiledItem
    public: Mapping[str, tuple[CompiledItem, ...]]
    """By id of the edge: its load balancers there, and what belongs to them."""
    revocations: Mapping[str, int]
    """See `Site.revocations` of the items."""


def compile_edge(edge: Stored[Site], operator: Tenant, shares: Iterable[Share]) -> Snapshot:
    """The shares of all tenants that have live sites or public load balancers, in any order. Nothing at all if the edge is disabled."""
    site_id = str(edge.uid)
    if edge.metadata.disable:
        return snapshot_of(site_id, ())
    known = sorted(shares, key=lambda share: share.relay.key)
    found = (item for share in known for item in (share.relay, *share.public.get(site_id, ())))
    revoked = [(f"{share.relay.key}/{shard}", revision) for share in known for shard, revision in sorted(share.revocations.items())]
    return snapshot_of(site_id, [site_item(edge, replace(operator, revocations=tuple(revoked))), *found])


@lru_cache(CACHE)
def relay_item(tenant_id: str, anchor_pem: str, crl_pem: str, sites: tuple[str, ...]) -> CompiledItem:
    """`sites`: ids of the customer edges that have nodes, sorted."""
    body = items.Relay(tenant_id=tenant_id, anchor_pem=anchor_pem, crl_pem=crl_pem, sites=sites)
    return CompiledItem.of(ItemKind.RELAY, tenant_id, body)


def public_items(intent: Intent, observations: Observations) -> Mapping[str, tuple[CompiledItem, ...]]:
    """By edge: what the tenant advertises there, always in the same order."""
    made = plan(intent)
    accepting = [edge for edge in sorted(made.topology.edges) if made.accepted(edge)]
    return {edge: tuple(sorted(_public(edge, made, observations), key=attrgetter("kind", "key"))) for edge in accepting}


def tenant_of(key: str) -> str:
    """Whose item it is, by the key of one that is not the edge's own."""
    return key.partition("/")[0]


def _public(edge: str, made: Plan, observations: Observations) -> Iterator[CompiledItem]:
    tenant_id = made.intent.tenant.id
    listening = made.accepted(edge)
    balancers, called = [made.load_balancers[placement] for placement in listening], made.called(edge)
    policies = {policy for balancer in balancers for policy in balancer.use.policies or ()}
    own = (
        *made.listeners[edge].items,
        *(balancer.item for balancer in balancers),
        *(pool.item for pool in called),
        *(made.policies[policy].item for policy in policies),
    )
    for item in own:
        yield _prefixed(tenant_id, item)
    for peer in peers(edge, called, ()):
        site = made.topology.sites[peer]
        yield _peer(tenant_id, peer, site.metadata.name, site.spec.drain, peer in observations.lost)


@lru_cache(CACHE)
def _peer(tenant_id: str, site_id: str, name: str, draining: bool, lost: bool) -> CompiledItem:
    """Reached by the tunnels that it keeps to the edge."""
    body = items.Peer(site_id=site_id, name=name, tenant_id=tenant_id, direct=False, draining=draining, lost=lost)
    return CompiledItem.of(ItemKind.PEER, site_id, body)


@lru_cache(CACHE)
def _prefixed(tenant_id: str, item: CompiledItem) -> CompiledItem:
    """The same item among those of other tenants."""
    body = TYPES[item.kind].read(item.body)
    return CompiledItem.of(item.kind, f"{tenant_id}/{item.key}", body.model_copy(update=_changes(body, tenant_id)))


def _changes(body: Body, tenant_id: str) -> dict[str, Any]:
    match body:
        case items.Listener():
            return {"load_balancers": _keys(body.load_balancers, tenant_id)}
        case items.HttpLoadBalancer():
            routes = tuple(_route(route, tenant_id) for route in body.routes)
            return {"routes": routes, "policies": _keys(body.policies, tenant_id)}
        case items.TcpLoadBalancer():
            return {"pools": _pools(body.pools, tenant_id), "policies": _keys(body.policies, tenant_id)}
        case items.OriginPool():
            # What belongs to origins stays where they are dialled: addresses of the public, checks, and keys of clients.
            return {"origins": tuple(origin for origin in body.origins if origin.sites is not None), "tls": None, "health_checks": ()}
    return {}


def _route(route: items.Route, tenant_id: str) -> items.Route:
    if route.forward is None:
        return route
    forward = route.forward.model_copy(update={"pools": _pools(route.forward.pools, tenant_id)})
    return route.model_copy(update={"forward": forward})


def _pools(pools: tuple[items.WeightedPool, ...], tenant_id: str) -> tuple[items.WeightedPool, ...]:
    return tuple(pool.model_copy(update={"pool": f"{tenant_id}/{pool.pool}"}) for pool in pools)


def _keys(keys: tuple[str, ...] | None, tenant_id: str) -> tuple[str, ...] | None:
    return None if keys is None else tuple(f"{tenant_id}/{key}" for key in keys)
