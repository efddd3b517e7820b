"""Specs of the objects that tests and benchmarks need most, as small as the API allows."""

from collections.abc import Sequence
from typing import Any

from lab.cluster import NAMESPACE

INSIDE = "SITE_NETWORK_INSIDE"


def k8s_pool(service: str, sites: Sequence[str], port: int = 8080, **more: Any) -> dict[str, Any]:
    """Origins are this Kubernetes service at each of these sites."""
    origins = [
        {
            "k8s_service": {
                "service_name": f"{service}.{NAMESPACE}",
                "site_locator": {"site": {"namespace": "system", "name": site}},
                "vk8s_networks": {},
            }
        }
        for site in sites
    ]
    return {"origin_servers": origins, "port": port, "no_tls": {}, "loadbalancer_algorithm": "ROUND_ROBIN", **more}


def http_loadbalancer(domain: str, pools: Sequence[str], sites: Sequence[str], port: int = 8080, **more: Any) -> dict[str, Any]:
    """All of the domain to these pools; advertised on the inside network of these sites."""
    return {
        "domains": [domain],
        "http": {"port": port},
        "advertise_custom": advertise(sites),
        "default_route_pools": [_weighted(pool) for pool in pools],
        **more,
    }


def tcp_loadbalancer(pools: Sequence[str], sites: Sequence[str], port: int, **more: Any) -> dict[str, Any]:
    return {
        "listen_port": port,
        "no_sni": {},
        "tcp": {},
        "advertise_custom": advertise(sites),
        "origin_pools_weights": [_weighted(pool) for pool in pools],
        **more,
    }


def advertise(sites: Sequence[str], network: str = INSIDE) -> dict[str, Any]:
    where = [{"site": {"network": network, "site": {"namespace": "system", "name": site}}, "use_default_port": {}} for site in sites]
    return {"advertise_where": where}


def _weighted(pool: str) -> dict[str, Any]:
    return {"pool": {"name": pool}, "weight": 1, "priority": 1}
