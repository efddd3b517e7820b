"""Load balancers of a node, on the side where requests enter: their listeners and routes, and the clusters that those lead to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple

from agent.envoy import callers, clusters, ingress, tcp, tls
from agent.envoy.ingress import Bind
from agent.envoy.inputs import AgentSnapshot, Item, ItemId, body
from agent.envoy.pools import CACHE, PoolView, last, reach
from agent.envoy.problems import Unrenderable
from agent.envoy.resources import ROUTES, Output, Part, Problem, Resource, assembled
from agent.envoy.routes import Door, HostParts, virtual_host
from agent.envoy.sources import Sources
from agent.protocol.items import HeaderEdits, HttpLoadBalancer, ItemKind, Listener, OriginPool, TcpLoadBalancer, TlsCertificate

Places = dict[Bind, tuple[Item, ...]]
"""Listener items by where Envoy listens for them."""


@dataclass
class _Demand:
    """Clusters that routes and listeners turned out to need."""

    http: dict[str, None] = field(default_factory=dict)
    """Keys of pools, in a certain order, as in all of these."""
    dialled: dict[str, None] = field(default_factory=dict)
    """Keys of pools whose origins this site dials for connections that are no HTTP."""
    here: dict[str, None] = field(default_factory=dict)
    """Keys of those that are reached by CONNECT."""
    orders: dict[tuple[str, ...], None] = field(default_factory=dict)


def load_balancers(snapshot: AgentSnapshot, sources: Sources, output: Output) -> None:
    """`sources` need not know of listeners and HTTP load balancers."""
    places = _places(snapshot, sources, output)
    demand = _Demand()
    tls_ports = {key: bind.port for bind, items in places.items() if bind.protocol == "https" for item in items for key in _members(item)}
    for bind, items in places.items():
        if bind.protocol == "tcp":
            _tcp(bind, items[0], sources, output, demand)
        elif bind.protocol == "https":
            _https(bind, _load_balancers_on(items, snapshot, output), items, sources, output, demand)
        else:
            _http(bind, _load_balancers_on(items, snapshot, output), items, sources, output, demand, tls_ports)
    output.take(_demanded(tuple(demand.http), tuple(demand.dialled), tuple(demand.here), tuple(demand.orders), sources))


def _http(
    bind: Bind,
    load_balancers: Iterable[Item],
    items: Sequence[Item],
    sources: Sources,
    output: Output,
    demand: _Demand,
    tls_ports: dict[str, int],
) -> None:
    host_of = _hosts(sources)
    hosts = [host_of(item, Door(bind.port, tls=False, https_port=tls_ports.get(item.id.key))) for item in load_balancers]
    _note(hosts, output, demand)
    parts = [ingress.routes_head(bind.name), *[host.value for host in hosts if host.value is not None]]
    origins = [item.id for item in items]
    output.put(ingress.http_listener(bind, frozenset(origins), max([host.max_header_kib for host in hosts], default=0) or 60))
    output.put(assembled(ROUTES, bind.name, parts, chain(origins, *[host.items for host in hosts])))


def _https(bind: Bind, load_balancers: Iterable[Item], items: Sequence[Item], sources: Sources, output: Output, demand: _Demand) -> None:
    chains: list[Item] = []
    here = [*load_balancers]
    domains = tuple([domain for item in here for domain in body(item, HttpLoadBalancer).domains])
    host_of, door = _hosts(sources), Door(bind.port, tls=True, https_port=bind.port)
    for item in here:
        host = host_of(item, door)
        _note((host,), output, demand)
        if host.value is None:
            continue
        chains.append(item)
        name = ingress.https_routes_name(bind, item.id.key)
        elsewhere = _elsewhere(body(item, HttpLoadBalancer).domains, domains)
        hosts = [host.value, *([ingress.misdirected(elsewhere)] if elsewhere else [])]
        output.put(assembled(ROUTES, name, [ingress.routes_head(name), *hosts], host.items), *host.certificates)
    if chains:
        output.put(ingress.https_listener(bind, chains, [item.id for item in (*items, *chains)]))


def _elsewhere(own: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Domains, sorted, that are not a load balancer's own, although requests for them may come on its connections: of all that its port has, those under a wildcard of its own."""
    suffixes = tuple([domain.removeprefix("*") for domain in own if domain.startswith("*")])
    if not suffixes:
        return ("*",)
    return tuple(sorted({"*", *(domain for domain in every if domain.endswith(suffixes))} - set(own)))


def _load_balancers_on(items: Iterable[Item], snapshot: AgentSnapshot, output: Output) -> Iterable[Item]:
    """In the listeners' order. Who does not get all its domains gets nothing here: Envoy would refuse all that listen with it."""
    known = snapshot.by_key[ItemKind.HTTP_LOADBALANCER]
    named: dict[str, Item] = {}
    for item in items:
        for key in _members(item):
            named.setdefault(key, item)
    owners: dict[str, str] = {}
    for key, item in named.items():
        found = known.get(key)
        if found is None:
            output.problem(item.id, f"HTTP load balancer {key} is not here")
            continue
        domains = body(found, HttpLoadBalancer).domains
        if not owners.keys().isdisjoint(domains):
            lost = next(domain for domain in domains if domain in owners)
            output.problem(found.id, f"HTTP load balancer {owners[lost]} has {lost} on another network with the same address and port")
            continue
        owners.update(dict.fromkeys(domains, key))
        yield found


def _members(item: Item) -> tuple[str, ...]:
    return body(item, Listener).load_balancers


class _Host(NamedTuple):
    value: Part | None
    """None, with a problem, if there can be none."""
    items: tuple[ItemId, ...]
    """The load balancer and its policies."""
    max_header_kib: int
    pools: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]
    """Of clusters, that its routes name."""
    certificates: tuple[Resource, ...]
    problems: tuple[Problem, ...]


@last
def _hosts(sources: Sources) -> Callable[[Item, Door], _Host]:
    """Virtual hosts of load balancers, remembered for as long as these are the sources."""
    return lru_cache(CACHE)(partial(_host, sources))


def _host(sources: Sources, item: Item, door: Door) -> _Host:
    needs = needs_of(item)
    pools = sources.pools
    known = tuple([key for key in needs.pools if key in pools])
    missing = sorted({*needs.pools}.difference(known))[:1]
    problems = tuple([Problem(item.id, f"origin pool {key} is not here") for key in missing])
    try:
        policies = sources.policies_of(needs.policies)
        part: HostParts = virtual_host(
            item,
            tuple([reach(pools[key]) for key in known]),
            policies,
            callers.known(policies, sources.local),
            sources.secrets_of(needs.secrets),
            sources.scope,
            door,
        )
        certificates = _certificates(item, sources.local.secrets) if door.tls else ()
    except Unrenderable as error:
        return _Host(None, (), 0, (), (), (), (*problems, Problem(item.id, str(error))))
    origins = (item.id, *[policy.id for policy in policies])
    return _Host(part.host, origins, needs.max_header_kib, known, part.orders, certificates, problems)


def _certificates(item: Item, secrets: Mapping[str, bytes]) -> tuple[Resource, ...]:
    """Raises `Unrenderable` if the load balancer cannot serve TLS."""
    server = body(item, HttpLoadBalancer).tls
    if server is None:
        raise Unrenderable("it has no certificate, but its listener speaks TLS")
    if any(certificate.private_key not in secrets for certificate in server.certificates):
        raise Unrenderable("the private key of its certificate is not here")
    return tuple([tls.secret(certificate, secrets[certificate.private_key], item.id) for certificate in server.certificates])


def _note(hosts: Sequence[_Host], output: Output, demand: _Demand) -> None:
    output.problems += chain.from_iterable([host.problems for host in hosts])
    demand.http |= dict.fromkeys(chain.from_iterable([host.pools for host in hosts]))
    demand.orders |= dict.fromkeys(chain.from_iterable([host.orders for host in hosts]))


class Needs(NamedTuple):
    """What a load balancer refers to."""

    pools: tuple[str, ...]
    policies: tuple[str, ...]
    secrets: tuple[str, ...] = ()
    max_header_kib: int = 0


@lru_cache(CACHE)
def needs_of(item: Item) -> Needs:
    if isinstance(item.body, TcpLoadBalancer):
        return Needs(tuple(sorted({pool.pool for pool in item.body.pools if pool.weight})), item.body.policies or ())
    lb = body(item, HttpLoadBalancer)
    forwards = [route.forward for route in lb.routes if route.forward is not None]
    pools = {pool.pool for forward in forwards for pool in forward.pools if pool.weight}
    edits = [lb.headers, *(route.headers for route in lb.routes)]
    return Needs(tuple(sorted(pools)), lb.policies or (), tuple(sorted(_secrets(edits))), lb.max_request_header_kib)


def _secrets(edits: Iterable[HeaderEdits]) -> set[str]:
    values = chain.from_iterable((*edit.request_add, *edit.response_add) for edit in edits)
    return {value.secret for value in values if value.secret is not None}


def _tcp(bind: Bind, listener: Item, sources: Sources, output: Output, demand: _Demand) -> None:
    key = _members(listener)[0]
    item = sources.snapshot.get(ItemKind.TCP_LOADBALANCER, key)
    if item is None:
        output.problem(listener.id, f"TCP load balancer {key} is not here")
        return
    needs = needs_of(item)
    if missing := [pool for pool in needs.pools if pool not in sources.pools]:
        output.problem(item.id, f"origin pool {missing[0]} is not here")
    try:
        _check_names(needs.pools, sources)
        policies = sources.policies_of(needs.policies)
    except Unrenderable as error:
        output.problem(item.id, error)
        return
    pools = tuple([sources.pools[pool] for pool in needs.pools if pool in sources.pools])
    branches = tcp.branches(item, pools, sources.scope.site_id, tuple([sources.healthy_here(pool) for pool in pools]))
    if not branches:
        return
    origins = frozenset({listener.id, item.id, *(policy.id for policy in policies)})
    guards = None if body(item, TcpLoadBalancer).policies is None else policies
    output.put(tcp.listener(tcp.Port(bind, key, branches, guards, callers.known(policies, sources.local), sources.scope, origins)))
    output.put(*(tcp.proxy(item, branch, lane) for branch in branches for lane in branch.lanes))
    demand.dialled.update((pool.key, None) for pool in pools if pool.local is not None or not pool.crosses)
    demand.here.update((pool.key, None) for pool in pools if pool.local is not None and pool.crosses)


def _check_names(pools: Iterable[str], sources: Sources) -> None:
    """Raises `Unrenderable` if the certificates of some pool's origins would be accepted whatever name they have."""
    for key in pools:
        if key in sources.pools and not clusters.verifiable(sources.pools[key].item):
            raise Unrenderable(
                f"origin pool {key} verifies certificates, but no Host header says whose: give it sni, or origins by DNS name"
            )


@last
def _demanded(
    http: tuple[str, ...], dialled: tuple[str, ...], here: tuple[str, ...], orders: tuple[tuple[str, ...], ...], sources: Sources
) -> Output:
    """As in `_Demand`."""
    output = Output()
    for key in http:
        pool = sources.pools[key]
        if pool.local is not None or not pool.crosses:
            put_local(pool, sources, output)
        if pool.crosses:
            output.put(*clusters.remote_http(pool))
    for key in dialled:
        put_local(sources.pools[key], sources, output)
    for order in orders:
        if len(order) > 1:
            output.put(clusters.order(order))
    if here:
        output.put(*tcp.here(frozenset(here), sources.scope))
    return output


def put_local(pool: PoolView, sources: Sources, output: Output) -> None:
    """The origins that this site dials, and what their TLS needs."""
    output.put(*clusters.local(pool, connected=pool.key in sources.connected))
    _put_client_certificate(pool, sources, output)


def _put_client_certificate(pool: PoolView, sources: Sources, output: Output) -> None:
    certificate = _client_certificate(pool.item)
    if certificate is None:
        return
    key = sources.local.secrets.get(certificate.private_key)
    if key is None:
        output.problem(pool.item.id, "the private key of its client certificate is not here")
    else:
        output.put(tls.secret(certificate, key, pool.item.id))


@lru_cache(CACHE)
def _client_certificate(item: Item) -> TlsCertificate | None:
    pool = body(item, OriginPool)
    return None if pool.tls is None else pool.tls.client_certificate


def _places(snapshot: AgentSnapshot, sources: Sources, output: Output) -> Places:
    """Listener items by where they listen; networks that share an address share its listeners."""
    places: Places = {}
    protocols: dict[tuple[str, int], str] = {}
    for item in snapshot.by_kind[ItemKind.LISTENER]:
        listener = body(item, Listener)
        address = listener.address or sources.local.addresses.on(listener.network)
        if address is None:
            output.problem(item.id, f"this node has no address on the {listener.network} network")
            continue
        if sources.local.addresses.takes_from_gateway(address, listener.port):
            output.problem(item.id, f"port {listener.port} of {address} is in use by the node's gateway")
            continue
        protocol = protocols.setdefault((address, listener.port), listener.protocol)
        bind = Bind(address, listener.port, listener.protocol)
        if protocol != listener.protocol or (protocol == "tcp" and places.get(bind, (item,)) != (item,)):
            output.problem(item.id, f"port {listener.port} of {address} is in use by another listener for {protocol}")
            continue
        places[bind] = (*places.get(bind, ()), item)
    return places
