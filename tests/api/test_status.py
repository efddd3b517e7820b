"""Status says what sites reported, and never more."""

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from agent.protocol.items import ItemKind
from agent.protocol.report import OriginHealth, Rejection, Report
from controlplane.api import deps
from tests.api.enrolled import SITES, Node, admitted, caught_up, live
from tests.api.test_delivery import publish, tenant_of, waiting
from tests.api.test_objects import BALANCERS, POOLS, pool
from tests.backend import now

__all__ = ["live"]

STATUS = f"{BALANCERS}/cart/status"
Json = dict[str, Any]


class Clock:
    """The control plane's, as far as requests see it."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return now() + self.ahead


@pytest.fixture
def clock(live: FastAPI) -> Iterator[Clock]:
    clock = Clock()
    live.dependency_overrides[deps._now] = clock
    object.__setattr__(live.state.services.observer, "clock", clock)
    yield clock
    live.dependency_overrides.clear()


async def status(user: httpx.AsyncClient, path: str = STATUS, **query: Any) -> Json:
    answer = await user.get(path, params=query)
    assert answer.status_code in (200, 504), answer.text
    body: Json = answer.json()
    assert body["applied"] == (answer.status_code == 200) or "wait" not in query
    return body


async def apply_latest(app: FastAPI, made: Node) -> str:
    await caught_up(app, tenant_of(made))
    return await made.apply()


async def test_an_object_that_no_site_needs_is_applied(user: httpx.AsyncClient) -> None:
    body = {
        "metadata": {"name": "cart"},
        "spec": {"http_health_check": {"path": "/"}, "timeout": 3, "interval": 15, "unhealthy_threshold": 1, "healthy_threshold": 3},
    }
    await user.post("/api/config/namespaces/shop/healthchecks", json=body)
    body = await status(user, "/api/config/namespaces/shop/healthchecks/cart/status", wait="applied")
    assert (body["applied"], body["reason"], body["sites"]) == (True, "NoSites", [])


async def test_a_change_is_applied_when_every_node_says_so(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        revision = await publish(user, "a")
        assert (await status(user))["sites"][0]["state"] == "Pending"
        wait = asyncio.create_task(status(user, wait="applied", revision=revision, timeout="10s"))
        await apply_latest(live, made)
        body = await wait
        assert (body["applied"], body["reason"], body["revision"]) == (True, "Applied", revision)
        (site,) = body["sites"]
        assert (site["site"], site["state"]) == ("a", "Applied")
        assert site["nodes"][0]["applied_revision"] >= revision


async def test_a_node_with_an_older_manifest_is_pending_and_waiting_times_out(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        await made.apply()
        await publish(user, "a")
        body = await status(user, wait="applied", timeout="100ms")
        assert (body["applied"], body["reason"]) == (False, "Pending")
        assert body["sites"][0]["reason"] == "waiting for node node-1"


async def test_a_change_that_leaves_the_manifest_as_it_is_needs_no_answer(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        await apply_latest(live, made)
        got = (await user.get(f"{BALANCERS}/cart")).json()
        got["metadata"]["description"] = "nobody's config"
        revision = (await user.put(f"{BALANCERS}/cart", json={"metadata": got["metadata"], "spec": got["spec"]})).json()["revision"]
        body = await status(user, wait="applied", revision=revision, timeout="10s")
        assert (body["applied"], body["revision"]) == (True, revision)


async def test_what_envoy_refused_is_shown_with_its_reason_and_not_waited_for(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        await caught_up(live, tenant_of(made))
        manifest = await made.manifest()
        (entry,) = (entry for entry in manifest.entries if entry.kind == ItemKind.HTTP_LOADBALANCER)
        rejection = Rejection(kind=entry.kind, key=entry.key, hash=entry.hash, reason="Proto constraint validation failed")
        await made.beat(applied_hash=manifest.hash, applied_revision=manifest.revision, rejected=(rejection,))
        async with asyncio.timeout(5):
            body = await status(user, wait="applied", timeout="60s")
        assert (body["applied"], body["reason"]) == (False, "Rejected")
        assert "Proto constraint validation failed" in body["conditions"][0]["message"]
        assert (await status(user, f"{POOLS}/cart/status", wait="applied", timeout="10s"))["applied"]
        older = rejection.model_copy(update={"hash": "0" * 32})
        await made.beat(applied_hash=manifest.hash, applied_revision=manifest.revision, rejected=(older,))
        assert (await status(user, wait="applied", timeout="10s"))["applied"]


async def test_what_has_no_item_of_its_own_is_refused_with_what_carries_it(live: FastAPI, user: httpx.AsyncClient) -> None:
    everywhere = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["ves.io/siteName in (a, b)"]}}
    mesh = {"full_mesh": {"control_and_data_plane_mesh": {}}, "virtual_site": [{"namespace": "shared", "name": "all"}]}
    check = {"http_health_check": {"path": "/"}, "timeout": 3, "interval": 15, "unhealthy_threshold": 1, "healthy_threshold": 3}
    async with admitted(live, user, "a") as made, admitted(live, user, "b") as other:
        for path, name, spec in (
            ("shared/virtual_sites", "all", everywhere),
            ("system/site_mesh_groups", "mesh", mesh),
            ("shop/healthchecks", "alive", check),
        ):
            answer = await user.post(f"/api/config/namespaces/{path}", json={"metadata": {"name": name}, "spec": spec})
            assert answer.status_code == 200, answer.text
        served = pool("cart", "b")
        served["spec"]["healthcheck"] = [{"name": "alive"}]
        assert (await user.post(POOLS, json=served)).status_code == 200
        await publish(user, "a")
        await apply_latest(live, other)
        manifest = await made.manifest()
        for kind, path in (
            (ItemKind.ORIGIN_POOL, "shop/healthchecks/alive"),
            (ItemKind.PEER, "system/site_mesh_groups/mesh"),
            (ItemKind.PEER, "shared/virtual_sites/all"),
            (ItemKind.PEER, "system/sites/b"),
        ):
            (entry,) = (entry for entry in manifest.entries if entry.kind == kind)
            rejection = Rejection(kind=kind, key=entry.key, hash=entry.hash, reason="refused")
            await made.beat(applied_hash=manifest.hash, applied_revision=manifest.revision, rejected=(rejection,))
            body = await status(user, f"/api/config/namespaces/{path}/status", wait="applied", timeout="10s")
            assert (path, body["reason"]) == (path, "Rejected")
        await made.beat(applied_hash=manifest.hash, applied_revision=manifest.revision)
        body = await status(user, "/api/config/namespaces/system/site_mesh_groups/mesh/status", wait="applied", timeout="10s")
        assert body["reason"] == "Applied"


async def test_a_site_without_nodes_is_not_applied_unless_ignored(live: FastAPI, user: httpx.AsyncClient) -> None:
    assert (await user.post(SITES, json={"metadata": {"name": "a"}, "spec": {}})).status_code == 200
    await publish(user, "a")
    assert (await status(user, wait="applied", timeout="100ms"))["reason"] == "NoNodes"
    ignored = await status(user, wait="applied", timeout="10s", offline="ignore")
    assert (ignored["applied"], ignored["reason"]) == (True, "NoNodes")
    assert (await user.get(f"{SITES}/a")).json()["spec"]["site_state"] == "WAITING_FOR_REGISTRATION"


async def test_nothing_is_applied_on_the_word_of_a_silent_node(live: FastAPI, user: httpx.AsyncClient, clock: Clock) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        await apply_latest(live, made)
        assert (await status(user, wait="applied", timeout="10s"))["applied"]
        assert (await user.get(f"{SITES}/a")).json()["spec"]["site_state"] == "ONLINE"
        clock.ahead = timedelta(seconds=30)
        body = await status(user)
        assert (body["applied"], body["reason"]) == (False, "Offline")
        assert body["sites"][0]["nodes"][0]["live"] is False
        assert (await user.get(f"{SITES}/a")).json()["spec"]["site_state"] == "FAILED"
        assert [condition["type"] for condition in body["conditions"]] == ["Offline"]
        ignored = await status(user, wait="applied", timeout="10s", offline="ignore")
        assert (ignored["applied"], ignored["reason"]) == (True, "Offline")


async def test_a_condition_is_as_old_as_the_last_heartbeat(live: FastAPI, user: httpx.AsyncClient, clock: Clock) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        await apply_latest(live, made)
        await status(user, wait="applied", timeout="10s")
        clock.ahead = timedelta(hours=7)
        (item,) = (await user.get(f"{BALANCERS}/cart", params={"response_format": "GET_RSP_FORMAT_STATUS"})).json()["status"]
        (condition,) = item["conditions"]
        assert condition["status"] == "Down"
        assert datetime.fromisoformat(condition["last_update_time"]) <= now()


async def test_silence_is_not_judged_before_a_whole_lease_of_health(live: FastAPI, user: httpx.AsyncClient, clock: Clock) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        await apply_latest(live, made)
        await status(user, wait="applied", timeout="10s")
        clock.ahead = timedelta(seconds=30)
        live.state.services.heartbeats.healthy_since = clock()
        body = await status(user)
        assert (body["applied"], body["reason"]) == (False, "Pending")
        assert (await user.get(f"{SITES}/a")).json()["spec"]["site_state"] == "ONLINE"


async def test_a_proxy_that_is_down_has_nothing_in_force(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        applied = await apply_latest(live, made)
        await status(user, wait="applied", timeout="10s")
        await made.beat(applied_hash=applied, proxy="down")
        await live.state.services.heartbeats.flush(now())
        assert (await status(user))["reason"] == "Pending"


async def test_a_revision_that_is_yet_to_come_is_refused(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a"):
        await publish(user, "a")
        answer = await user.get(STATUS, params={"revision": 10**6})
        assert (answer.status_code, answer.json()["details"][0]["field"]) == (400, "revision")
        assert (await user.get(STATUS, params={"timeout": "soon", "wait": "applied"})).status_code == 400


async def test_status_is_for_its_tenant_only(
    live: FastAPI, user: httpx.AsyncClient, stranger: httpx.AsyncClient, anonymous: httpx.AsyncClient
) -> None:
    async with admitted(live, user, "a"):
        await publish(user, "a")
        assert (await stranger.get(STATUS)).status_code == 404
        assert (await anonymous.get(STATUS)).status_code == 401


async def test_origins_show_healthy_and_total_endpoints_by_site(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        origins = (OriginHealth(pool="shop/cart", healthy=2, total=3), OriginHealth(pool="shop/other", healthy=1, total=1))
        await made.control.report(Report(boot_id=made.boot_id, origins=origins))
        (site,) = (await status(user))["sites"]
        (origin,) = site["origins"]
        assert (origin["pool"], origin["healthy"], origin["total"]) == ("shop/cart", 2, 3)
        at_site = (await user.get("/api/data/namespaces/shop/origin_pool/cart/status_at_site", params={"site": "a"})).json()
        assert at_site["origins"][0]["healthy"] == 2
        elsewhere = await user.get("/api/data/namespaces/shop/origin_pool/cart/status_at_site", params={"site": "b"})
        assert elsewhere.status_code == 404


async def test_a_decommissioned_site_leaves_a_condition_with_who_refers_to_it(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made, admitted(live, user, "b"):
        await publish(user, "a")
        await user.post("/api/register/namespaces/system/site/a/state", json={"state": "DECOMMISSIONING"})
        await caught_up(live, tenant_of(made))
        body = await status(user)
        assert [(condition["type"], "site a" in condition["message"]) for condition in body["conditions"]] == [("SiteGone", True)]


# Heartbeats


async def test_a_heartbeat_sets_the_pace_and_asks_for_what_was_never_reported(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        first = await made.beat()
        assert (first.pace_s, first.resend) == (3.0, True)
        await made.control.report(Report(boot_id=made.boot_id, origins=()))
        assert not (await made.beat()).resend
        made.boot_id = "another"
        assert (await made.beat()).resend


async def test_an_old_heartbeat_changes_nothing(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        await publish(user, "a")
        await apply_latest(live, made)
        await status(user, wait="applied", timeout="10s")
        made.sequence = 0
        await made.beat(applied_hash="0" * 32)
        await live.state.services.heartbeats.flush(now())
        assert (await status(user))["applied"]


async def test_a_heartbeat_that_was_under_way_for_too_long_is_no_sign_of_life(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        heartbeats = live.state.services.heartbeats

        async def taken(late_s: float) -> bool:
            sequence = made.sequence + 1
            await made.beat(sent_at=now().timestamp() - late_s)
            return any(status.sequence == sequence for status in heartbeats._last.values() if status.boot_id == made.boot_id)

        assert [await taken(late_s) for late_s in (0, 5, 60, 0, 60, 60, 60)] == [True, True, False, True, False, True, True]


async def test_a_poll_waits_no_longer_than_it_asked(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        before = await made.manifest()
        poll = asyncio.create_task(made.manifest(before.hash))
        await waiting(live, made)
        live.state.services.stopping.set()
        assert (await asyncio.wait_for(poll, 5)).since == before.hash
