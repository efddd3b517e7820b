"""Agents that come and go while paths are lost, and sites that the control plane is far away from."""

import json
import signal
import sys

import pytest

from lab import faults
from lab.api import NAMESPACE
from lab.fabric import MESH, SELECTOR, Fabric
from lab.site import Node
from lab.specs import http_loadbalancer, k8s_pool
from lab.traffic import Traffic
from lab.wait import until
from tests.e2e.calls import answers

pytestmark = pytest.mark.timeout(180)
ECHO = (sys.executable, "-m", "lab.echo")
FORWARD_PORT = 15444


def status(node: Node) -> dict[str, object]:
    said: dict[str, object] = json.loads((node.state / "run" / "status.json").read_bytes())
    return said


async def relayed(node: Node, after: object = None) -> None:
    """Until an agent other than process `after` uses an edge."""

    async def is_so() -> bool:
        said = status(node)
        assert isinstance(said["peers"], list)
        used = (peer for peer in said["peers"] if peer["in_use"] and peer["state"] == "UP")
        return said["pid"] != after and any(peer["path"] not in ("direct", "reverse") for peer in used)

    await until(is_so, f"{node.name} to use an edge", within_s=60)


async def reached(node: Node, url: str) -> None:
    """Until the agent is connected to the control plane at this URL."""

    async def is_so() -> bool:
        said = status(node)
        return said["control_plane"] == url and bool(said["connected"])

    await until(is_so, f"{node.name} to be connected to {url}", within_s=60)


async def test_agents_restart_on_a_relayed_path_without_the_control_plane(show_logs_of: list[Fabric]) -> None:
    async with Fabric(("a", "b"), edges=("e1", "e2"), mesh=False) as fabric:
        show_logs_of.append(fabric)
        if not faults.can_filter(fabric.network):
            pytest.skip("needs root, network namespaces and nftables")
        a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
        await api.create("virtual_site", "all", SELECTOR, namespace="shared")
        await api.create("site_mesh_group", "all", {**MESH, "enable_re_fallback": {}})
        await api.create("namespace", NAMESPACE, {})
        await b.cluster.deploy("echo", ECHO)
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
        await api.applied("http_loadbalancer", "echo")
        client = await answers(fabric, "a")
        with faults.silent([a.place], [b.place]):
            await relayed(a.node)
            for replica in fabric.replicas:
                await replica.stop()
            async with Traffic(client, "/", rate=50) as traffic:
                for site, sign in ((a, signal.SIGHUP), (a, signal.SIGKILL), (b, signal.SIGKILL)):
                    before = status(a.node)["pid"]
                    site.agent.signal(sign)
                    await site.agent.ended()
                    await site.agent.start()
                    if site is a:
                        await relayed(a.node, after=before)
                    await traffic.more(100)
            assert traffic.failures == []


async def test_a_site_without_another_way_reaches_the_control_plane_through_an_edge(show_logs_of: list[Fabric]) -> None:
    async with Fabric(("a",), edges=("e1",)) as fabric:
        show_logs_of.append(fabric)
        a, edge, url = fabric.site("a"), fabric.edge("e1"), fabric.replicas[0].url
        if not a.node.ways_out:
            pytest.skip("needs root and network namespaces")
        through = f"{edge.place.underlay}:{FORWARD_PORT}"
        for node, settings in (
            (edge.node, {"AGENT_FORWARD_ADDRESS": through}),
            (a.node, {"AGENT_CONTROL_PLANE_URLS": f"{url},{url}#{through}"}),
        ):
            await node.agent.stop()
            node.agent.env = {**node.agent.env, **settings}
            await node.agent.start()
        await reached(a.node, url)
        for way in a.node.ways_out:
            await way.stop()
        await reached(a.node, f"{url}#{through}")
        created = await fabric.api.create("http_loadbalancer", "nowhere", http_loadbalancer("nowhere.test", [], ["a"], routes=[_HELLO]))
        await fabric.api.applied("http_loadbalancer", "nowhere", revision=created["revision"])


_HELLO = {"direct_response_route": {"path": {"prefix": "/"}, "http_method": "ANY", "route_direct_response": {"response_code": 200}}}
