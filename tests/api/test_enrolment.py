"""From a token to a certificate, and what is refused on the way."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography import x509
from fastapi import FastAPI
from pydantic import ValidationError

from agent.errors import NotAdmitted, NotRecognised, Refused
from agent.protocol.enrolment import CA_PATH, RenewRequest
from agent.protocol.items import ItemKind
from controlplane.api import deps
from controlplane.app import open_services
from controlplane.pki import BACKDATED, create_key
from controlplane.services.authorities import Fabric
from controlplane.settings import Settings
from controlplane.store.session import Database
from tests.api.enrolled import REGISTRATIONS, SITES, TOKENS, admitted, caught_up, create_token, csr, node, token_for
from tests.backend import now

APPROVE = "/api/register/namespaces/system/registration/{}/approve"
STATE = "/api/register/namespaces/system/site/{}/state"


def approval(site: str, **more: Any) -> dict[str, Any]:
    passport = {"cluster_name": site, "cluster_type": "ce", "cluster_size": 1, "latitude": 1.5, "longitude": 2.5, "default_os_version": {}}
    return {"state": "APPROVED", "passport": passport, **more}


# Tokens


async def test_a_token_is_shown_once_and_says_where_to_go(user: httpx.AsyncClient) -> None:
    created = await create_token(user, type="JWT", site_name="berlin")
    claims = jwt.decode(created["spec"]["content"], options={"verify_signature": False})
    assert claims["site_name"] == "berlin"
    assert claims["exp"] - claims["iat"] == 900
    read = (await user.get(f"{TOKENS}/{created['metadata']['name']}")).json()
    listed = (await user.get(TOKENS)).json()
    assert created["spec"]["content"] not in str(read) + str(listed)
    assert read["spec"] == {key: value for key, value in created["spec"].items() if key != "content"}
    assert read["spec"]["max_uses"] == 1


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"type": "JWT"}, "spec.site_name"),
        ({"type": "NORMAL", "site_name": "berlin"}, "spec.site_name"),
        ({"auto_approve": True}, "spec.auto_approve"),
        ({"expiration_seconds": 10**9}, "spec.expiration_seconds"),
        ({"type": "JTW", "site_name": "berlin"}, "spec.type"),
        ({"max_use": 1}, "spec.max_use"),
        ({"type": "JWT", "site_name": "Berlin"}, "spec.site_name"),
    ],
)
async def test_a_token_that_makes_no_sense_is_refused(user: httpx.AsyncClient, spec: dict[str, Any], field: str) -> None:
    answer = await user.post(TOKENS, json={"metadata": {"name": "t"}, "spec": spec})
    assert answer.status_code == 400
    assert answer.json()["details"][0]["field"] == field


async def test_a_token_name_is_taken_once(user: httpx.AsyncClient) -> None:
    body = {"metadata": {"name": "twice"}, "spec": {}}
    assert (await user.post(TOKENS, json=body)).status_code == 200
    assert (await user.post(TOKENS, json=body)).status_code == 409


async def test_a_token_cannot_be_changed_but_described(user: httpx.AsyncClient) -> None:
    body = {"metadata": {"name": "fixed"}, "spec": {"max_uses": 3}}
    await user.post(TOKENS, json=body)
    described = {"metadata": {"name": "fixed", "description": "for the fair"}, "spec": {"max_uses": 3}}
    assert (await user.put(f"{TOKENS}/fixed", json=described)).json()["metadata"]["description"] == "for the fair"
    assert (await user.put(f"{TOKENS}/fixed", json={**body, "spec": {"max_uses": 4}})).status_code == 400


async def test_tokens_are_for_their_tenant_only(user: httpx.AsyncClient, stranger: httpx.AsyncClient, anonymous: httpx.AsyncClient) -> None:
    name = (await create_token(user))["metadata"]["name"]
    assert (await stranger.get(f"{TOKENS}/{name}")).status_code == 404
    assert (await stranger.get(TOKENS)).json()["items"] == []
    assert (await stranger.delete(f"{TOKENS}/{name}")).status_code == 404
    assert (await anonymous.get(TOKENS)).status_code == 401


# Enrolment


async def test_a_site_bound_token_admits_at_once_and_brings_the_site(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "berlin") as made:
        credentials = made.credentials
        assert credentials
        site = (await user.get(f"{SITES}/berlin")).json()
        assert site["system_metadata"]["uid"] == credentials.site_id
        assert site["spec"]["site_state"] == "PROVISIONING"
        certificate = x509.load_pem_x509_certificate(credentials.certificate_pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier)[0].endswith(
            f"/tenant/{credentials.tenant_id}/site/{credentials.site_id}/node/{credentials.node_id}"
        )
        assert await made.keys_of(ItemKind.SITE) == {credentials.site_id}


async def test_any_other_token_waits_for_a_persons_approval(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = (await create_token(user))["spec"]["content"]
    async with node(app, token, "madrid") as made:
        assert await made.bootstrap(labels={"zone": "south"}) == "PENDING"
        with pytest.raises(NotAdmitted, match="waits for approval"):
            await made.fetch_credentials()
        assert (await user.get(f"{SITES}/madrid")).status_code == 404
        pending = (await user.post("/api/register/namespaces/system/listregistrationsbystate", json={"state": "PENDING"})).json()["items"]
        assert [item["name"] for item in pending] == [made.registration]
        body = approval("madrid", labels={"vsite": "all"}) | {"tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC"}
        approved = (await user.post(APPROVE.format(made.registration), json=body)).json()
        assert approved["obj"]["spec"]["tunnel_type"] == "SITE_TO_SITE_TUNNEL_IPSEC"
        assert approved["obj"]["object"]["status"]["current_state"] == "APPROVED"
        credentials = await made.fetch_credentials()
        site = (await user.get(f"{SITES}/madrid")).json()
        assert site["metadata"]["labels"] == {"zone": "south", "vsite": "all"}
        assert site["spec"]["tunnel_type"] == "SITE_TO_SITE_TUNNEL_IPSEC"
        assert site["system_metadata"]["uid"] == credentials.site_id
        by_site = (await user.get("/api/register/namespaces/system/registrations_by_site/madrid")).json()["items"]
        assert [item["object"]["status"]["current_state"] for item in by_site] == ["ADMITTED"]


async def test_an_approval_has_to_confirm_the_sites_name(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with node(app, (await create_token(user))["spec"]["content"], "madrid") as made:
        await made.bootstrap()
        other = await user.post(APPROVE.format(made.registration), json=approval("lisbon"))
        assert (other.status_code, other.json()["details"][0]["field"]) == (400, "passport.cluster_name")
        without = await user.post(APPROVE.format(made.registration), json={"state": "APPROVED"})
        assert (without.status_code, without.json()["details"][0]["field"]) == (400, "passport")


async def test_an_approval_places_a_site_that_has_no_place_and_moves_none(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = (await create_token(user, max_uses=2))["spec"]["content"]
    assert (await user.post(SITES, json={"metadata": {"name": "madrid"}})).status_code == 200
    async with node(app, token, "madrid", "node-1") as first, node(app, token, "madrid", "node-2") as second:
        await first.bootstrap()
        await second.bootstrap()
        assert (await user.post(APPROVE.format(first.registration), json=approval("madrid"))).status_code == 200
        assert (await user.get(f"{SITES}/madrid")).json()["spec"]["coordinates"] == {"latitude": 1.5, "longitude": 2.5}
        elsewhere = approval("madrid")
        elsewhere["passport"]["longitude"] = 3
        refused = await user.post(APPROVE.format(second.registration), json=elsewhere)
        assert (refused.status_code, [detail["field"] for detail in refused.json()["details"]]) == (400, ["passport.longitude"])
        assert (await user.post(APPROVE.format(second.registration), json=approval("madrid"))).status_code == 200


async def test_a_lost_answer_costs_no_use_of_the_token(app: FastAPI, user: httpx.AsyncClient) -> None:
    created = await create_token(user, type="JWT", site_name="berlin")
    async with node(app, created["spec"]["content"], "berlin") as made:
        await made.bootstrap()
        first = made.registration, await made.fetch_credentials()
        await made.bootstrap()
        assert (made.registration, await made.fetch_credentials()) == first
    assert (await user.get(f"{TOKENS}/{created['metadata']['name']}")).json()["spec"]["uses"] == 1


async def test_a_used_up_token_admits_nobody(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await token_for(user, "berlin")
    async with node(app, token, "berlin", "node-1") as first, node(app, token, "berlin", "node-2") as second:
        await first.bootstrap()
        with pytest.raises(Refused, match="was used 1 of 1 times"):
            await second.bootstrap()


async def test_a_revoked_and_a_deleted_token_admit_nobody(app: FastAPI, user: httpx.AsyncClient) -> None:
    created = await create_token(user, max_uses=0)
    path = f"{TOKENS}/{created['metadata']['name']}"
    async with node(app, created["spec"]["content"], "berlin") as made:
        assert (await user.post(f"{path}/state", json={"state": "EXPIRED"})).json()["obj"]["spec"]["state"] == "EXPIRED"
        with pytest.raises(Refused, match="revoked"):
            await made.bootstrap()
        await user.delete(path)
        with pytest.raises(Refused, match="revoked"):
            await made.bootstrap()


async def test_a_disabled_token_admits_nobody_until_it_is_enabled(app: FastAPI, user: httpx.AsyncClient) -> None:
    created = await create_token(user, type="JWT", site_name="berlin")
    name = created["metadata"]["name"]
    async with node(app, created["spec"]["content"], "berlin") as made:
        disabled = await user.put(f"{TOKENS}/{name}", json={"metadata": {"name": name, "disable": True}})
        assert disabled.json()["spec"]["state"] == "EXPIRED"
        with pytest.raises(Refused, match="is disabled"):
            await made.bootstrap()
        assert (await user.put(f"{TOKENS}/{name}", json={"metadata": {"name": name}})).json()["spec"]["state"] == "VALID"
        assert await made.bootstrap() == "APPROVED"


@pytest.mark.parametrize(("word", "value"), [("name", "other"), ("namespace", "elsewhere")])
async def test_a_body_that_names_something_else_than_its_path_does_nothing(
    app: FastAPI, user: httpx.AsyncClient, word: str, value: str
) -> None:
    async with admitted(app, user, "berlin") as made:
        (token,) = (await user.get(TOKENS)).json()["items"]
        registration = f"{REGISTRATIONS}/{made.registration}"
        for method, path, body in (
            ("POST", STATE.format("berlin"), {"state": "DECOMMISSIONING"}),
            ("POST", APPROVE.format(made.registration), {"state": "RETIRED"}),
            ("DELETE", registration, {}),
            ("POST", f"{TOKENS}/{token['name']}/state", {"state": "EXPIRED"}),
            ("DELETE", f"{TOKENS}/{token['name']}", {}),
            ("DELETE", f"{SITES}/berlin", {}),
        ):
            answer = await user.request(method, path, json=body | {word: value})
            assert (answer.status_code, answer.json()["details"][0]["field"]) == (400, word), path
        assert (await user.get(registration)).json()["object"]["status"]["current_state"] == "ADMITTED"
        assert (await user.get(f"{TOKENS}/{token['name']}")).json()["spec"]["uses"] == 1
        assert await made.keys_of(ItemKind.SITE)


async def test_an_expired_token_is_refused_with_both_times(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await token_for(user, "berlin", expiration_seconds=1)
    app.dependency_overrides[deps._now] = lambda: now() + timedelta(hours=1)
    async with node(app, token, "berlin") as made:
        with pytest.raises(Refused, match=r"expired at .*; the control plane's clock says"):
            await made.bootstrap()


async def test_a_token_for_one_site_does_not_open_another(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with node(app, await token_for(user, "berlin"), "madrid") as made:
        with pytest.raises(Refused, match="for site berlin, not for madrid"):
            await made.bootstrap()


async def test_a_token_of_another_control_plane_is_refused(app: FastAPI, user: httpx.AsyncClient) -> None:
    claims = jwt.decode(await token_for(user, "berlin"), options={"verify_signature": False})
    async with node(app, jwt.encode(claims, create_key(), algorithm="ES256"), "berlin") as made:
        with pytest.raises(Refused, match="not a registration token of this control plane"):
            await made.bootstrap()


async def test_a_second_agent_with_a_nodes_name_is_refused_until_the_first_is_retired(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "berlin") as first, node(app, await token_for(user, "berlin", max_uses=2), "berlin") as second:
        with pytest.raises(Refused, match=rf"has a node node-1 already \(registration {first.registration}"):
            await second.bootstrap()
        await user.post(APPROVE.format(first.registration), json={"state": "RETIRED"})
        assert await second.bootstrap() == "APPROVED"
        with pytest.raises(NotRecognised, match="revoked"):
            await first.manifest()


async def test_the_roots_are_what_the_token_pins(app: FastAPI, user: httpx.AsyncClient, anonymous: httpx.AsyncClient) -> None:
    claims = jwt.decode(await token_for(user, "berlin"), options={"verify_signature": False})
    assert hashlib.sha256((await anonymous.get(CA_PATH)).content).hexdigest() == claims["ca_pin"]


# Afterwards


async def test_a_node_renews_its_certificate_with_another_key_and_may_lose_the_answer(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "berlin") as made:
        assert made.control.signer
        old, new = made.key, create_key()
        renewed = await made.control.renew(RenewRequest(csr_pem=csr(new)))
        certificate = x509.load_pem_x509_certificate(renewed.certificate_pem.encode())
        assert certificate.public_key() == new.public_key()
        for key in (old, new):
            made.control.signer = type(made.control.signer)(renewed.node_id, key)
            assert (await made.manifest()).entries
        latest = create_key()
        await made.control.renew(RenewRequest(csr_pem=csr(latest)))
        await caught_up(app, renewed.tenant_id)
        made.control.signer = type(made.control.signer)(renewed.node_id, old)
        with pytest.raises(Refused, match="the proof does not hold"):
            await made.manifest()


async def test_how_long_certificates_are_valid_is_the_operators_choice(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, database: Database, fabric: Fabric, tmp_path: Path
) -> None:
    settings = Settings(state_dir=tmp_path, node_certificate_life_s=3600)
    with ThreadPoolExecutor(1) as compiler:
        app.state.services = open_services(settings, database, fabric, compiler, deps.clock)
        async with admitted(app, user, "berlin") as made:
            assert made.credentials
            first = made.credentials.certificate_pem
            leaf = x509.load_pem_x509_certificate(first.encode())
            assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(hours=1) + BACKDATED
            monkeypatch.setattr(deps, "clock", lambda: now() + timedelta(minutes=25))
            assert (await made.fetch_credentials()).certificate_pem == first
            monkeypatch.setattr(deps, "clock", lambda: now() + timedelta(minutes=35))
            assert (await made.fetch_credentials()).certificate_pem != first


@pytest.mark.parametrize("seconds", [0, 29, 365 * 86400 + 1])
def test_a_life_that_no_certificate_should_have_is_refused(seconds: int) -> None:
    with pytest.raises(ValidationError, match="node_certificate_life_s"):
        Settings(node_certificate_life_s=seconds)


async def test_decommissioning_revokes_at_once_and_a_new_site_of_the_name_inherits_nothing(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await token_for(user, "berlin", max_uses=2)
    async with admitted(app, user, "berlin") as made:
        old = made.credentials
        assert old
        assert (await user.post(STATE.format("berlin"), json={"state": 7})).status_code == 200
        assert (await user.get(f"{SITES}/berlin")).status_code == 404
        with pytest.raises(NotRecognised, match="revoked"):
            await made.manifest()
        states = (await user.get(REGISTRATIONS)).json()["items"]
        assert [item["object"]["status"]["current_state"] for item in states] == ["RETIRED"]
        async with node(app, token, "berlin", "node-2") as late:
            with pytest.raises(Refused, match="was revoked"):
                await late.bootstrap()
        with pytest.raises(Refused, match="was retired"):
            await made.fetch_credentials()
    async with admitted(app, user, "berlin") as again:
        assert again.credentials
        assert again.credentials.site_id != old.site_id


async def test_a_retired_registration_is_forgotten_when_deleted(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "berlin") as made:
        assert (await user.delete(f"{REGISTRATIONS}/{made.registration}")).status_code == 200
        assert (await user.get(f"{REGISTRATIONS}/{made.registration}")).status_code == 404
        with pytest.raises(NotRecognised, match="revoked"):
            await made.manifest()
