"""Routes of HTTP load balancers. Values that users wrote stay literal: doubling `%` for Envoy is the agent's part."""

from collections.abc import Iterable

from agent.protocol import items
from controlplane.compile.tls import inline_text, secret_ref
from controlplane.resources import route as resources
from controlplane.resources.base import Key, chosen
from controlplane.resources.headers import HeaderEdits, HeaderToAdd
from controlplane.resources.scalars import port_ranges

_DEFAULT_TIMEOUT_MS = 30_000
_NO_POOL = items.DirectResponse(status=503, body="no origin pool")


def compile_route(route: resources.Route, missing: frozenset[Key]) -> items.Route:
    """A route none of whose pools is there answers 503: what it matches must not fall through to the next one."""
    name, body = chosen(route, "choice")
    match = _match(body)
    if name == "redirect_route":
        return items.Route(match=match, redirect=_redirect(body.route_redirect))
    if name == "direct_response_route":
        return items.Route(match=match, response=_response(body.route_direct_response))
    return _simple(match, body, missing)


def default_route(pools: Iterable[resources.PoolWithWeight], missing: frozenset[Key]) -> items.Route:
    match = items.RouteMatch(prefix="/")
    there = weighted_pools(pools, missing)
    return items.Route(match=match, forward=items.Forward(pools=there)) if there else items.Route(match=match, response=_NO_POOL)


def weighted_pools(pools: Iterable[resources.PoolWithWeight], missing: frozenset[Key]) -> tuple[items.WeightedPool, ...]:
    return tuple(
        items.WeightedPool(pool=str(use.pool.key), weight=use.weight, priority=use.priority)
        for use in pools
        if use.pool and use.pool.key not in missing
    )


def header_edits(edits: HeaderEdits | None) -> items.HeaderEdits:
    if edits is None:
        return items.HeaderEdits()
    return items.HeaderEdits(
        request_add=_added(edits.request_headers_to_add),
        request_remove=edits.request_headers_to_remove,
        response_add=_added(edits.response_headers_to_add),
        response_remove=edits.response_headers_to_remove,
    )


def hash_policies(policies: Iterable[resources.HashPolicy]) -> tuple[items.HashPolicy, ...]:
    return tuple(_hash_policy(policy) for policy in policies)


def cookie_policy(cookie: resources.CookieForHashing, *, terminal: bool = False) -> items.HashPolicy:
    return items.HashPolicy(cookie=cookie.name, cookie_ttl=cookie.ttl, cookie_path=cookie.path or "", terminal=terminal)


def _simple(match: items.RouteMatch, route: resources.SimpleRoute, missing: frozenset[Key]) -> items.Route:
    options = route.advanced_options or resources.RouteOptions()
    headers = header_edits(options)
    pools = weighted_pools(route.origin_pools, missing)
    unguarded = options.service_policy is not None and options.service_policy.disable
    if not pools:
        return items.Route(match=match, response=_NO_POOL, headers=headers, policy_disabled=unguarded)
    web_socket = options.web_socket_config
    forward = items.Forward(
        pools=pools,
        timeout=options.timeout or _DEFAULT_TIMEOUT_MS,
        retry=_retry(options),
        host_rewrite=route.host_rewrite,
        auto_host_rewrite=route.auto_host_rewrite is not None,
        prefix_rewrite=options.prefix_rewrite,
        regex_rewrite=_regex_rewrite(options.regex_rewrite),
        web_socket=web_socket is not None and web_socket.use_websocket,
        web_socket_idle_timeout=web_socket.idle_timeout if web_socket else 0,
        hash_policies=hash_policies(options.specific_hash_policy.hash_policy if options.specific_hash_policy else ()),
    )
    return items.Route(match=match, forward=forward, headers=headers, policy_disabled=unguarded)


def _match(route: resources.Matching) -> items.RouteMatch:
    return items.RouteMatch(
        prefix=route.path.prefix,
        path=route.path.path,
        regex=route.path.regex,
        methods=() if route.http_method == "ANY" else (route.http_method,),
        headers=tuple(_header_match(header) for header in route.headers),
        incoming_ports=_incoming_ports(route.incoming_port),
    )


def _header_match(header: resources.HeaderMatch) -> items.HeaderMatch:
    """Presence is always asked as a positive question, which may be inverted."""
    if header.exact is not None or header.regex is not None:
        return items.HeaderMatch(name=header.name, exact=header.exact, regex=header.regex, invert=header.invert_match)
    absent = header.presence is False
    return items.HeaderMatch(name=header.name, present=True, invert=header.invert_match != absent)


def _incoming_ports(port: resources.PortMatch | None) -> tuple[tuple[int, int], ...]:
    if port is None or port.no_port_match:
        return ()
    return port_ranges(port.port_ranges) if port.port_ranges else ((port.port, port.port),) if port.port else ()


def _retry(options: resources.RouteOptions) -> items.RetryPolicy:
    policy = options.retry_policy
    if policy is None:
        return items.RetryPolicy(num_retries=0) if options.no_retry_policy else items.RetryPolicy()
    back_off = policy.back_off or resources.BackOff()
    return items.RetryPolicy(
        num_retries=policy.num_retries,
        conditions=policy.retry_condition,
        status_codes=policy.retriable_status_codes,
        per_try_timeout=policy.per_try_timeout,
        back_off_base=back_off.base_interval,
        back_off_max=back_off.max_interval,
    )


def _regex_rewrite(rewrite: resources.RegexRewrite | None) -> items.RegexRewrite | None:
    return items.RegexRewrite(pattern=rewrite.pattern, substitution=rewrite.substitution) if rewrite else None


def _hash_policy(policy: resources.HashPolicy) -> items.HashPolicy:
    if policy.cookie:
        return cookie_policy(policy.cookie, terminal=policy.terminal)
    return items.HashPolicy(header=policy.header_name, source_ip=bool(policy.source_ip), terminal=policy.terminal)


def _redirect(redirect: resources.RouteRedirect) -> items.Redirect:
    return items.Redirect(
        host=redirect.host_redirect,
        path=redirect.path_redirect,
        prefix_rewrite=redirect.prefix_rewrite,
        scheme=None if redirect.proto_redirect == "incoming-proto" else redirect.proto_redirect,
        response_code=redirect.response_code,
        query=_query(redirect),
    )


def _query(redirect: resources.RouteRedirect) -> str:
    if redirect.replace_params is not None:
        return f"replace:{redirect.replace_params}"
    return "remove" if redirect.remove_all_params else "retain"


def _response(response: resources.RouteDirectResponse) -> items.DirectResponse:
    encoded = response.response_body_encoded
    return items.DirectResponse(status=response.response_code, body=inline_text(encoded) if encoded else "")


def _added(headers: Iterable[HeaderToAdd]) -> tuple[items.HeaderValue, ...]:
    return tuple(
        items.HeaderValue(
            name=header.name,
            value=header.value or "",
            secret=secret_ref(header.secret_value) if header.secret_value else None,
            append=header.append,
        )
        for header in headers
    )
