"""How the failure matrix counts, and a few of its faults on real processes."""

import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from bench.failover import markdown
from bench.failures import ROWS, Aim, Row, no_endpoints
from bench.load import Attempt
from bench.outage import Outage, outage
from bench.scenes import SCENES
from lab import faults
from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool
from lab.traffic import Traffic
from tests.e2e.calls import answers


def asked(began: float, took_s: float, error: str = "") -> Attempt:
    return Attempt(began, began + took_s, error)


def said(talk: int, began: float, took_s: float = 0.0, error: str = "") -> Attempt:
    return Attempt(began, began + took_s, error, talk)


def test_recovery_ends_with_the_last_bad_answer_and_staleness_with_the_last_that_was_sent_there() -> None:
    requests = [asked(8, 0.1), asked(9.5, 2.0), asked(10.5, 1.0, "503"), asked(12, 0.1), asked(30, 0.1)]
    found = outage(requests, [], began=10, mended=20)
    assert (found.requests, found.failed) == (4, 1)
    assert (found.stall_s, found.recovered_s, found.stale_s) == (2.0, 1.5, 0.5)


def test_what_still_fails_when_the_fault_ends_has_not_recovered() -> None:
    requests = [asked(10 + n, 0.1, "503") for n in range(11)]
    found = outage(requests, [], began=10, mended=20)
    assert found.recovered_s is None
    assert Aim(recovered_s=3).missed(found) == ["did not recover"]


def test_failures_after_the_fault_count_and_do_not_delay_recovery() -> None:
    found = outage([asked(11, 0.1), asked(21, 0.1, "503")], [], began=10, mended=20)
    assert (found.failed, found.recovered_s) == (1, 0.0)


def test_a_connection_breaks_once_however_often_a_new_one_is_refused() -> None:
    words = [said(1, 9.9, 0.2), said(1, 10.2, 0.1, "reset"), said(1, 10.4, 0.1, "refused"), said(1, 10.6, 0.1), said(2, 9.9, 1.5)]
    found = outage([], words, began=10, mended=20)
    assert found.broken == 1
    assert found.silence_s == pytest.approx(1.5)


def test_a_missed_aim_is_said_in_the_table() -> None:
    row = Row("origin gone", "mesh", "both", no_endpoints, Aim(failed=0, stall_s=1.5, recovered_s=3.0))
    found = Outage(100, 2, 4.0, 5.0, 4.5, 1, 5.0)
    table = markdown([(row, found), (row, "the fabric broke")], quick=True)
    assert "**missed**: 2 failed, stalled 4.0 s, took 5.0 s" in table
    assert "**no figures**: the fabric broke" in table


def test_every_row_has_a_name_of_its_own_and_a_scene() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.scene for row in ROWS} <= SCENES.keys()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Site b has three nodes, and a service that a calls."""
    async with Fabric(("a", "b"), nodes={"b": 3}) as fabric:
        show_logs_of.append(fabric)
        await fabric.site("b").cluster.deploy("echo", (sys.executable, "-m", "lab.echo"))
        await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await fabric.api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a", "b"]))
        await fabric.api.applied("http_loadbalancer", "echo")
        yield fabric


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(180)
async def test_every_node_of_a_site_serves_its_load_balancers(fabric: Fabric) -> None:
    for node in fabric.site("b").nodes:
        client = await node.http(8080, "echo.test")
        assert (await client.get("/")).is_success


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [0, 1, 2])
async def test_one_of_three_nodes_is_killed_and_comes_back_without_a_failed_request(fabric: Fabric, number: int) -> None:
    client, node = await answers(fabric, "a"), fabric.site("b").nodes[number]
    async with Traffic(client, "/") as traffic:
        await traffic.more(50)
        await faults.kill([node])
        await traffic.more(200)
        await node.agent.start()
        await fabric.online("b")
        await traffic.more(100)
    assert traffic.failures == []
