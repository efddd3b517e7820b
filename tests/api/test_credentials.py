"""API credentials: shown once, kept as hashes, withdrawn at once; and tenants, which the operator makes."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from controlplane.auth import token_hash
from controlplane.store.session import Database
from tests.backend import client_of

CREDENTIALS = "/api/web/namespaces/system/api_credentials"
SERVICES = "/api/web/namespaces/system/service_credentials"
TENANTS = "/api/operator/tenants"
NAMESPACES = "/api/web/namespaces"
CHECK = {
    "metadata": {"name": "alive"},
    "spec": {"tcp_health_check": {}, "interval": 5, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 1},
}

Json = dict[str, Any]


def wanted(name: str = "ci", **given: Any) -> Json:
    return {"name": name, "namespace": "system", "spec": {"type": "API_TOKEN"}, **given}


async def made(client: httpx.AsyncClient, body: Json | None = None) -> str:
    answer = await client.post(CREDENTIALS, json=body or wanted())
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"])


async def status_with(app: FastAPI, token: str) -> int:
    async with client_of(app, token) as client:
        return (await client.get(NAMESPACES)).status_code


async def test_a_new_token_works_and_is_shown_once(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await made(user)
    assert await status_with(app, token) == 200
    for path in (CREDENTIALS, f"{CREDENTIALS}/ci"):
        answer = await user.get(path)
        assert token not in answer.text
        assert "API_TOKEN" in answer.text


async def test_only_its_hash_is_stored(database: Database, user: httpx.AsyncClient) -> None:
    token = await made(user)
    async with database.definer() as definer:
        found = await definer.exec_driver_sql("SELECT name FROM credential_by_hash(%s)", (token_hash(token),))
        assert found.scalar_one() == "ci"


async def test_a_revoked_token_is_refused_at_once(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await made(user)
    assert (await user.post("/api/web/namespaces/system/revoke/api_credentials", json={"name": "ci"})).status_code == 200
    assert await status_with(app, token) == 401
    assert (await user.post("/api/web/namespaces/system/revoke/api_credentials", json={"name": "ci"})).status_code == 404
    assert await made(user) != token


async def test_a_token_can_be_suspended(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await made(user)
    for active, status in ((False, 401), (True, 200)):
        answer = await user.post("/api/web/namespaces/system/activate/api_credentials", json={"name": "ci", "active": active})
        assert answer.json() == {"status": True}
        assert await status_with(app, token) == status


async def test_a_token_can_be_renewed(user: httpx.AsyncClient) -> None:
    await made(user, wanted(expiration_days=1))
    before = (await user.get(f"{CREDENTIALS}/ci")).json()["object"]["expiry_timestamp"]
    assert (
        await user.post("/api/web/namespaces/system/renew/api_credentials", json={"name": "ci", "expiration_days": 30})
    ).status_code == 200
    assert (await user.get(f"{CREDENTIALS}/ci")).json()["object"]["expiry_timestamp"] > before


async def test_credentials_of_services(app: FastAPI, user: httpx.AsyncClient) -> None:
    answer = await user.post(SERVICES, json={"name": "robot", "namespace": "system", "expiration_days": 7, "api_token": {}})
    assert answer.status_code == 200
    assert await status_with(app, answer.json()["data"]) == 200
    assert [item["type"] for item in (await user.get(SERVICES)).json()["items"]] == ["SERVICE_API_TOKEN"]
    assert "robot" not in (await user.get(CREDENTIALS)).text


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CREDENTIALS, wanted(spec={"type": "API_CERTIFICATE"}), "spec.type"),
        (CREDENTIALS, wanted(spec={"type": "API_TOKENS"}), "spec.type"),
        (CREDENTIALS, wanted(expiration_days=100_000), "expiration_days"),
        (CREDENTIALS, wanted(name="No Name"), "name"),
        (CREDENTIALS, {**wanted(), "colour": "red"}, "colour"),
        (SERVICES, {"name": "x", "api_certificate": {"password": "secret"}}, "api_certificate"),
        (SERVICES, {"name": "x", "api_token": {}, "namespace_roles": [{"namespace": "x", "role": "y"}]}, "namespace_roles"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(user: httpx.AsyncClient, path: str, body: Json, field: str) -> None:
    answer = await user.post(path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 3)
    assert field in {detail["field"] for detail in answer.json()["details"]}


async def test_credentials_of_others_do_not_exist(user: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    await made(user)
    assert (await stranger.get(f"{CREDENTIALS}/ci")).status_code == 404
    assert (await stranger.post("/api/web/namespaces/system/revoke/api_credentials", json={"name": "ci"})).status_code == 404


async def test_the_same_name_twice_is_refused(user: httpx.AsyncClient) -> None:
    await made(user)
    assert (await user.post(CREDENTIALS, json=wanted())).status_code == 409
    assert (await user.get(CREDENTIALS)).status_code == 200


async def test_only_the_operator_sees_tenants(user: httpx.AsyncClient, anonymous: httpx.AsyncClient) -> None:
    for method, path in (("GET", TENANTS), ("POST", TENANTS), ("GET", f"{TENANTS}/default"), ("DELETE", f"{TENANTS}/default")):
        assert (await user.request(method, path, content=b"{}")).status_code == 403
        assert (await anonymous.request(method, path, content=b"{}")).status_code == 401


async def test_of_many_who_delete_a_tenant_one_succeeds(operator: httpx.AsyncClient) -> None:
    await operator.post(TENANTS, json={"name": "deleted-by-many"})
    answers = await asyncio.gather(*(operator.delete(f"{TENANTS}/deleted-by-many") for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [404] * 7


async def test_the_life_of_a_tenant(app: FastAPI, operator: httpx.AsyncClient) -> None:
    name = "life-of-a-tenant"
    token = (await operator.post(TENANTS, json={"name": name})).json()["token"]
    assert (await operator.post(TENANTS, json={"name": name})).status_code == 409
    assert name in [item["name"] for item in (await operator.get(TENANTS)).json()["items"]]
    async with client_of(app, token) as client:
        assert [item["name"] for item in (await client.get(NAMESPACES)).json()["items"]] == ["default", "shared", "system"]
        await client.post("/api/config/namespaces/system/sites", json={"metadata": {"name": "a"}})
        assert (await operator.delete(f"{TENANTS}/{name}")).status_code == 409
        await client.delete("/api/config/namespaces/system/sites/a")
        inside = await operator.delete(f"{TENANTS}/{name}", headers={"x-volterra-apigw-tenant": name})
        assert (inside.status_code, inside.json()["code"]) == (409, 9)
        assert (await operator.delete(f"{TENANTS}/{name}")).status_code == 200
        assert (await client.get(NAMESPACES)).status_code == 401
    assert (await operator.get(f"{TENANTS}/{name}")).status_code == 404
    assert (await operator.delete(f"{TENANTS}/default")).status_code == 403


async def test_the_audit_log_and_what_was_made_say_by_whom(app: FastAPI, user: httpx.AsyncClient) -> None:
    """By id too: another credential may get the name later."""
    async with client_of(app, await made(user)) as robot:
        found = (await robot.post("/api/config/namespaces/shop/healthchecks", json=CHECK)).json()
    who = {key: found["system_metadata"][key] for key in ("creator_id", "creator_class")}
    assert who == {"creator_id": "ci", "creator_class": "credential"}
    first = await audited(user)
    await user.post("/api/web/namespaces/system/revoke/api_credentials", json={"name": "ci"})
    async with client_of(app, await made(user)) as another:
        replaced = (await another.put("/api/config/namespaces/shop/healthchecks/alive", json=CHECK)).json()
    assert {key: replaced["system_metadata"][key] for key in who} == who
    last = await audited(user)
    assert (first["user"], last["user"]) == ("ci", "ci")
    assert first["credential_id"] != last["credential_id"]


async def audited(user: httpx.AsyncClient) -> Json:
    """The last change of a health check."""
    body = {"query": '{name="alive"}', "sort": "DESCENDING"}
    (newest, *_) = (await user.post("/api/data/namespaces/shop/audit_logs", json=body)).json()["logs"]
    found: Json = json.loads(newest)
    return found
