"""What users and agents should not send: each is refused, or told of in a condition that names the thing, and nothing is lost."""

import asyncio
import base64
import json
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from agent.errors import Refused
from agent.protocol.enrolment import ConfigRequest, RenewRequest
from agent.protocol.report import Heartbeat
from lab.fabric import LABEL, Fabric
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.wait import until
from tests.e2e.calls import traffic
from tests.e2e.newcomers import by_hand, certified, csr, newcomer, said, token_for

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

Json = dict[str, Any]

ECHO = (sys.executable, "-m", "lab.echo")
GOLD = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["tier in (gold)"]}}
EAST = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["side in (east)"]}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Service `echo` in b, called from a and from b. Virtual sites `gold` and `east` have no members."""
    async with Fabric(("a", "b")) as fabric:
        show_logs_of.append(fabric)
        api = fabric.api
        await fabric.site("b").cluster.deploy("echo", ECHO)
        await api.create("virtual_site", "gold", GOLD, namespace="shared")
        await api.create("virtual_site", "east", EAST, namespace="shared")
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a", "b"]))
        await api.applied("http_loadbalancer", "echo")
        yield fabric


async def label(fabric: Fabric, site: str, **labels: str) -> None:
    """Give a site these labels and no others."""
    held = await fabric.api.get("site", site)
    body = {"metadata": {**held["metadata"], "labels": {LABEL: "lab", **labels}}, "spec": held["spec"]}
    await fabric.api.request("PUT", f"/api/config/namespaces/system/sites/{site}", body)


def advertised_at(virtual_site: str) -> Json:
    place = {"network": "SITE_NETWORK_INSIDE", "virtual_site": {"namespace": "shared", "name": virtual_site}}
    return {"advertise_where": [{"virtual_site": place, "use_default_port": {}}]}


async def conflicts(fabric: Fabric, kind: str, name: str) -> list[str]:
    status = await fabric.api.status(kind, name)
    return [condition["message"] for condition in status["conditions"] if condition["type"] == "Conflicted"]


async def registered(fabric: Fabric, site: str) -> list[str]:
    """Names of the registrations for a site."""
    answer = await fabric.api.request("GET", f"/api/register/namespaces/system/registrations_by_site/{site}")
    return [item["name"] for item in answer["items"]]


async def decommission(fabric: Fabric, site: str) -> None:
    await fabric.api.request("POST", f"/api/register/namespaces/system/site/{site}/state", {"state": "DECOMMISSIONING"})


# Objects


async def test_a_label_change_that_brings_conflicts_is_accepted_and_the_winner_serves_on(fabric: Fabric) -> None:
    api = fabric.api
    for kind, name, spec in (
        ("http_loadbalancer", "other-domain", http_loadbalancer("other.test", ["echo"], [], advertise_custom=advertised_at("gold"))),
        ("http_loadbalancer", "same-domain", http_loadbalancer("echo.test", ["echo"], [], advertise_custom=advertised_at("gold"))),
        ("tcp_loadbalancer", "same-port", tcp_loadbalancer(["echo"], [], 8080, advertise_custom=advertised_at("gold"))),
    ):
        await api.create(kind, name, spec)
    async with traffic(fabric, "b") as served:
        await label(fabric, "b", tier="gold")
        for kind, name in (("http_loadbalancer", "same-domain"), ("tcp_loadbalancer", "same-port")):
            (message,) = await until(partial(conflicts, fabric, kind, name), f"the conflict of {name}")
            assert all(word in message for word in ("site b", "http_loadbalancer lab/echo", "8080"))
        await api.applied("http_loadbalancer", "other-domain")
        assert await conflicts(fabric, "http_loadbalancer", "other-domain") == []
        assert await conflicts(fabric, "http_loadbalancer", "echo") == []
        await served.more(50)
        await label(fabric, "b")
    for kind, name in (("http_loadbalancer", "same-domain"), ("tcp_loadbalancer", "same-port")):
        assert await conflicts(fabric, kind, name) == []
    await asyncio.gather(*(api.delete("http_loadbalancer", name) for name in ("other-domain", "same-domain")))
    await api.delete("tcp_loadbalancer", "same-port")


async def test_a_registration_that_brings_conflicts_is_accepted(fabric: Fabric) -> None:
    """A site's labels make it a member of two virtual sites, on which the same place was given away."""
    api = fabric.api
    await api.create("http_loadbalancer", "for-gold", http_loadbalancer("both.test", ["echo"], [], advertise_custom=advertised_at("gold")))
    await api.create("http_loadbalancer", "for-east", http_loadbalancer("both.test", ["echo"], [], advertise_custom=advertised_at("east")))
    token = await token_for(fabric, "newtown", type="JWT", site_name="newtown")
    async with by_hand(fabric, token, "newtown", labels={"tier": "gold", "side": "east"}):
        (message,) = await until(lambda: conflicts(fabric, "http_loadbalancer", "for-east"), "the conflict")
        assert "site newtown" in message
        assert "lab/for-gold" in message
        assert await conflicts(fabric, "http_loadbalancer", "for-gold") == []
    await decommission(fabric, "newtown")
    await asyncio.gather(*(api.delete("http_loadbalancer", name) for name in ("for-gold", "for-east")))


async def test_of_many_objects_at_once_the_one_that_envoy_refuses_is_named_and_the_others_are_in_force(fabric: Fabric) -> None:
    """Something else at the site has taken a port, which only the site's Envoy can find out."""
    api, b = fabric.api, fabric.site("b")
    names = [f"many-{number:02}" for number in range(20)]
    async with traffic(fabric, "b"):
        with b.place.listen(b.place.inside, 8207):
            b.agent.freeze()
            try:
                for number, name in enumerate(names):
                    await api.create("http_loadbalancer", name, http_loadbalancer(f"{name}.test", ["echo"], ["b"], port=8200 + number))
            finally:
                b.agent.thaw()

            async def is_rejected() -> Json | None:
                status = await api.status("http_loadbalancer", "many-07")
                return status["sites"][0] if status["sites"][0]["state"] == "Rejected" else None

            rejected = await until(is_rejected, "the refused object's status", within_s=30)
            assert rejected
            assert "8207" in rejected["reason"]
            assert "b-1" in rejected["reason"]
            for name in names:
                if name != "many-07":
                    await api.applied("http_loadbalancer", name)
            client = await b.http(8219, "many-19.test")
            assert (await client.get("/")).status_code == 200
    await asyncio.gather(*(api.delete("http_loadbalancer", name) for name in names))


async def test_the_largest_expressions_that_are_accepted_are_in_force(fabric: Fabric) -> None:
    """Envoy's own bound would be a fiftieth of it."""
    expressions = ("/(?:a|b|c){500}", "/(?i:k){0,1000}", r"/\w{300}", "/(?:a?b*c+){500}", r"/\xE9\x{FF}")
    matches = [{"path": {"regex": expression}} for expression in expressions]
    answer = {"route_direct_response": {"response_code": 200, "response_body_encoded": "string:///bWF0Y2hlZA=="}}
    routes = [{"direct_response_route": {**match, **answer}} for match in matches]
    await fabric.api.create("http_loadbalancer", "regular", http_loadbalancer("regular.test", ["echo"], ["b"], routes=routes))
    await fabric.api.applied("http_loadbalancer", "regular")
    client = await fabric.site("b").http(8080, "regular.test")
    assert (await client.get(f"/{'abc' * 166}ab")).text == "matched"
    await fabric.api.delete("http_loadbalancer", "regular")


# Tokens and registrations


def tampered(token: str) -> str:
    """The same token, as if it were for another site."""
    header, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    changed = base64.urlsafe_b64encode(json.dumps(claims | {"site_name": "b"}).encode()).rstrip(b"=").decode()
    return f"{header}.{changed}.{signature}"


async def test_an_agent_with_a_token_that_is_no_good_says_why_and_ends(fabric: Fabric) -> None:
    used = (fabric.site("b").agent.directory / "token").read_text()
    good = await token_for(fabric, "for-one-site", type="JWT", site_name="one")
    expiring = await token_for(fabric, "expiring", type="JWT", site_name="late", expiration_seconds=1)

    async def has_expired() -> bool:
        return bool((await fabric.api.get("token", "expiring"))["spec"]["state"] == "EXPIRED")

    await until(has_expired, "the token to expire")
    cases = {
        newcomer(fabric, "no token", name="n1", site="b"): "the registration token cannot be read",
        newcomer(fabric, used, name="n2", site="b"): "the registration token b was used 1 of 1 times",
        newcomer(fabric, good, name="n3", site="b"): "the registration token is for site one, not for b",
        newcomer(fabric, tampered(good), name="n4", site="b"): "this is not a registration token of this control plane",
        newcomer(fabric, expiring, name="n5", site="late"): "the registration token expiring expired at",
    }
    for agent, says in cases.items():
        assert says in await agent.refusal()
    assert (await fabric.api.get("token", "for-one-site"))["spec"]["uses"] == 0
    assert await registered(fabric, "late") == []


async def test_a_second_agent_with_a_nodes_name_is_told_so_and_the_first_serves_on(fabric: Fabric) -> None:
    token = await token_for(fabric, "second", type="JWT", site_name="b")
    async with traffic(fabric, "a"):
        said = await newcomer(fabric, token, name="b-1", site="b").refusal()
    assert "site b has a node b-1 already (registration r-" in said
    assert "start this one under another name" in said
    assert (await fabric.api.get("token", "second"))["spec"]["uses"] == 0


async def test_two_agents_with_copies_of_one_state_directory_are_noticed(fabric: Fabric) -> None:
    token = await token_for(fabric, "copied", type="JWT", site_name="copied")

    async def warnings() -> list[str]:
        (site,) = (await fabric.api.status("site", "copied"))["sites"]
        found: list[str] = site["nodes"][0].get("warnings", [])
        return found

    async with by_hand(fabric, token, "copied") as node:
        for number, boot in enumerate(("old", "new"), start=1):
            await node.control.heartbeat(Heartbeat(boot_id=boot, sequence=number, sent_at=time.time(), version=boot))
        assert await warnings() == [], "a restart is nothing unusual"
        for number, boot in enumerate(("old", "new"), start=3):
            await node.control.heartbeat(Heartbeat(boot_id=boot, sequence=number, sent_at=time.time()))
        (warning,) = await until(warnings, "the warning")
        assert "two agents run with this node's identity" in warning
    await decommission(fabric, "copied")


async def test_an_agent_that_lost_the_answer_to_its_registration_goes_on_where_it_was(fabric: Fabric) -> None:
    """Killed while it waits for approval, it asks again with the same key: the same registration, and no other use of the token."""
    api = fabric.api
    token = await token_for(fabric, "once", max_uses=1)
    agent = newcomer(fabric, token, name="n1", site="village")
    await agent.start()
    (first,) = await until(lambda: registered(fabric, "village"), "the registration")
    await agent.process.kill()
    await agent.start()
    await until(partial(said, agent, "registered"), "the agent to register again")
    assert await registered(fabric, "village") == [first]
    assert (await api.get("token", "once"))["spec"]["uses"] == 1
    passport = {"cluster_name": "village", "cluster_type": "ce", "cluster_size": 1, "latitude": 0, "longitude": 0}
    await api.request("POST", f"/api/register/namespaces/system/registration/{first}/approve", {"state": "APPROVED", "passport": passport})
    await until(partial(said, agent, "admitted"), "the agent to be admitted", within_s=30)
    await agent.process.stop()


async def test_a_request_for_a_certificate_of_somebody_else_is_refused(fabric: Fabric) -> None:
    token = await token_for(fabric, "honest", type="JWT", site_name="hamlet")
    neighbour = json.loads((fabric.site("b").agent.directory / "state" / "credentials").read_text())["certificate_pem"]
    async with by_hand(fabric, token, "hamlet") as node:
        for csr_pem, reason in (
            (csr(node.key, organisation="a"), "the request is for site 'a', not 'hamlet'"),
            (csr(node.key, name=certified(neighbour)), "which is not this node's"),
        ):
            with pytest.raises(Refused, match=reason):
                await node.control.request_config(ConfigRequest(name=node.registration, token=token, csr_pem=csr_pem))
            with pytest.raises(Refused, match=reason):
                await node.control.renew(RenewRequest(csr_pem=csr_pem))
        renewed = await node.control.renew(RenewRequest(csr_pem=csr(node.key, name=certified(node.credentials.certificate_pem))))
    assert certified(renewed.certificate_pem) == certified(node.credentials.certificate_pem)
    await decommission(fabric, "hamlet")


async def test_a_token_of_another_tenant_opens_nothing_here(fabric: Fabric) -> None:
    api = fabric.api
    token = await token_for(fabric, "mine", type="JWT", site_name="farm")
    stranger = (await api.request("POST", "/api/operator/tenants", {"name": "strangers"}))["token"]
    body = {"metadata": {"name": "theirs", "namespace": "system"}, "spec": {"type": "JWT", "site_name": "farm"}}
    answer = await api.client.post("/api/register/namespaces/system/tokens", json=body, headers={"authorization": f"APIToken {stranger}"})
    theirs = answer.json()["spec"]["content"]
    async with by_hand(fabric, token, "farm") as node:
        with pytest.raises(Refused, match=f"there is no registration {node.registration} of this token"):
            await node.control.request_config(ConfigRequest(name=node.registration, token=theirs, csr_pem=csr(node.key)))
        async with by_hand(fabric, theirs, "farm") as foreign:
            assert foreign.credentials.tenant_id != node.credentials.tenant_id
            assert foreign.credentials.site_id != node.credentials.site_id
            assert foreign.credentials.peer_anchor_pem != node.credentials.peer_anchor_pem
            own = {entry.hash for entry in (await node.control.manifest(None, wait=False)).entries}
            assert own.isdisjoint(entry.hash for entry in (await foreign.control.manifest(None, wait=False)).entries)
            assert await foreign.control.items(tuple(own)) == ()
    await decommission(fabric, "farm")
