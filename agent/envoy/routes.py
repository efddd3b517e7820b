"""Virtual hosts of HTTP load balancers, on the side where requests enter."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from envoy.config.route.v3.route_components_pb2 import VirtualHost
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2 import HeaderMutationPerRoute
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBACPerRoute

from agent.envoy import callers, names, retries
from agent.envoy.gateway import RBAC_FILTER, rbac
from agent.envoy.inputs import Item, Scope, body
from agent.envoy.messages import Fields, flag, header, literal, milliseconds, number, packed
from agent.envoy.policy import Requests, headers_of, queries_of, verdicts
from agent.envoy.pools import CACHE, Reach
from agent.envoy.predicates import source_ip
from agent.envoy.problems import Unrenderable
from agent.envoy.resources import Part, part
from agent.envoy.stickiness import hashed_cookies, visits
from agent.protocol.items import (
    DirectResponse,
    Forward,
    HeaderEdits,
    HeaderMatch,
    HeaderValue,
    HttpLoadBalancer,
    QueryMatch,
    Redirect,
    Route,
    RouteMatch,
    WeightedPool,
)

HEADER_MUTATION_FILTER = "envoy.filters.http.header_mutation"
_HSTS = "max-age=31536000"
_BODILESS = frozenset({204, 304})
"""Statuses after which HTTP/1 knows no body; RFC 9112, 6.3."""


class Door(NamedTuple):
    """How requests come in."""

    port: int
    tls: bool
    https_port: int | None
    """Where the load balancer takes TLS on this site; None if nowhere."""


class HostParts(NamedTuple):
    """A virtual host, as a field of a RouteConfiguration, and the orders of clusters that its routes name."""

    host: Part
    orders: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Context:
    """What all routes of one load balancer share."""

    key: str
    lb: HttpLoadBalancer
    reaches: Mapping[str, Reach]
    secrets: Mapping[str, bytes]
    door: Door


def virtual_host(
    item: Item,
    reaches: tuple[Reach, ...],
    policies: tuple[Item, ...],
    pods: callers.Known,
    secrets: tuple[tuple[str, bytes], ...],
    scope: Scope,
    door: Door,
) -> HostParts:
    """`reaches`: of the pools that exist; `policies`: those of the load balancer, in its order, and what is known of the pods that they select.

    Raises `Unrenderable`.
    """
    remembering = _many if not pods else _few
    return remembering(item, reaches, policies, pods, secrets, scope, door)


def _virtual_host(
    item: Item,
    reaches: tuple[Reach, ...],
    policies: tuple[Item, ...],
    pods: callers.Known,
    secrets: tuple[tuple[str, bytes], ...],
    scope: Scope,
    door: Door,
) -> HostParts:
    lb = body(item, HttpLoadBalancer)
    context = _Context(item.id.key, lb, {reach.pool: reach for reach in reaches}, dict(secrets), door)
    if lb.https_redirect and not door.tls:
        host = VirtualHost(name=item.id.key, domains=lb.domains, routes=[_to_https(context)])
        return HostParts(_field(host), ())
    host = VirtualHost(
        name=item.id.key,
        domains=lb.domains,
        routes=list(chain.from_iterable(_route(route, context) for route in lb.routes)),
        typed_per_filter_config=_filters(lb, policies, pods, scope),
        **_host_edits(context),
    )
    orders = chain.from_iterable(_orders(route, context) for route in lb.routes)
    return HostParts(_field(host), tuple(dict.fromkeys(orders)))


_many = lru_cache(CACHE)(_virtual_host)
_few = lru_cache(callers.CACHE)(_virtual_host)


def _field(host: VirtualHost) -> Part:
    return part(RouteConfiguration(virtual_hosts=[host]))


def _to_https(context: _Context) -> Fields:
    port = context.door.https_port
    elsewhere = {"port_redirect": port} if port not in {None, 443} else {}
    return {"match": {"prefix": "/"}, "redirect": {"https_redirect": True, **elsewhere}, "name": context.key}


def _filters(lb: HttpLoadBalancer, policies: tuple[Item, ...], pods: callers.Known, scope: Scope) -> Fields:
    """What the filters before the router do for this load balancer."""
    return {**hashed_cookies(lb), **_guards(lb, policies, pods, scope)}


def _argument(name: str) -> str:
    """Of a `%…%` command."""
    if set(name) & set("%()"):
        raise Unrenderable(f"policies cannot look at {name!r}")
    return name


def _guards(lb: HttpLoadBalancer, policies: tuple[Item, ...], pods: callers.Known, scope: Scope) -> Fields:
    """Policies, and copies of what they look at, for the destination to judge by the same."""
    if lb.policies is None:
        return {}
    unknown = {id for id, addresses in pods if addresses is None}
    requests = Requests(
        lambda sites: scope.site_id in sites, source_ip(), lambda selector: None if selector.id in unknown else callers.told(selector)
    )
    copies = {
        **({names.PODS_HEADER: callers.WORD} if pods else {}),
        names.CLIENT_HEADER: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        names.PATH_HEADER: "%PATH(NQ)%",
        names.HOST_HEADER: "%REQ(:AUTHORITY)%",
        **{names.COPIED_HEADERS + name: f"%REQ({_argument(name)})%" for name in headers_of(policies)},
        **{names.query_header(name): f"%QUERY_PARAM({_argument(name)})%" for name in queries_of(policies)},
    }
    appended = [{"append": header(name, value)} for name, value in copies.items()]
    return {
        HEADER_MUTATION_FILTER: packed(HeaderMutationPerRoute(mutations={"request_mutations": appended})),
        RBAC_FILTER: rbac(verdicts(policies, requests)),
        **callers.telling(pods),
    }


def _host_edits(context: _Context) -> Fields:
    """Ours come last, so that they prevail."""
    edits = _edits(context.lb.headers, context)
    if any(reach.remote is not None for reach in context.reaches.values()):
        edits["request_headers_to_add"].append(header(names.LB_HEADER, names.own_key(context.key)))
    if context.lb.hsts and context.door.tls:
        edits["response_headers_to_add"].append(header("strict-transport-security", _HSTS))
    return edits


def _edits(edits: HeaderEdits, context: _Context) -> Fields:
    return {
        "request_headers_to_add": [_header_value(value, context) for value in edits.request_add],
        "request_headers_to_remove": [_editable(name) for name in edits.request_remove],
        "response_headers_to_add": [_header_value(value, context) for value in edits.response_add],
        "response_headers_to_remove": edits.response_remove,
    }


def _editable(name: str) -> str:
    if name.lower().startswith(names.PRIVATE_HEADERS):
        raise Unrenderable(f"headers that begin with {names.PRIVATE_HEADERS} are used between sites: {name}")
    return name


def _header_value(value: HeaderValue, context: _Context) -> Fields:
    return header(_editable(value.name), literal(_text(value, context)), append=value.append) | {"keep_empty_value": True}


def _text(value: HeaderValue, context: _Context) -> str:
    if value.secret is None:
        return value.value
    try:
        return context.secrets[value.secret].decode()
    except KeyError:
        raise Unrenderable(f"the secret of header {value.name} is not here") from None
    except UnicodeDecodeError:
        raise Unrenderable(f"the secret of header {value.name} is not text") from None


def _route(route: Route, context: _Context) -> Iterable[Fields]:
    """None if the route is for other ports; two where clients are given cookies."""
    if not _on_port(route.match, context.door.port):
        return
    common = {"name": context.key, **_edits(route.headers, context)}
    if route.forward is not None:
        common["request_headers_to_remove"] += retries.removed_headers(route.forward.retry)
    if route.forward is not None and route.forward.auto_host_rewrite:
        common["request_headers_to_add"].append(header(names.ORIGIN_HOST_HEADER, "1"))
    if route.policy_disabled:
        common["typed_per_filter_config"] = {RBAC_FILTER: packed(RBACPerRoute())}
        common["request_headers_to_add"].append(header(names.EXEMPT_HEADER, "1"))
    for match, action in _actions(route, context):
        added = {side: [*common[side], *action.pop(side, ())] for side in ("request_headers_to_add", "response_headers_to_add")}
        yield {"match": match, **action, **common, **added}


def _on_port(match: RouteMatch, port: int) -> bool:
    return not match.incoming_ports or any(first <= port <= last for first, last in match.incoming_ports)


def _actions(route: Route, context: _Context) -> Iterable[tuple[Fields, Fields]]:
    if route.redirect is not None and route.redirect.query.startswith("replace:"):
        yield _match(route.match), _redirect_with_query(route.redirect, context.door)
    elif route.redirect is not None:
        yield _match(route.match), {"redirect": _redirect(route.redirect, context.door)}
    elif route.response is not None:
        yield _match(route.match), {"direct_response": _answer(route.response)}
    elif route.forward is not None:
        yield from _forwards(route.match, route.forward, context)


def _answer(response: DirectResponse) -> Fields:
    """Envoy would send a body after any status, and a client take it for the beginning of the next answer."""
    body = {} if response.status in _BODILESS else {"body": {"inline_string": response.body}}
    return {"status": response.status, **body}


def _match(match: RouteMatch) -> Fields:
    return {
        **_path(match),
        "headers": [*_method(match.methods), *map(_header_match, match.headers)],
        "query_parameters": [_query_match(query) for query in match.query],
    }


def _path(match: RouteMatch) -> Fields:
    if match.path is not None:
        return {"path": match.path}
    if match.regex is not None:
        return {"safe_regex": {"regex": match.regex}}
    return {"prefix": match.prefix or "/"}


def _method(methods: Iterable[str]) -> list[Fields]:
    wanted = sorted(methods)
    if not wanted:
        return []
    match = {"exact": wanted[0]} if len(wanted) == 1 else {"safe_regex": {"regex": "|".join(wanted)}}
    return [{"name": ":method", "string_match": match}]


def _header_match(match: HeaderMatch) -> Fields:
    return {"name": match.name, "invert_match": match.invert, **_value_match(match)}


def _query_match(match: QueryMatch) -> Fields:
    return {"name": match.name, **_value_match(match)}


def _value_match(match: HeaderMatch | QueryMatch) -> Fields:
    if match.exact is not None:
        return {"string_match": {"exact": match.exact}}
    if match.regex is not None:
        return {"string_match": {"safe_regex": {"regex": match.regex}}}
    return {"present_match": match.present is not False}


def _redirect(redirect: Redirect, door: Door) -> Fields:
    path = {"path_redirect": redirect.path} if redirect.path is not None else {}
    prefix = {"prefix_rewrite": redirect.prefix_rewrite} if redirect.prefix_rewrite is not None else {}
    return {
        "host_redirect": redirect.host or "",
        "scheme_redirect": redirect.scheme or "",
        "port_redirect": _redirect_port(redirect, door) or 0,
        "response_code": _REDIRECT_CODES[redirect.response_code],
        "strip_query": redirect.query == "remove",
        **path,
        **prefix,
    }


_REDIRECT_CODES = {301: "MOVED_PERMANENTLY", 302: "FOUND", 303: "SEE_OTHER", 307: "TEMPORARY_REDIRECT", 308: "PERMANENT_REDIRECT"}


def _redirect_port(redirect: Redirect, door: Door) -> int | None:
    """The port that clients came to, which is no longer in their Host; None for another host and for the scheme's own port."""
    here, standard = ("https", 443) if door.tls else ("http", 80)
    if redirect.host is not None:
        return None
    if redirect.scheme in {None, here}:
        return None if door.port == standard else door.port
    return None if redirect.scheme == "http" or door.https_port == 443 else door.https_port


def _redirect_with_query(redirect: Redirect, door: Door) -> Fields:
    """Envoy can only keep or drop the query string, so that one which replaces it needs a Location of our own."""
    if redirect.prefix_rewrite is not None:
        raise Unrenderable("a redirect cannot rewrite a prefix and replace the query string at once")
    port = _redirect_port(redirect, door)
    scheme = literal(redirect.scheme or ("https" if door.tls else "http"))
    host = "%REQ(:AUTHORITY)%" if redirect.host is None else literal(redirect.host)
    path = "%PATH(NQ)%" if redirect.path is None else literal(redirect.path)
    query = literal(redirect.query.removeprefix("replace:"))
    location = f"{scheme}://{host}{'' if port is None else f':{port}'}{path}?{query}"
    return {"direct_response": {"status": redirect.response_code}, "response_headers_to_add": [header("location", location)]}


def _forwards(match: RouteMatch, forward: Forward, context: _Context) -> Iterable[tuple[Fields, Fields]]:
    targets = _targets(forward.pools, context.reaches)
    if not targets:
        yield _match(match), {"direct_response": {"status": 503, "body": {"inline_string": "no origin pool"}}}
        return
    crosses = not all(names.is_local(cluster) for order, _ in targets for cluster in order)
    for visit in visits(forward.hash_policies or context.lb.hash_policies):
        conditions = _match(match)
        action = _forward(targets, forward, context)
        yield {**conditions, "headers": [*conditions["headers"], *visit.conditions]}, visit.applied(action, crosses=crosses)


def _targets(pools: Iterable[WeightedPool], reaches: Mapping[str, Reach]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Orders of clusters with weights. Pools of the best priority share the requests; each order goes on through all others."""
    groups = ranked(pool for pool in pools if pool.weight and pool.pool in reaches)
    if not groups:
        return ()
    first = groups[0]
    targets: dict[tuple[str, ...], int] = {}
    for pool in first:
        others = [other for other in first if other is not pool]
        fallback = [cluster for other in chain(others, *groups[1:]) for cluster in reaches[other.pool].orders()[0][0]]
        for order, share in reaches[pool.pool].orders():
            clusters = tuple(dict.fromkeys([*order, *fallback]))
            targets[clusters] = targets.get(clusters, 0) + pool.weight * share
    return tuple(targets.items())


def ranked(pools: Iterable[WeightedPool]) -> list[list[WeightedPool]]:
    """Groups of equal priority, the one to use first first."""
    used = list(pools)
    return [[pool for pool in used if _rank(pool) == rank] for rank in sorted({_rank(pool) for pool in used})]


def _rank(pool: WeightedPool) -> float:
    """Priority 1 is used first, then 2, 3 …, and 0 last."""
    return pool.priority or float("inf")


def _orders(route: Route, context: _Context) -> Iterable[tuple[str, ...]]:
    if route.forward is not None and _on_port(route.match, context.door.port):
        yield from (order for order, _ in _targets(route.forward.pools, context.reaches))


def _forward(targets: Sequence[tuple[tuple[str, ...], int]], forward: Forward, context: _Context) -> Fields:
    action = {
        **_clusters(targets),
        "timeout": milliseconds(forward.timeout),
        "retry_policy": retries.policy(forward.retry, [order for order, _ in targets]),
        **_host(forward),
        **_rewrite(forward),
        **_idle(forward, context.lb),
    }
    if forward.web_socket:
        action["upgrade_configs"] = [{"upgrade_type": "websocket"}]
    return {"route": action}


def _clusters(targets: Sequence[tuple[tuple[str, ...], int]]) -> Fields:
    if len(targets) == 1:
        return {"cluster": names.first_of(targets[0][0])}
    weighted = [{"name": names.first_of(order), "weight": number(weight)} for order, weight in targets]
    return {"weighted_clusters": {"clusters": weighted}}


def _host(forward: Forward) -> Fields:
    if forward.auto_host_rewrite:
        return {"auto_host_rewrite": flag(True)}
    return {} if forward.host_rewrite is None else {"host_rewrite_literal": forward.host_rewrite}


def _rewrite(forward: Forward) -> Fields:
    if forward.regex_rewrite is not None:
        rewrite = forward.regex_rewrite
        return {"regex_rewrite": {"pattern": {"regex": rewrite.pattern}, "substitution": rewrite.substitution}}
    return {} if forward.prefix_rewrite is None else {"prefix_rewrite": forward.prefix_rewrite}


def _idle(forward: Forward, lb: HttpLoadBalancer) -> Fields:
    limit = (forward.web_socket and forward.web_socket_idle_timeout) or lb.idle_timeout
    return {"idle_timeout": milliseconds(limit)} if limit else {}
