"""Load balancers as items: what they do with a request, wherever they listen."""

from functools import lru_cache
from typing import Literal

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.claims import LoadBalancer
from controlplane.compile.intent import CACHE
from controlplane.compile.routes import compile_route, cookie_policy, default_route, hash_policies, header_edits, weighted_pools
from controlplane.compile.snapshot import CompiledItem
from controlplane.compile.tls import server_tls
from controlplane.resources.base import Key, Stored
from controlplane.resources.http_loadbalancer import HttpLoadBalancer, MoreOption
from controlplane.resources.tcp_loadbalancer import TcpLoadBalancer

Algorithm = Literal["ROUND_ROBIN", "LEAST_REQUEST", "RANDOM", "LB_OVERRIDE"]
"""How a load balancer wants pools with `LB_OVERRIDE` to balance; itself `LB_OVERRIDE` for consistent hashing."""


@lru_cache(CACHE)
def load_balancer_item(stored: Stored[LoadBalancer], missing: frozenset[Key], policies: tuple[str, ...] | None) -> CompiledItem:
    """`missing`: its pools that are not there; `policies`: keys of those that apply, None for none."""
    spec = stored.spec
    if isinstance(spec, TcpLoadBalancer):
        return CompiledItem.of(ItemKind.TCP_LOADBALANCER, str(stored.key), _tcp(spec, missing, policies))
    return CompiledItem.of(ItemKind.HTTP_LOADBALANCER, str(stored.key), _http(spec, missing, policies))


def exempts_routes(spec: LoadBalancer) -> bool:
    """Whether its policies do not apply to some route."""
    options = (route.simple_route and route.simple_route.advanced_options for route in getattr(spec, "routes", ()))
    return any(each.service_policy.disable for each in options if each and each.service_policy)


def algorithm(spec: LoadBalancer) -> Algorithm:
    if isinstance(spec, TcpLoadBalancer):
        least_active, random = spec.hash_policy_choice_least_active, spec.hash_policy_choice_random
        round_robin = spec.hash_policy_choice_round_robin
    else:
        least_active, random, round_robin = spec.least_active, spec.random, spec.round_robin
    return "LEAST_REQUEST" if least_active else "RANDOM" if random else "ROUND_ROBIN" if round_robin else "LB_OVERRIDE"


def lost_sites(spec: LoadBalancer) -> items.LostSites:
    """What it wants of pools at sites that are lost."""
    return "evict" if spec.evict_lost_sites else "keep" if spec.keep_lost_sites else "deprioritise"


def _tcp(spec: TcpLoadBalancer, missing: frozenset[Key], policies: tuple[str, ...] | None) -> items.TcpLoadBalancer:
    return items.TcpLoadBalancer(
        pools=weighted_pools(spec.origin_pools_weights, missing),
        idle_timeout=spec.idle_timeout or 3_600_000,
        hash_source_ip=spec.hash_policy_choice_source_ip_stickiness is not None,
        policies=policies,
    )


def _http(spec: HttpLoadBalancer, missing: frozenset[Key], policies: tuple[str, ...] | None) -> items.HttpLoadBalancer:
    options = spec.more_option or MoreOption()
    https = spec.https
    routes = tuple(compile_route(route, missing) for route in spec.routes)
    default = (default_route(spec.default_pools, missing),) if spec.default_pools else ()
    return items.HttpLoadBalancer(
        domains=spec.domains,
        tls=server_tls(https.tls_parameters) if https and https.tls_parameters else None,
        https_redirect=https is not None and https.http_redirect,
        hsts=https is not None and https.add_hsts,
        routes=routes + default,
        hash_policies=_hash_policies(spec),
        headers=header_edits(options),
        policies=policies,
        idle_timeout=options.idle_timeout,
        max_request_header_kib=options.max_request_header_size or 60,
    )


def _hash_policies(spec: HttpLoadBalancer) -> tuple[items.HashPolicy, ...]:
    if spec.source_ip_stickiness:
        return (items.HashPolicy(source_ip=True),)
    if spec.cookie_stickiness:
        return (cookie_policy(spec.cookie_stickiness),)
    return hash_policies(spec.ring_hash.hash_policy) if spec.ring_hash else ()
