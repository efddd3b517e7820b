"""A node that was retired serves nobody any more, says so, and does not come back by itself."""

import sys

import pytest

from lab.fabric import Fabric
from lab.process import ProcessFailed
from lab.specs import http_loadbalancer, k8s_pool

pytestmark = pytest.mark.timeout(240)

ECHO = (sys.executable, "-m", "lab.echo")
REGISTRATIONS = "/api/register/namespaces/system"


async def test_a_retired_node_ends_and_stays_ended(show_logs_of: list[Fabric]) -> None:
    async with Fabric(("a", "b")) as fabric:
        show_logs_of.append(fabric)
        a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
        await b.cluster.deploy("echo", ECHO)
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
        await api.applied("http_loadbalancer", "echo")
        (registration,) = (await api.request("GET", f"{REGISTRATIONS}/registrations_by_site/b"))["items"]
        name = registration["name"]
        await api.request("POST", f"{REGISTRATIONS}/registration/{name}/approve", {"state": "RETIRED"})

        assert await b.agent.ended(within_s=40) == 1
        assert "this node was retired and serves no more" in b.agent.tail()
        with pytest.raises(ProcessFailed, match="no Envoy runs"):
            b.envoy_pid()
        assert (b.node.state / "credentials").exists()
        assert a.envoy_pid()
        a.agent.check()

        for replica in fabric.replicas:
            await replica.stop()
        b.agent.log.write_text("")
        await b.agent.start()
        assert await b.agent.ended(within_s=40) == 1
        assert "this node was retired and serves no more" in b.agent.tail()
        with pytest.raises(ProcessFailed, match="no Envoy runs"):
            b.envoy_pid()
