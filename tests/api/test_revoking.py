"""Who was let out is out at once: at the agent API, and in what every site of the tenant is told."""

import httpx
import pytest
from cryptography import x509
from fastapi import FastAPI

from agent.errors import Busy, NotRecognised
from agent.protocol.enrolment import RenewRequest
from agent.protocol.items import shard
from controlplane.services import enrolment
from tests.api.enrolled import REGISTRATIONS, Node, admitted, caught_up, csr, token_for
from tests.api.test_rotation import OWN, done, site_item

APPROVE = "/api/register/namespaces/system/registration/{}/approve"


def serial(pem: str) -> int:
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def revoked(crl_pem: str) -> list[set[int]]:
    """By list."""
    end = "-----END X509 CRL-----\n"
    lists = [x509.load_pem_x509_crl((part + end).encode()) for part in crl_pem.split(end) if part.strip()]
    return [{entry.serial_number for entry in each} for each in lists]


async def retire(user: httpx.AsyncClient, node: Node) -> None:
    assert (await user.post(APPROVE.format(node.registration), json={"state": "RETIRED"})).status_code == 200


async def test_one_node_of_a_site_is_retired(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a", "n1") as gone, admitted(app, user, "a", "n2") as stays, admitted(app, user, "b") as peer:
        assert gone.credentials
        assert (await site_item(app, peer)).peer_crl_pem == ""
        renewed = await gone.control.renew(RenewRequest(csr_pem=csr(gone.key)))
        await retire(user, gone)
        with pytest.raises(NotRecognised, match="revoked"):
            await gone.manifest()
        item = await site_item(app, peer)
        assert revoked(item.peer_crl_pem) == [{serial(gone.credentials.certificate_pem), serial(renewed.certificate_pem)}]
        assert item.revocations.keys() == {shard(gone.credentials.site_id)}
        authority = x509.load_pem_x509_certificate(item.peer_anchor_pem.encode())
        assert x509.load_pem_x509_crl(item.peer_crl_pem.encode()).is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # an EC key
        assert (await stays.manifest()).entries


async def test_it_stays_revoked_while_the_authority_is_replaced(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a", "n1") as gone, admitted(app, user, "b") as peer:
        await retire(user, gone)
        await done(user, "POST", f"{OWN}/versions")
        assert len(revoked((await site_item(app, peer)).peer_crl_pem)) == 2
        async with admitted(app, user, "c") as other:
            await retire(user, other)
        new, old = revoked((await site_item(app, peer)).peer_crl_pem)
        assert len(new & old) == 2


async def test_retiring_twice_revokes_once(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as gone, admitted(app, user, "b") as peer:
        await retire(user, gone)
        once = (await site_item(app, peer)).revocations
        await retire(user, gone)
        assert (await user.delete(f"{REGISTRATIONS}/{gone.registration}")).status_code == 200
        assert len(once) == 1
        assert (await site_item(app, peer)).revocations == once


async def test_a_second_revocation_is_later_than_the_first(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a", "n1") as one, admitted(app, user, "a", "n2") as two, admitted(app, user, "b") as peer:
        assert one.credentials
        await retire(user, one)
        first = (await site_item(app, peer)).revocations
        await retire(user, two)
        second = (await site_item(app, peer)).revocations
        assert first.keys() == second.keys()
        assert first[shard(one.credentials.site_id)] < second[shard(one.credentials.site_id)]


async def test_decommissioning_a_site_has_gateways_let_go(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as gone, admitted(app, user, "b") as peer:
        assert gone.credentials
        assert (await user.delete("/api/config/namespaces/system/sites/a")).status_code == 200
        item = await site_item(app, peer)
        assert item.revocations.keys() == {shard(gone.credentials.site_id)}
        assert item.peer_crl_pem == ""


async def test_a_node_has_so_many_certificates_and_no_more(app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "MOST_LEAVES", 2)
    async with admitted(app, user, "a") as made:
        await made.control.renew(RenewRequest(csr_pem=csr(made.key)))
        with pytest.raises(Busy, match="2 certificates that have not expired"):
            await made.control.renew(RenewRequest(csr_pem=csr(made.key)))


async def test_a_site_that_is_created_again_inherits_nothing(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as gone, admitted(app, user, "b") as peer:
        await user.delete("/api/config/namespaces/system/sites/a")
        async with admitted(app, user, "a") as again:
            assert gone.credentials
            assert again.credentials
            await caught_up(app, again.credentials.tenant_id)
            assert again.credentials.site_id != gone.credentials.site_id
            with pytest.raises(NotRecognised, match="revoked"):
                await gone.manifest()
            assert gone.credentials.site_id not in str(await again.manifest()) + str(await peer.manifest())
            site = (await user.get("/api/config/namespaces/system/sites/a")).json()
            assert site["metadata"]["labels"] == {}
            states = (await user.get("/api/register/namespaces/system/registrations_by_site/a")).json()["items"]
            assert [item["object"]["status"]["current_state"] for item in states] == ["RETIRED", "ADMITTED"]
            assert await token_for(user, "a")
