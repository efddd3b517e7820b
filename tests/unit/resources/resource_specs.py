"""Smallest specs that are accepted, one per kind, and shortcuts to read bodies."""

import base64
import copy
from typing import Any

import pytest

from controlplane.errors import Invalid
from controlplane.resources.registry import parse

POOL = {"pool": {"name": "cart"}}
PLACE = {"site": {"site": {"name": "a"}}}

SMALLEST: dict[str, dict[str, Any]] = {
    "namespace": {},
    "site": {},
    "virtual_site": {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["env = prod"]}},
    "site_mesh_group": {"full_mesh": {}},
    "discovery": {
        "where": {"site": {"ref": [{"name": "a"}]}},
        "discovery_k8s": {"access_info": {"in_cluster": True}},
    },
    "healthcheck": {"tcp_health_check": {}, "interval": 15, "timeout": 3, "healthy_threshold": 3, "unhealthy_threshold": 1},
    "origin_pool": {
        "origin_servers": [{"k8s_service": {"service_name": "cart.shop", "site_locator": {"site": {"name": "a"}}}}],
        "port": 80,
    },
    "http_loadbalancer": {"domains": ["cart"], "http": {}, "do_not_advertise": {}},
    "tcp_loadbalancer": {"listen_port": 5432, "do_not_advertise": {}, "origin_pools_weights": [POOL]},
    "service_policy": {"allow_all_requests": {}},
}

HOMES = {"namespace": "", "site": "system", "site_mesh_group": "system"}


def inline(data: bytes) -> str:
    return "string:///" + base64.b64encode(data).decode()


def changed(kind: str, **changes: Any) -> dict[str, Any]:
    """The smallest spec of a kind with other members."""
    return {**copy.deepcopy(SMALLEST[kind]), **changes}


def read(kind: str, spec: Any, **path: Any) -> Any:
    """The parsed spec."""
    home = {"namespace": HOMES.get(kind, "shop")} | path
    return parse(kind, {"metadata": {"name": "x"}, "spec": spec}, **home).spec


def refusals(kind: str, spec: Any, **path: Any) -> dict[str, str]:
    """What is wrong, by JSON path."""
    with pytest.raises(Invalid) as refused:
        read(kind, spec, **path)
    return {detail.field: detail.description for detail in refused.value.details}
