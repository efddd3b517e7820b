"""Requests that cross clusters, and keep crossing while things restart."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from lab.fabric import Fabric
from lab.process import ProcessFailed
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.traffic import Outcome, Traffic
from lab.wait import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

ECHO = (sys.executable, "-m", "lab.echo")
CHECK = {"http_health_check": {"path": "/health", "use_origin_server_name": {}}, "interval": 1, "timeout": 1}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Service `echo` in b and `both` in a and b, called from a."""
    async with Fabric(("a", "b")) as fabric:
        show_logs_of.append(fabric)
        a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
        await b.cluster.deploy("echo", ECHO)
        await a.cluster.deploy("both", ECHO)
        await b.cluster.deploy("both", ECHO)
        await b.cluster.deploy("bytes", [*ECHO, "--tcp"], port=9000)
        await b.cluster.deploy("ledger", (sys.executable, "-m", "lab.bank.ledger"), port=5432)
        await api.create("healthcheck", "alive", {**CHECK, "healthy_threshold": 1, "unhealthy_threshold": 2})
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"], healthcheck=[{"name": "alive"}]))
        await api.create("origin_pool", "both", k8s_pool("both", ["a", "b"], healthcheck=[{"name": "alive"}]))
        await api.create("origin_pool", "bytes", k8s_pool("bytes", ["b"], port=9000))
        await api.create("origin_pool", "ledger", k8s_pool("ledger", ["b"], port=5432))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
        await api.create("http_loadbalancer", "both", http_loadbalancer("both.test", ["both"], ["a"]))
        await api.create("tcp_loadbalancer", "bytes", tcp_loadbalancer(["bytes"], ["a"], 9000))
        await api.create("tcp_loadbalancer", "ledger", tcp_loadbalancer(["ledger"], ["a"], 5432))
        for kind, name in (
            ("http_loadbalancer", "echo"),
            ("http_loadbalancer", "both"),
            ("tcp_loadbalancer", "bytes"),
            ("tcp_loadbalancer", "ledger"),
        ):
            await api.applied(kind, name)
        yield fabric


async def answered(fabric: Fabric, domain: str) -> None:
    """Until the first request through this load balancer succeeds."""
    client = await fabric.site("a").http(8080, domain)

    async def succeeds() -> bool:
        return (await client.get("/")).is_success

    await until(succeeds, f"{domain} to answer")


async def test_a_request_that_enters_in_one_cluster_is_served_in_the_other(fabric: Fabric) -> None:
    """The very first one after the status said applied."""
    client = await fabric.site("a").http(8080, "echo.test")
    answer = await client.post("/orders?id=7", content=b"two of each")
    assert answer.status_code == 200
    assert answer.json() | {"headers": {}} == {
        "pod": fabric.site("b").cluster.services["echo"].pods[0].name,
        "method": "POST",
        "path": "/orders?id=7",
        "headers": {},
        "body": "two of each",
    }


async def test_no_header_of_the_fabric_reaches_an_application(fabric: Fabric) -> None:
    client = await fabric.site("a").http(8080, "echo.test")
    answer = await client.get("/", headers={"x-isthmus-lb": "lab/other", "x-isthmus-peer": "me"})
    assert [name for name in answer.json()["headers"] if name.startswith("x-isthmus")] == []
    assert answer.json()["headers"]["host"] == "echo.test"


async def test_an_unknown_domain_is_not_found(fabric: Fabric) -> None:
    client = await fabric.site("a").http(8080, "nobody.test")
    assert (await client.get("/")).status_code == 404


async def test_traffic_follows_the_number_of_pods_and_loses_nothing(fabric: Fabric) -> None:
    await answered(fabric, "echo.test")
    client, cluster = await fabric.site("a").http(8080, "echo.test"), fabric.site("b").cluster
    async with Traffic(client, "/") as traffic:
        for replicas in (3, 1):
            await cluster.scale("echo", replicas)
            pods = {pod.name for pod in cluster.services["echo"].pods}

            async def follows(pods: set[str] = pods) -> bool:
                return set(traffic.pods(30)) == pods

            await until(follows, f"traffic to reach {pods}")
    assert traffic.failures == []


async def test_bytes_cross_in_both_directions_and_half_closing_works(fabric: Fabric) -> None:
    reader, writer = await fabric.site("a").connect(9000)
    sent = os.urandom(1 << 20)
    writer.write(sent)
    writer.write_eof()
    received = await reader.read(-1)
    writer.close()
    name, _, echoed = received.partition(b"\n")
    assert name.decode() == fabric.site("b").cluster.services["bytes"].pods[0].name
    assert echoed == sent


async def test_a_real_database_is_used_across(fabric: Fabric) -> None:
    host, port = await fabric.site("a").reach(5432)
    connection = await psycopg.AsyncConnection.connect(f"host={host} port={port} user=postgres dbname=postgres connect_timeout=10")
    async with connection:
        rows = await (await connection.execute("SELECT count(*) FROM generate_series(1, 100000)")).fetchone()
    assert rows == (100000,)


async def test_nothing_is_lost_while_the_control_plane_restarts(fabric: Fabric) -> None:
    client = await fabric.site("a").http(8080, "echo.test")
    async with Traffic(client, "/") as traffic:
        await fabric.replicas[0].process.kill()
        await traffic.more(50)
        await fabric.replicas[0].start()
        await _change_arrives(fabric, "after-controlplane.test")
    assert traffic.failures == []


async def test_nothing_is_lost_while_the_database_restarts(fabric: Fabric) -> None:
    client = await fabric.site("a").http(8080, "echo.test")
    async with Traffic(client, "/") as traffic:
        await fabric.postgres.restart()
        await _change_arrives(fabric, "after-postgres.test")
    assert traffic.failures == []


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGKILL])
async def test_nothing_is_lost_while_an_agent_restarts(fabric: Fabric, name: str, how: signal.Signals) -> None:
    """Its Envoy serves on, and the new agent takes it over."""
    client, site = await fabric.site("a").http(8080, "echo.test"), fabric.site(name)
    async with Traffic(client, "/") as traffic:
        site.agent.signal(how)
        await site.agent.ended()
        await traffic.more(50)
        await site.agent.start()
        await _change_arrives(fabric, f"after-{name}-{how.value}.test")
    assert traffic.failures == []


async def _replaced(site: Site, pid: int) -> bool:
    try:
        return site.envoy_pid() != pid
    except ProcessFailed:
        return False


@pytest.mark.parametrize("name", ["a", "b"])
async def test_a_killed_envoy_is_back_within_seconds(fabric: Fabric, name: str) -> None:
    client, site = await fabric.site("a").http(8080, "echo.test"), fabric.site(name)
    async with Traffic(client, "/") as traffic:
        await traffic.more(20)
        killed = site.envoy_pid()
        os.kill(killed, signal.SIGKILL)
        await until(lambda: _replaced(site, killed), "another Envoy to run")
        await traffic.more(100, lambda outcome: not outcome.failed)
        settled = len(traffic.outcomes)
        await traffic.more(100)
    assert [outcome for outcome in traffic.outcomes[settled:] if outcome.failed] == []


async def test_a_site_without_endpoints_is_not_chosen_while_the_control_plane_is_frozen(fabric: Fabric) -> None:
    await answered(fabric, "both.test")
    client, remote = await fabric.site("a").http(8080, "both.test"), fabric.site("b").cluster
    local = fabric.site("a").cluster.services["both"].pods[0].name
    async with Traffic(client, "/") as traffic:
        await traffic.more(1, lambda outcome: outcome.pod != local)
        fabric.replicas[0].process.freeze()
        try:
            for _ in range(3):
                await remote.scale("both", 0)
                await traffic.more(100)
                assert set(traffic.pods(50)) == {local}
                await remote.scale("both", 1)
                back = remote.services["both"].pods[0].name
                await traffic.more(1, partial(_is_from, back))
        finally:
            fabric.replicas[0].process.thaw()
    assert traffic.failures == []


def _is_from(pod: str, outcome: Outcome) -> bool:
    return outcome.pod == pod


async def test_one_bad_object_is_quarantined_and_named_while_others_flow(fabric: Fabric) -> None:
    """A port that something else at the site has taken: only the site's Envoy can find out."""
    a, api = fabric.site("a"), fabric.api
    with a.place.listen(a.place.inside, 9099):
        await api.create("tcp_loadbalancer", "taken", tcp_loadbalancer(["bytes"], ["a"], 9099))
        await _change_arrives(fabric, "beside-a-bad-one.test")

        async def is_rejected() -> bool:
            site = await _status_at(fabric, "tcp_loadbalancer", "taken", "a")
            return site["state"] == "Rejected" and "9099" in str(site)

        await until(is_rejected, "the bad object's status to say Rejected")
        assert (await _status_at(fabric, "http_loadbalancer", "echo", "a"))["state"] == "Applied"
    await api.delete("tcp_loadbalancer", "taken")


async def _status_at(fabric: Fabric, kind: str, name: str, site: str) -> Any:
    status = await fabric.api.status(kind, name)
    return next(at for at in status["sites"] if at["site"] == site)


async def _change_arrives(fabric: Fabric, domain: str) -> None:
    """A new load balancer works."""
    name = domain.removesuffix(".test")
    created = await fabric.api.create("http_loadbalancer", name, http_loadbalancer(domain, ["echo"], ["a"]))
    await fabric.api.applied("http_loadbalancer", name, revision=created["revision"])
    await answered(fabric, domain)
