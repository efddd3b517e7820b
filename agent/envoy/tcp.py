"""TCP load balancers: a CONNECT stream per connection, straight from the listener to the gateway of a site.

Four things were learned from Envoy 1.40. A listener that changes drains its connections, except where just its choice of a filter chain changes, or a filter
that comes over ADS: so what changes with the health of sites is in these. Nothing but the end of its filter chain ends an open stream, so each shard of sites
has one. A connection that crosses an internal listener loses what a server says right before it closes, so no internal listener is
on the way; where a pool has origins here too, they are reached by CONNECT as well, inside the node. And a TCP proxy that tunnels over an
aggregate cluster dies of a null pointer when its client closes, so sites are chosen by weights alone, and which ones by `render`.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from envoy.config.core.v3.extension_pb2 import TypedExtensionConfig
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.network.set_filter_state.v3.set_filter_state_pb2 import Config as SetFilterState
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from envoy.extensions.matching.common_inputs.network.v3.network_inputs_pb2 import SourcePortInput
from envoy.extensions.matching.input_matchers.consistent_hashing.v3.consistent_hashing_pb2 import ConsistentHashing
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue
from xds.type.matcher.v3.matcher_pb2 import Matcher

from agent.envoy import access, callers, clusters, connections, names
from agent.envoy.connections import connect_route
from agent.envoy.ingress import Bind, listener_message
from agent.envoy.inputs import Item, ItemId, Scope, body
from agent.envoy.messages import ADS, TYPE_PREFIX, Fields, extension, header, literal, milliseconds, number, packed, state, struct
from agent.envoy.policy import Requests, first_match, verdicts
from agent.envoy.pools import CACHE, PoolView, latest
from agent.envoy.predicates import source_ip
from agent.envoy.resources import Resource, resource
from agent.envoy.routes import ranked
from agent.protocol.items import TcpLoadBalancer, WeightedPool

_CONNECT_ATTEMPTS = 3
_NOWHERE = "nowhere"
"""The name of no cluster."""
_DENIED = "denied"
"""The name of no filter chain: Envoy closes the connection."""


class Lane(NamedTuple):
    """Connections to a pool's origins at sites of one shard, in a filter chain of their own, so that a revocation there can end them."""

    shard: str
    """Empty: at this site."""
    clusters: tuple[tuple[str, int], ...]
    """With weights; empty when nothing can serve."""


class Branch(NamedTuple):
    """A share of a load balancer's connections, and the pool that it goes to."""

    pool: str
    weight: int
    lanes: tuple[Lane, ...]
    """At least one. Which they are does not depend on what can serve now."""
    tunnelled: bool

    @property
    def usable(self) -> bool:
        return any(lane.clusters for lane in self.lanes)

    @property
    def alone(self) -> bool:
        """Whether no two sites share it."""
        return sum(len(lane.clusters) for lane in self.lanes) < 2


@latest
def branches(item: Item, pools: tuple[PoolView, ...], site_id: str, healthy: tuple[int, ...]) -> tuple[Branch, ...]:
    """Pools of the best priority that can serve, or of the best one if none can. `healthy`: usable origins of each pool at this site."""
    lb = body(item, TcpLoadBalancer)
    views = {pool.key: (pool, count) for pool, count in zip(pools, healthy, strict=True)}
    groups = [
        tuple(_branch(lb, weighted, *views[weighted.pool], site_id) for weighted in group)
        for group in ranked(pool for pool in lb.pools if pool.weight and pool.pool in views)
    ]
    usable = (tuple(branch for branch in group if branch.usable) for group in groups)
    return next(filter(None, usable), groups[0] if groups else ())


def _branch(lb: TcpLoadBalancer, weighted: WeightedPool, pool: PoolView, here: int, site_id: str) -> Branch:
    by_shard: dict[str, list[tuple[str, int]]] = defaultdict(list)
    if pool.crosses:
        sites = (dict(pool.remote or ()) | ({site_id: here} if here else {})) or dict(pool.spare)
        for site in _chosen(lb, pool, site_id, sites):
            by_shard["" if site == site_id else pool.shard(site)].append((names.HERE if site == site_id else names.site(site), sites[site]))
    elif here:
        by_shard[""].append((names.pool(pool.key), 1))
    places = ("", *pool.shards) if pool.local is not None or not pool.shards else pool.shards
    return Branch(pool.key, weighted.weight, tuple(Lane(place, tuple(by_shard[place])) for place in places), pool.crosses)


def _chosen(lb: TcpLoadBalancer, pool: PoolView, site_id: str, sites: Mapping[str, int]) -> list[str]:
    """Clients that are to stay with an origin all go to the same site."""
    if pool.pool.selection == "LOCAL_PREFERRED" and site_id in sites:
        return [site_id]
    if lb.hash_source_ip and sites:
        return [max(sites, key=lambda site: (sites[site], site))]
    return sorted(sites)


class Port(NamedTuple):
    """A port of a load balancer, as its listener needs to know it."""

    bind: Bind
    key: str
    """Of the load balancer."""
    branches: tuple[Branch, ...]
    policies: tuple[Item, ...] | None
    pods: callers.Known
    """What is known of those that the policies select."""
    scope: Scope
    sources: frozenset[ItemId]


def listener(port: Port) -> Resource:
    """Policies decide in the choice of a filter chain: the RBAC filter looks only when the client's first byte comes.

    By then a server that speaks first has spoken. Which pods there are, and which sites can serve, is in that choice alone, so that no
    connection is drained when they change.
    """
    return _few(port) if port.pods else _many(port)


def _listener(port: Port) -> Resource:
    groups = callers.groups(port.pods)
    chains = [
        _filter_chain(port, branch, lane, word)
        for word in ("", *(word for word, _ in groups))
        for branch in port.branches
        for lane in branch.lanes
    ]
    choice: Fields = {}
    if port.policies is not None:
        unknown = frozenset(id for id, addresses in port.pods if addresses is None)
        matchers = [
            {"predicate": callers.of_group(addresses), "on_match": {"matcher": _judged(port, port.policies, word, unknown)}}
            for word, addresses in groups
        ]
        others = _judged(port, port.policies, "", unknown)
        choice["filter_chain_matcher"] = (
            Matcher(matcher_list={"matchers": matchers}, on_no_match={"matcher": others}) if matchers else others
        )
    elif len(chains) > 1:
        choice["filter_chain_matcher"] = _choice(port.branches)
    return resource(listener_message(port.bind, chains, **choice), port.sources)


_many = lru_cache(CACHE)(_listener)
_few = lru_cache(callers.CACHE)(_listener)


def _filter_chain(port: Port, branch: Branch, lane: Lane, word: str) -> Fields:
    """For connections of pods for which these selectors hold."""
    granted = SetFilterState(on_new_connection=[state(names.PODS_STATE, word)])
    telling = [extension("envoy.filters.network.set_filter_state", granted)] if word else []
    return {
        "name": _chain_name(branch, lane, word),
        "filters": [*telling, _by_ads(_proxy_name(port.key, branch, lane), TcpProxy)],
        "metadata": connections.of_shard(lane.shard, port.scope),
    }


def _chain_name(branch: Branch, lane: Lane, word: str) -> str:
    return f"{branch.pool}|{lane.shard}{word}"


def _judged(port: Port, policies: tuple[Item, ...], word: str, unknown: Container[str]) -> Matcher:
    """What the policies say of connections of such pods."""
    requests = Requests(
        lambda sites: port.scope.site_id in sites,
        source_ip(),
        lambda selector: None if selector.id in unknown else callers.holds(selector, word),
        is_http=False,
    )
    return first_match(verdicts(policies, requests), {"ALLOW": {"matcher": _choice(port.branches, word)}, "DENY": _chain(_DENIED)})


def _choice(branches: Sequence[Branch], word: str = "") -> Matcher:
    return _weighed([({"matcher": _among_sites(branch, word)}, branch.weight) for branch in branches])


def _among_sites(branch: Branch, word: str) -> Matcher:
    lanes = [lane for lane in branch.lanes if lane.clusters] or branch.lanes[:1]
    return _weighed([(_chain(_chain_name(branch, lane, word)), sum(weight for _, weight in lane.clusters)) for lane in lanes], seed=1)


def _weighed(outcomes: Sequence[tuple[Fields, int]], seed: int = 0) -> Matcher:
    """By the client's port, which is as good as random: its hash falls on an outcome in proportion to the weight.

    With another seed it is another hash, so that two choices in a row do not depend on each other.
    """
    total = sum(weight for _, weight in outcomes)
    matchers = []
    reached = 0
    for outcome, weight in outcomes[:-1]:
        reached += weight
        hashed = ConsistentHashing(modulo=total, threshold=total - reached, seed=seed)
        predicate = {"single_predicate": {"input": extension("port", SourcePortInput()), "custom_match": extension("share", hashed)}}
        matchers.append({"predicate": predicate, "on_match": outcome})
    listed = {"matcher_list": {"matchers": matchers}} if matchers else {}
    return Matcher(on_no_match=outcomes[-1][0], **listed)


def _chain(name: str) -> Fields:
    return {"action": extension("chain", StringValue(value=name))}


def _proxy_name(key: str, branch: Branch, lane: Lane) -> str:
    return f"tcp|{key}|{branch.pool}|{lane.shard}"


def _by_ads(name: str, type_: type[Message]) -> Fields:
    return {"name": name, "config_discovery": {"config_source": ADS, "type_urls": [TYPE_PREFIX + type_.DESCRIPTOR.full_name]}}


@lru_cache(CACHE)
def proxy(item: Item, branch: Branch, lane: Lane) -> Resource:
    """The filter that connects."""
    lb = body(item, TcpLoadBalancer)
    message = TcpProxy(
        stat_prefix="tcp",
        idle_timeout=milliseconds(lb.idle_timeout),
        max_connect_attempts=number(_CONNECT_ATTEMPTS),
        hash_policy=[{"source_ip": {}}] if lb.hash_source_ip else [],
        access_log=access.tcp_logs(item.id.key),
        tunneling_config=_tunneling(item.id.key, branch.pool, guarded=lb.policies is not None) if branch.tunnelled else None,
        metadata_match=None if branch.alone else {"filter_metadata": {clusters.LB_METADATA: struct(clusters.USABLE)}},
        **_clusters(lane.clusters),
    )
    return resource(TypedExtensionConfig(name=_proxy_name(item.id.key, branch, lane), typed_config=packed(message)), [item.id])


def _tunneling(key: str, pool: str, *, guarded: bool) -> Fields:
    """`guarded`: the destination has policies to judge the client by."""
    client = header(names.CLIENT_HEADER, "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%")
    pods = [header(names.PODS_HEADER, f"%FILTER_STATE({names.PODS_STATE}:PLAIN)%")] if guarded else []
    return {
        "hostname": names.export_authority("tcp", pool),
        "headers_to_add": [header(names.LB_HEADER, literal(names.own_key(key))), client, *pods],
    }


def _clusters(weighted: Sequence[tuple[str, int]]) -> Fields:
    if len(weighted) > 1:
        return {"weighted_clusters": {"clusters": [{"name": name, "weight": weight} for name, weight in weighted]}}
    return {"cluster": weighted[0][0] if weighted else _NOWHERE}


def here(pools: Iterable[str], scope: Scope) -> tuple[Resource, Resource, Resource]:
    """Listener, cluster and routes of CONNECT streams to this site's own origins of the pools."""
    manager = connections.manager(
        stat_prefix=names.HERE,
        route_config_name=names.HERE,
        codec_type="HTTP2",
        http2_protocol_options=clusters.http2(),
        stream_idle_timeout=milliseconds(0),
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
    )
    message = Listener(
        name=names.HERE,
        internal_listener={},
        per_connection_buffer_limit_bytes=number(clusters.TUNNEL_BUFFER),
        filter_chains=[{"filters": [manager]}],
    )
    options = HttpProtocolOptions(explicit_http_config={"http2_protocol_options": clusters.http2()})
    protocol = {clusters.HTTP_OPTIONS: packed(options)}
    routes = RouteConfiguration(name=names.HERE, virtual_hosts=[_own_host(pool) for pool in sorted(pools)])
    return (
        resource(message, []),
        clusters.internal(names.HERE, scope.site_id, typed_extension_protocol_options=protocol),
        resource(routes, []),
    )


def _own_host(pool: str) -> Fields:
    authority = names.export_authority("tcp", pool)
    return {"name": authority, "domains": [authority], "routes": [connect_route(names.pool(pool))]}
