"""What agents are given, and when."""

import asyncio
import base64
import gc
import gzip
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import FastAPI

from agent.control import Signer
from agent.errors import NotRecognised, Refused
from agent.protocol.base import content_hash
from agent.protocol.items import Gateway, HttpLoadBalancer, ItemKind
from agent.protocol.manifest import MANIFEST_PATH
from agent.protocol.report import HEARTBEAT_PATH, REPORT_PATH, Report
from controlplane.compile.site import compile_site
from controlplane.pki import create_key
from controlplane.resources.base import Key
from controlplane.services import delivery as delivery_module
from controlplane.store import edges as edge_store
from lab.wait import until
from tests.api.enrolled import SITES, Node, admitted, caught_up, live
from tests.api.test_objects import BALANCERS, POOLS, balancer, pool
from tests.backend import now

__all__ = ["live"]


async def publish(user: httpx.AsyncClient, site: str, name: str = "cart", domain: str = "cart.test") -> int:
    """A load balancer at the site; gives the revision."""
    await user.post(POOLS, json=pool(name, site))
    body = balancer(name, domain, where={"site": {"site": {"name": site}, "network": "SITE_NETWORK_INSIDE"}})
    body["spec"]["default_route_pools"] = [{"pool": {"name": name}}]
    answer = await user.post(BALANCERS, json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["revision"])


def tenant_of(made: Node) -> str:
    assert made.credentials
    return made.credentials.tenant_id


async def test_a_site_gets_what_concerns_it_and_can_fetch_every_item(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        await publish(user, "a")
        await caught_up(app, tenant_of(made))
        manifest = await made.manifest()
        items = await made.control.items([entry.hash for entry in manifest.entries])
        assert {item.hash for item in items} == {entry.hash for entry in manifest.entries}
        assert all(content_hash(item.body.encode()) == item.hash for item in items)
        (balancer_item,) = (item for item in items if item.kind == ItemKind.HTTP_LOADBALANCER)
        assert HttpLoadBalancer.read(balancer_item.body.encode()).domains == ("cart.test",)


async def test_items_of_other_sites_are_not_given_away(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "b") as other:
        await publish(user, "a")
        await caught_up(app, tenant_of(made))
        manifest = await made.manifest()
        hashes = [entry.hash for entry in manifest.entries]
        assert len(await made.control.items(hashes)) == len(hashes)
        assert await other.control.items(hashes) == ()
        answer = await other.manifest(manifest.hash)
        assert (answer.since, answer.removed) == (None, ())


async def test_items_of_the_manifest_before_can_still_be_fetched_by_their_own_site(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "b") as other:
        await publish(user, "a")
        await caught_up(app, tenant_of(made))
        hashes = [entry.hash for entry in (await made.manifest()).entries]
        await user.delete(f"{BALANCERS}/cart")
        await caught_up(app, tenant_of(made))
        assert not set(hashes) <= {entry.hash for entry in (await made.manifest()).entries}
        assert len(await made.control.items(hashes)) == len(hashes)
        assert await other.control.items(hashes) == ()


async def test_a_poll_is_answered_with_the_difference_as_soon_as_there_is_one(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        before = await made.manifest()
        poll = asyncio.create_task(made.manifest(before.hash))
        await waiting(live, made)
        revision = await publish(user, "a")
        answer = await asyncio.wait_for(poll, 10)
        while ItemKind.HTTP_LOADBALANCER not in {entry.kind for entry in answer.entries}:
            answer = await asyncio.wait_for(made.manifest(answer.hash), 10)
        assert answer.since is not None
        assert answer.revision >= revision
        assert ItemKind.SITE not in {entry.kind for entry in answer.entries}


async def test_what_is_gone_is_named_in_the_difference(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        await publish(user, "a")
        await caught_up(app, tenant_of(made))
        before = await made.manifest()
        await user.delete(f"{BALANCERS}/cart")
        await caught_up(app, tenant_of(made))
        answer = await made.manifest(before.hash)
        assert answer.since == before.hash
        assert (ItemKind.HTTP_LOADBALANCER, "shop/cart") in answer.removed


async def test_a_change_elsewhere_does_not_answer_a_poll(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made, admitted(live, user, "b") as other:
        await caught_up(live, tenant_of(made))
        before = await made.manifest()
        there = await other.manifest()
        poll = asyncio.create_task(made.manifest(before.hash))
        await waiting(live, made)
        await publish(user, "b")
        assert (await asyncio.wait_for(other.manifest(there.hash), 10)).hash != there.hash
        assert not poll.done()
        live.state.services.delivery.release()
        answer = await asyncio.wait_for(poll, 10)
        assert (answer.hash, answer.since, answer.entries) == (before.hash, before.hash, ())


async def test_an_unknown_hash_gets_everything(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        answer = await made.manifest("0" * 32)
        assert answer.since is None
        assert {entry.kind for entry in answer.entries} == {ItemKind.SITE}


async def test_a_newer_poll_of_a_node_ends_the_one_before(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        before = await made.manifest()
        first = asyncio.create_task(made.manifest(before.hash))
        await waiting(live, made)
        second = asyncio.create_task(made.manifest(before.hash))
        assert (await asyncio.wait_for(first, 10)).hash == before.hash
        assert not second.done()
        live.state.services.delivery.release()
        await second


async def test_revoking_a_node_ends_its_poll(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as made:
        before = await made.manifest()
        poll = asyncio.create_task(made.manifest(before.hash))
        await waiting(live, made)
        path = f"/api/register/namespaces/system/registration/{made.registration}/approve"
        await user.post(path, json={"state": "RETIRED"})
        with pytest.raises(NotRecognised, match="revoked"):
            await asyncio.wait_for(poll, 10)


async def test_gateways_reach_the_sites_that_are_joined(live: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(live, user, "a") as a, admitted(live, user, "b") as b:
        for name in ("a", "b"):
            site = (await user.get(f"{SITES}/{name}")).json()
            await user.put(f"{SITES}/{name}", json={"metadata": {"name": name, "labels": {"mesh": "yes"}}, "spec": site["spec"]})
        selector = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["mesh == yes"]}}
        virtual = {"metadata": {"name": "all"}, "spec": selector}
        assert (await user.post("/api/config/namespaces/shared/virtual_sites", json=virtual)).status_code == 200
        group = {"virtual_site": [{"kind": "virtual_site", "namespace": "shared", "name": "all"}], "full_mesh": {"data_plane_mesh": {}}}
        made = await user.post("/api/config/namespaces/system/site_mesh_groups", json={"metadata": {"name": "mesh"}, "spec": group})
        assert made.status_code == 200, made.text
        await publish(user, "a")
        await user.put(f"{POOLS}/cart", json=pool("cart", "b"))
        gateway = Gateway(node_id="made-up", host="192.0.2.7", port=15443)
        await b.control.report(Report(boot_id=b.boot_id, gateways=(gateway,)))
        await caught_up(live, tenant_of(a))
        items = await a.control.items([entry.hash for entry in (await a.manifest()).entries if entry.kind == ItemKind.PEER])
        assert len(items) == 1
        assert b.credentials
        assert f'"node_id":"{b.credentials.node_id}","host":"192.0.2.7","port":15443' in items[0].body


@pytest.mark.parametrize("host", ["", "no spaces", "a..b", "-"])
async def test_a_gateway_that_nobody_could_dial_is_refused(app: FastAPI, user: httpx.AsyncClient, host: str) -> None:
    async with admitted(app, user, "a") as made:
        gateways = (Gateway(node_id="n", host=host, port=15443),)
        with pytest.raises(Refused, match="not an IP address or DNS name"):
            await made.control.report(Report(boot_id=made.boot_id, gateways=gateways))


# Secrets


async def test_a_node_gets_the_secrets_that_its_items_name_and_no_others(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "b") as other:
        kubeconfig = {"clear_secret_info": {"url": "string:///" + base64.b64encode(b"kubeconfig").decode()}}
        place = {
            "site": {"ref": [{"kind": "site", "namespace": "system", "name": "a"}], "network_type": "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE"}
        }
        discovery = {"access_info": {"kubeconfig_url": kubeconfig, "reachable": {}}, "publish_info": {"disable": {}}}
        body = {"metadata": {"name": "k8s"}, "spec": {"where": place, "discovery_k8s": discovery}}
        answer = await user.post("/api/config/namespaces/system/discoverys", json=body)
        assert answer.status_code == 200, answer.text
        ref = answer.json()["spec"]["discovery_k8s"]["access_info"]["kubeconfig_url"]["blindfold_secret_info"]["location"]
        await caught_up(app, tenant_of(made))
        assert await made.control.secrets([ref]) == {ref: b"kubeconfig"}
        with pytest.raises(Refused, match="nothing at this site needs"):
            await other.control.secrets([ref])


# Proofs


async def test_a_proof_is_good_for_one_call(app: FastAPI, user: httpx.AsyncClient, anonymous: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        assert made.control.signer
        request = anonymous.build_request("GET", MANIFEST_PATH)
        headers = {"Authorization": made.control.signer.authorization(request, now().timestamp())}
        assert (await anonymous.get(MANIFEST_PATH, headers=headers)).status_code == 200
        again = await anonymous.get(MANIFEST_PATH, headers=headers)
        assert (again.status_code, again.json()["details"][0]["field"]) == (401, "Replayed")


async def test_a_poll_that_waits_takes_a_shorter_way_to_the_same_answers(
    app: FastAPI, user: httpx.AsyncClient, anonymous: httpx.AsyncClient
) -> None:
    async with admitted(app, user, "a") as made:
        assert made.control.signer
        known = (await made.manifest()).hash
        for query in (f"hash={known}&wait=0", f"wait=0&hash={known}"):
            request = anonymous.build_request("GET", f"{MANIFEST_PATH}?{query}")
            headers = {"Authorization": made.control.signer.authorization(request, now().timestamp())}
            answer = await anonymous.get(str(request.url), headers=headers)
            assert (answer.status_code, answer.json()["since"], answer.headers["Cache-Control"]) == (200, known, "no-store"), query
            again = await anonymous.get(str(request.url), headers=headers)
            assert (again.status_code, again.json()["details"][0]["field"]) == (401, "Replayed"), query


async def test_a_proof_with_another_key_or_of_no_node_is_refused(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        assert made.credentials
        made.control.signer = Signer(made.credentials.node_id, create_key())
        with pytest.raises(Refused, match="does not hold"):
            await made.manifest()
        made.control.signer = Signer("00000000-0000-4000-8000-000000000000", made.key)
        with pytest.raises(NotRecognised, match="there is no node"):
            await made.manifest()


async def test_a_clock_that_is_an_hour_off_is_told_and_corrected_by_the_agent(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        made.control.skew_s = 3600
        with pytest.raises(Refused, match=r"the node's clock says .*, the control plane's"):
            await made.manifest()


@pytest.mark.parametrize(("path", "most"), [(REPORT_PATH, 8 << 20), (HEARTBEAT_PATH, 256 << 10)])
async def test_bodies_of_agents_are_bounded(
    app: FastAPI, user: httpx.AsyncClient, anonymous: httpx.AsyncClient, path: str, most: int
) -> None:
    async with admitted(app, user, "a") as made:
        assert made.control.signer
        for size, refused in ((most + 1, True), (most, False)):
            bomb = gzip.compress(b" " * size)
            request = anonymous.build_request("POST", path, content=bomb, headers={"Content-Encoding": "gzip"})
            request.headers["Authorization"] = made.control.signer.authorization(request, now().timestamp())
            answer = await anonymous.send(request)
            assert (answer.status_code, "larger than" in answer.json()["message"]) == (400, refused)


async def test_nothing_is_read_from_somebody_who_is_no_node(app: FastAPI, user: httpx.AsyncClient, anonymous: httpx.AsyncClient) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(True)
        yield b"{}"

    async with admitted(app, user, "a") as made:
        assert made.control.signer
        forger = Signer(made.control.signer.node_id, create_key())
        proof = forger.authorization(anonymous.build_request("POST", REPORT_PATH), now().timestamp())
        for headers in ({}, {"Authorization": proof}):
            answer = await anonymous.post(REPORT_PATH, content=body(), headers=headers)
            assert (answer.status_code, answer.json()["details"][0]["field"]) == (401, "BadProof")
    assert not read


# What is told while something is read


class Slow:
    """Once, what was read is given only when `go` is set."""

    def __init__(self, read: Callable[..., Awaitable[Any]]) -> None:
        self.read = read
        self.has_read, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, *asked: Any) -> Any:
        found = await self.read(*asked)
        if not self.has_read.is_set():
            self.has_read.set()
            await self.go.wait()
        return found


async def test_what_is_committed_while_a_tenant_is_read_is_known_without_another_notification(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = app.state.services.delivery
    async with admitted(app, user, "a") as made:
        tenant_id = UUID(tenant_of(made))
        delivery._tenants.pop(tenant_id, None)
        slow = Slow(delivery._read)
        monkeypatch.setattr(delivery, "_read", slow)
        opening = asyncio.create_task(delivery.cache(tenant_id))
        await slow.has_read.wait()
        revision = await publish(user, "a")
        delivery.hear(tenant_id, revision)
        slow.go.set()
        cache = await opening

        async def known() -> bool:
            return bool(cache.view.revision >= revision)

        await until(known, "the change")


async def test_nodes_are_forgotten_with_the_tenant_of_which_nobody_has_called_for_long(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents, delivery = app.state.services.agents, app.state.services.delivery
    async with admitted(app, user, "a") as made:
        await made.beat()
        assert made.credentials
        assert [str(node_id) for node_id in agents._caches] == [made.credentials.node_id]
        await delivery.compare()
        gc.collect()
        assert len(agents._caches) == 1
        monkeypatch.setattr(delivery_module, "IDLE_S", -1.0)
        await delivery.compare()
        gc.collect()
        assert len(agents._caches) == 0
        await made.beat()


async def test_an_edge_that_appears_while_edges_are_read_is_known_without_another_notification(
    app: FastAPI, user: httpx.AsyncClient, operator: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = app.state.services.delivery
    async with admitted(app, user, "a") as made:
        await caught_up(app, tenant_of(made))
        slow = Slow(edge_store.list_all)
        monkeypatch.setattr(edge_store, "list_all", slow)
        operator_id, revision = delivery._edges.operator_id, delivery._edges.revision
        delivery.hear(operator_id, revision + 1)
        await slow.has_read.wait()
        name = f"edge-{uuid4().hex[:8]}"
        answer = await operator.post(SITES, json={"metadata": {"name": name}, "spec": {"site_type": "REGIONAL_EDGE"}})
        assert answer.status_code == 200, answer.text
        delivery.hear(operator_id, answer.json()["revision"])
        slow.go.set()

        async def known() -> bool:
            return Key("system", name) in delivery._edges.sites

        await until(known, "the edge")
        assert (await operator.delete(f"{SITES}/{name}")).status_code == 200


async def test_only_a_tenant_that_was_behind_for_long_is_read_anew(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = app.state.services.delivery
    async with admitted(app, user, "a") as made:
        await caught_up(app, tenant_of(made))
        cache = await delivery.cache(UUID(tenant_of(made)))
        read, real = [], delivery._read

        async def count(tenant_id: UUID) -> Any:
            read.append(tenant_id)
            return await real(tenant_id)

        monkeypatch.setattr(delivery, "_read", count)
        for compared, reads in ((True, 0), (False, 1)):
            cache.caught_up_at -= delivery_module.RELOADED_AFTER_S + 1
            if compared:
                await delivery.compare()
            revision = await publish(user, "a", f"cart-{reads}", f"cart-{reads}.test")
            await caught_up(app, tenant_of(made))
            assert (cache.view.revision, len(read)) == (revision, reads)


# Trouble


async def test_what_cannot_be_compiled_leaves_the_last_good_snapshot_in_force(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with admitted(app, user, "a") as made:
        before = await made.manifest()

        def fail(*_: Any) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(delivery_module, "compile_site", fail)
        first = await publish(user, "a")
        await publish(user, "a", "till", "till.test")
        await caught_up(app, tenant_of(made))
        during = await made.manifest()
        assert during.hash == before.hash
        assert during.revision < first, "it holds none of what came at once"
        await made.apply()
        await app.state.services.heartbeats.flush(now())
        for name in ("cart", "till"):
            (site,) = (await user.get(f"{BALANCERS}/{name}/status")).json()["sites"]
            assert (site["state"], "cannot be compiled" in site["reason"]) == ("Pending", True), name


async def test_a_poll_that_ends_while_a_change_is_compiled_does_not_say_that_the_old_manifest_holds_it(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery, go = app.state.services.delivery, threading.Event()

    def slowly(*given: Any) -> Any:
        go.wait(20)
        return compile_site(*given)

    async with admitted(app, user, "a") as made:
        before = await made.manifest()
        poll = asyncio.create_task(made.manifest(before.hash))
        await waiting(app, made)
        monkeypatch.setattr(delivery_module, "compile_site", slowly)
        try:
            revision = await publish(user, "a")
            await caught_up(app, tenant_of(made))
            delivery.release()
            answer = await asyncio.wait_for(poll, 10)
        finally:
            go.set()
        assert (answer.hash, answer.revision < revision) == (before.hash, True)
        assert (await made.manifest()).revision >= revision


async def waiting(app: FastAPI, made: Node) -> None:
    """Until the node's poll waits."""
    assert made.credentials
    nodes = (await app.state.services.delivery.cache(UUID(tenant_of(made)))).waiting
    async with asyncio.timeout(10):
        while UUID(made.credentials.node_id) not in nodes.get(made.credentials.site_id, {}):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
