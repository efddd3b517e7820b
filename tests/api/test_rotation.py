"""Replacing certificate authorities: nobody is left behind, and nothing is trusted for longer than needed."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import httpx
import pytest
from cryptography import x509
from fastapi import FastAPI

from agent.protocol import items
from agent.protocol.enrolment import CA_PATH, Passport, RenewRequest
from agent.protocol.items import ItemKind
from controlplane.api import deps
from controlplane.auth import Caller
from controlplane.pki import NODE_LIFE, SERVER_LIFE
from controlplane.services import rotation
from controlplane.services.authorities import Fabric
from controlplane.store.schema import migrate
from controlplane.store.session import Database
from tests.api.enrolled import Node, admitted, caught_up, csr, node, token_for
from tests.backend import Postgres, embedded, founded, now

FABRIC = "/api/operator/authorities"
OWN = "/api/register/namespaces/system/authority"
RETIRE = "/api/register/namespaces/system/registration/{}/approve"
EDGE = {"site_type": "REGIONAL_EDGE"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server of its own: nodes of other tests would hold up every rotation of the fabric."""
    with embedded() as server:
        migrate(server.owner_url, server.app_url)
        yield server


@pytest.fixture(scope="module")
def fabric(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Fabric:
    return founded(postgres, tmp_path_factory.mktemp("state"))


def issuer(node: Node) -> str:
    assert node.credentials
    certificate = x509.load_pem_x509_certificate(node.credentials.certificate_pem.encode())
    return (certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier or b"").hex()


async def apply(app: FastAPI, node: Node) -> bool:
    """Say that all is in force; gives whether the certificate is to be renewed."""
    assert node.credentials
    await caught_up(app, node.credentials.tenant_id)
    manifest = await node.manifest()
    answer = await node.beat(applied_hash=manifest.hash, applied_revision=manifest.revision, issuer=issuer(node))
    return answer.renew


async def renew(node: Node) -> None:
    node.credentials = await node.control.renew(RenewRequest(csr_pem=csr(node.key)))


async def site_item(app: FastAPI, node: Node) -> items.Site:
    assert node.credentials
    await caught_up(app, node.credentials.tenant_id)
    (hash_,) = [entry.hash for entry in (await node.manifest()).entries if entry.kind == ItemKind.SITE]
    (item,) = await node.control.items((hash_,))
    return items.Site.read(item.body.encode())


def anchors(pem: str) -> int:
    return pem.count("BEGIN CERTIFICATE")


async def flushed(app: FastAPI) -> None:
    await app.state.services.heartbeats.flush(now())


async def done(client: httpx.AsyncClient, method: str, path: str, **body: Any) -> Json:
    answer = await client.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


async def refused(client: httpx.AsyncClient, method: str, path: str) -> Json:
    answer = await client.request(method, path, json={})
    assert answer.status_code == 409, answer.text
    found: Json = answer.json()
    return found


def states(found: Json) -> list[tuple[int, str]]:
    return [(version["version"], version["state"]) for version in found["versions"]]


async def test_a_tenant_replaces_its_authority(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as one, admitted(app, user, "b") as two:
        old = [(await site_item(app, node)).peer_anchor_pem for node in (one, two)]
        added = await done(user, "POST", f"{OWN}/versions")
        assert states(added) == [(2, "added"), (1, "active")]
        assert added["next_step"] == "switch"

        assert not await apply(app, one)
        await flushed(app)
        waiting = await refused(user, "POST", f"{OWN}/versions/2/switch")
        assert "1 of 2 are missing" in waiting["message"]
        assert [detail["field"].partition(", ")[2] for detail in waiting["details"]] == ["site b, node node-1"]
        progress = (await done(user, "GET", OWN))["progress"]
        assert (progress["sites_done"], progress["sites"], progress["missing"][0]["site"]) == (1, 2, "b")

        assert anchors((await site_item(app, two)).peer_anchor_pem) == 2
        assert not await apply(app, two)
        await flushed(app)
        assert states(await done(user, "POST", f"{OWN}/versions/2/switch")) == [(2, "active"), (1, "retiring")]

        assert [await apply(app, node) for node in (one, two)] == [True, True]
        await renew(one)
        assert not await apply(app, one)
        await flushed(app)
        held = await refused(user, "DELETE", f"{OWN}/versions/1")
        assert [detail["field"].partition(", ")[2] for detail in held["details"]] == ["site b, node node-1"]
        await renew(two)
        assert not await apply(app, two)
        await flushed(app)
        assert states(await done(user, "DELETE", f"{OWN}/versions/1")) == [(2, "active"), (1, "removed")]
        new = [(await site_item(app, node)).peer_anchor_pem for node in (one, two)]
        assert anchors(new[0]) == 1
        assert new[0] not in old


async def test_a_node_that_enrols_after_the_switch_gets_the_new_version(app: FastAPI, user: httpx.AsyncClient) -> None:
    await done(user, "POST", f"{OWN}/versions")
    await done(user, "POST", f"{OWN}/versions/2/switch")
    async with admitted(app, user, "late") as node:
        assert node.credentials
        leaf = x509.load_pem_x509_certificate(node.credentials.certificate_pem.encode())
        newest, before = x509.load_pem_x509_certificates(node.credentials.peer_anchor_pem.encode())
        leaf.verify_directly_issued_by(newest)
        assert newest.subject != before.subject


async def test_steps_out_of_order_are_refused(user: httpx.AsyncClient) -> None:
    assert (await user.post(f"{OWN}/versions/7/switch", json={})).status_code == 404
    assert "switch to another one first" in (await refused(user, "DELETE", f"{OWN}/versions/1"))["message"]
    await refused(user, "POST", f"{OWN}/versions/1/switch")
    await done(user, "POST", f"{OWN}/versions")
    assert "version 2 is added" in (await refused(user, "POST", f"{OWN}/versions"))["message"]
    assert states(await done(user, "DELETE", f"{OWN}/versions/2")) == [(2, "removed"), (1, "active")]
    await refused(user, "POST", f"{OWN}/versions/2/switch")


async def test_a_switch_can_be_taken_back(user: httpx.AsyncClient) -> None:
    await done(user, "POST", f"{OWN}/versions")
    await done(user, "POST", f"{OWN}/versions/2/switch")
    assert states(await done(user, "POST", f"{OWN}/versions/1/switch")) == [(2, "retiring"), (1, "active")]


async def test_silent_nodes_hold_a_switch_up_unless_told_otherwise(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a"):
        await done(user, "POST", f"{OWN}/versions")
        await refused(user, "POST", f"{OWN}/versions/2/switch")
        assert states(await done(user, "POST", f"{OWN}/versions/2/switch", offline="ignore"))[0] == (2, "active")
        await refused(user, "DELETE", f"{OWN}/versions/1")


async def test_after_a_whole_life_of_certificates_nobody_holds_a_removal_up(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with admitted(app, user, "a"):
        await done(user, "POST", f"{OWN}/versions")
        await done(user, "POST", f"{OWN}/versions/2/switch", offline="ignore")
        monkeypatch.setattr(deps, "clock", lambda: now() + NODE_LIFE + timedelta(minutes=1))
        assert states(await done(user, "DELETE", f"{OWN}/versions/1"))[1] == (1, "removed")


async def test_others_authorities_are_nobodys_business(user: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    await done(user, "POST", f"{OWN}/versions")
    assert states(await done(stranger, "GET", OWN)) == [(1, "active")]
    for method, path in (("GET", FABRIC), ("POST", f"{FABRIC}/root/versions"), ("DELETE", f"{FABRIC}/edges/versions/1")):
        assert (await user.request(method, path, json={})).status_code == 403


@pytest.mark.parametrize("role", ["root", "edges"])
async def test_the_operator_replaces_an_authority_of_the_fabric(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, stranger: httpx.AsyncClient, role: str, database: Database
) -> None:
    async with AsyncExitStack() as stack:
        await _retire_all(operator)
        nodes = [await stack.enter_async_context(admitted(app, client, "a")) for client in (user, stranger)]
        (active,) = [version for version, state in states(await done(operator, "GET", f"{FABRIC}/{role}")) if state == "active"]
        await done(operator, "POST", f"{FABRIC}/{role}/versions")
        await apply(app, nodes[0])
        await flushed(app)
        assert "1 of 2" in (await refused(operator, "POST", f"{FABRIC}/{role}/versions/{active + 1}/switch"))["message"]
        await apply(app, nodes[1])
        await flushed(app)
        item = await site_item(app, nodes[1])
        assert anchors(item.control_plane_anchor_pem if role == "root" else item.edge_anchor_pem) == 2
        await done(operator, "POST", f"{FABRIC}/{role}/versions/{active + 1}/switch")
        if role == "edges":
            await done(operator, "DELETE", f"{FABRIC}/{role}/versions/{active}")
        else:
            assert "control planes may use" in (await refused(operator, "DELETE", f"{FABRIC}/{role}/versions/{active}"))["message"]
            late = now() + SERVER_LIFE + timedelta(minutes=1)
            async with database.sessions(await _default(database)) as session:
                await rotation.remove(session, Caller(await _default(database), "default", True, "operator"), "root", active, late)
        item = await site_item(app, nodes[0])
        assert anchors(item.control_plane_anchor_pem if role == "root" else item.edge_anchor_pem) == 1


async def test_a_new_root_has_new_certificates_of_control_planes_under_it(
    app: FastAPI, operator: httpx.AsyncClient, anonymous: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    await _retire_all(operator)
    before = (await anonymous.get(CA_PATH)).content
    number = states(await done(operator, "POST", f"{FABRIC}/root/versions"))[0][0]
    assert anchors((await anonymous.get(CA_PATH)).text) == 2
    await done(operator, "POST", f"{FABRIC}/root/versions/{number}/switch")
    servers = await done(operator, "GET", f"{FABRIC}/servers")
    signing = next(version for version in servers["versions"] if version["state"] == "active")
    root = x509.load_pem_x509_certificates((await anonymous.get(CA_PATH)).content)[0]
    x509.load_pem_x509_certificate(signing["certificate_pem"].encode()).verify_directly_issued_by(root)
    assert before != (await anonymous.get(CA_PATH)).content
    assert await token_for(user, "berlin")


async def _retire_all(operator: httpx.AsyncClient) -> None:
    """Nodes of earlier tests."""
    for tenant in (await operator.get("/api/operator/tenants")).json()["items"]:
        headers = {"x-volterra-apigw-tenant": tenant["name"]}
        sites = (await operator.get("/api/config/namespaces/system/sites", headers=headers)).json()["items"]
        for site in sites:
            assert (await operator.delete(f"/api/config/namespaces/system/sites/{site['name']}", headers=headers)).status_code == 200


async def _default(database: Database) -> Any:
    async with database.definer() as definer:
        return (await definer.exec_driver_sql("SELECT id FROM tenant_by_name('default')")).scalar_one()


async def test_a_tenants_switch_waits_for_regional_edges_too(
    app: FastAPI, operator: httpx.AsyncClient, inside: httpx.AsyncClient, user: httpx.AsyncClient
) -> None:
    await _retire_all(operator)
    answer = await operator.post("/api/config/namespaces/system/sites", json={"metadata": {"name": "edge"}, "spec": EDGE})
    assert answer.status_code == 200, answer.text
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(admitted(app, user, "a"))
        edge = await stack.enter_async_context(node(app, await token_for(operator, "edge"), "edge"))
        assert await edge.bootstrap(passport=Passport(cluster_name="edge", cluster_type="re")) == "APPROVED"
        await edge.fetch_credentials()
        await apply(app, edge)
        await done(user, "POST", f"{OWN}/versions")
        await apply(app, one)
        await flushed(app)
        waiting = await refused(user, "POST", f"{OWN}/versions/2/switch")
        assert [detail["field"] for detail in waiting["details"]] == ["tenant default, site edge, node node-1"]
        await app.state.services.delivery.compare()
        await apply(app, edge)
        await flushed(app)
        await done(user, "POST", f"{OWN}/versions/2/switch")

        assert not await apply(app, edge)
        assert (await done(user, "GET", OWN))["progress"]["nodes"] == 1
        assert (await inside.post(RETIRE.format(edge.registration), json={"state": "RETIRED"})).status_code == 403
        await operator.post(RETIRE.format(edge.registration), json={"state": "RETIRED"})
        item = await site_item(app, one)
        assert edge.credentials
        serial = x509.load_pem_x509_certificate(edge.credentials.certificate_pem.encode()).serial_number
        assert [entry.serial_number for entry in x509.load_pem_x509_crl(item.edge_crl_pem.encode())] == [serial]
        assert item.revocations.keys() == {items.EDGES}


async def test_what_was_removed_is_forgotten_in_the_end(user: httpx.AsyncClient) -> None:
    for number in range(2, rotation.MOST_REMOVED + 4):
        await done(user, "POST", f"{OWN}/versions")
        found = await done(user, "DELETE", f"{OWN}/versions/{number}")
    assert [version for version, _ in states(found)] == [*range(rotation.MOST_REMOVED + 3, 3, -1), 1]
