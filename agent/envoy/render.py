"""The whole of one node's Envoy config.

Every piece is memoised by the items and the slice of local state that it is made from, so that a change costs what it touches; route configurations
are put together from serialized virtual hosts. What changes most are load balancers: while nothing else does, all the rest is the one of last time.
An item that cannot be rendered becomes a problem and is left out, and so is what refers to it.
"""

from functools import lru_cache
from itertools import chain

from agent.envoy import clusters, gateway, gateways, names, tls, tunnel
from agent.envoy.balancers import load_balancers, put_local
from agent.envoy.edges import customer, regional
from agent.envoy.inputs import AgentSnapshot, Item, ItemId, LocalState, body, scope_of
from agent.envoy.pools import CACHE, last
from agent.envoy.problems import Unrenderable
from agent.envoy.resources import Output, Resources
from agent.envoy.sources import Sources
from agent.protocol.items import Export, ItemKind

_ENTRANCES = (ItemKind.LISTENER, ItemKind.HTTP_LOADBALANCER)


def render(snapshot: AgentSnapshot, local: LocalState) -> Resources:
    """Equal input gives equal output. A snapshot without a site gives nothing."""
    output = Output()
    if snapshot.site is None:
        return output.resources()
    sources, common = _surroundings(snapshot.site, _of_other_kinds(snapshot), local)
    output.take(common)
    load_balancers(snapshot, sources, output)
    return output.resources()


def _of_other_kinds(snapshot: AgentSnapshot) -> tuple[Item, ...]:
    return tuple(chain.from_iterable(items for kind, items in snapshot.by_kind.items() if kind not in _ENTRANCES))


@last
def _surroundings(site: Item, items: tuple[Item, ...], local: LocalState) -> tuple[Sources, Output]:
    """What all load balancers have in common, and what there is without them."""
    sources = Sources(AgentSnapshot.of(items), local, scope_of(site, local.run_dir, local.trusted_ca_file, local.overlay))
    output = Output()
    _node(sources, site, output)
    _exports(sources, output)
    return sources, output


def _node(sources: Sources, site: Item, output: Output) -> None:
    """What every node has, and the ways to every peer."""
    local, scope = sources.local, sources.scope
    output.put(*tls.node_secrets(local.node, scope, site.id))
    output.put(*tunnel.listeners(sources.peers, scope), tunnel.probe_listener(scope))
    output.put(tunnel.probe_routes([(peer, () if scope.regional else paths) for peer, paths in sources.reached], sources.edges.values()))
    output.put(gateway.exports_listener())
    output.put(gateway.peers_cluster(scope), clusters.internal(names.EXPORTS))
    for peer, paths in sources.reached:
        output.put(*gateways.site(peer, scope, paths))
    if scope.regional:
        regional(sources, output)
    else:
        output.put(gateway.listener(local.addresses, scope))
        if scope.overlay:
            output.put(gateway.overlay_listener(scope))
        customer(sources, output)


def _exports(sources: Sources, output: Output) -> None:
    parts: list[gateway.ExportParts] = []
    origins: list[ItemId] = []
    for item in sources.snapshot.by_kind[ItemKind.EXPORT]:
        pool = sources.pools.get(item.id.key)
        if pool is None:
            output.problem(item.id, f"origin pool {item.id.key} is not here")
            continue
        try:
            policies = sources.policies_of(_export_policies(item))
            parts.append(gateway.export(item, pool.item, policies, sources.scope))
        except Unrenderable as error:
            output.problem(item.id, error)
            continue
        origins.extend((item.id, pool.item.id, *[policy.id for policy in policies]))
        put_local(pool, sources, output)
    edges = sorted({edge for item in sources.snapshot.by_kind[ItemKind.EXPORT] for edge in _edges_of(item)})
    output.put(*gateway.routes(parts, origins, sources.peers, edges, sources.scope))


@lru_cache(CACHE)
def _edges_of(item: Item) -> frozenset[str]:
    return frozenset(edge for use in body(item, Export).uses for edge in use.edges)


@lru_cache(CACHE)
def _export_policies(item: Item) -> tuple[str, ...]:
    uses = body(item, Export).uses
    return tuple(sorted({policy for use in uses for policy in use.policies or ()}))
