"""A fabric of one hub, two spokes of which one cannot be dialled, and two regional edges."""

import sys
from typing import Any

from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.wait import until

ECHO = (sys.executable, "-m", "lab.echo")
HUB, NEAR, FAR = "hub", "near", "far"
EDGES = ("e1", "e2")
CHECK = {"http_health_check": {"path": "/health", "use_origin_server_name": {}}, "interval": 1, "timeout": 1}
ANY_PLANE: dict[str, Any] = {"control_and_data_plane_mesh": {}}


def hub_and_spokes(**options: Any) -> Fabric:
    """Not started; `far` dials out only."""
    return Fabric((HUB, NEAR, FAR), edges=EDGES, outbound=(FAR,), mesh=False, **options)


async def furnish(fabric: Fabric) -> None:
    """`near` calls the services of the other two, named after their sites; so does the hub that of `far`."""
    api = fabric.api
    await api.create("namespace", "lab", {})
    for name, sites in (("hubs", [HUB]), ("spokes", [NEAR, FAR])):
        await api.create("virtual_site", name, _of(sites), namespace="shared")
    await api.create("site_mesh_group", "hubs", {"hub_mesh": ANY_PLANE, **_members("hubs")})
    spokes = {**ANY_PLANE, "hub_mesh_group": {"namespace": "system", "name": "hubs"}}
    await api.create("site_mesh_group", "spokes", {"spoke_mesh": spokes, **_members("spokes"), "enable_re_fallback": {}})
    await api.create("healthcheck", "alive", {**CHECK, "healthy_threshold": 1, "unhealthy_threshold": 2})
    for site, callers, port in ((HUB, [NEAR], 9001), (FAR, [NEAR, HUB], 9002)):
        await fabric.site(site).cluster.deploy(f"in-{site}", ECHO)
        await fabric.site(site).cluster.deploy(f"bytes-{site}", [*ECHO, "--tcp"], port=9000)
        await api.create("origin_pool", f"in-{site}", k8s_pool(f"in-{site}", [site], healthcheck=[{"name": "alive"}]))
        await api.create("origin_pool", f"bytes-{site}", k8s_pool(f"bytes-{site}", [site], port=9000))
        await api.create("http_loadbalancer", f"in-{site}", http_loadbalancer(f"{site}.test", [f"in-{site}"], callers))
        await api.create("tcp_loadbalancer", f"bytes-{site}", tcp_loadbalancer([f"bytes-{site}"], callers, port))
        await api.applied("http_loadbalancer", f"in-{site}")
        await api.applied("tcp_loadbalancer", f"bytes-{site}")


def _of(sites: list[str]) -> dict[str, Any]:
    chosen = {"expressions": [f"ves.io/siteName in ({', '.join(sites)})"]}
    return {"site_type": "CUSTOMER_EDGE", "site_selector": chosen}


def _members(virtual_site: str) -> dict[str, Any]:
    return {"virtual_site": [{"kind": "virtual_site", "namespace": "shared", "name": virtual_site}]}


async def path(fabric: Fabric, source: str, to: str) -> dict[str, Any]:
    """How one site reaches another now, as the control plane tells it."""
    answer: dict[str, Any] = await fabric.api.request("GET", f"/api/data/namespaces/system/topology/path?from={source}&to={to}")
    return answer


async def comes_by(fabric: Fabric, source: str, to: str, *ways: str) -> str:
    """Which of these paths it is, once it is one of them."""

    async def one() -> str | None:
        used = (await path(fabric, source, to))["path"]
        return used if used in ways else None

    found = await until(one, f"{source} to reach {to} by {' or '.join(ways)}", within_s=90)
    assert found is not None
    return found


async def drain(fabric: Fabric, edge: str, *, drain: bool = True) -> None:
    await fabric.api.replace("site", edge, {"site_type": "REGIONAL_EDGE", "drain": drain})
