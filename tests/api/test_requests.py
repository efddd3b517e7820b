"""What holds for every request: committed or refused, limited, recorded, and nothing secret let out."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import httpx
import limits
import pytest
from fastapi import FastAPI
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DataError

from agent.errors import Busy, NotRecognised, Refused
from agent.protocol.enrolment import BOOTSTRAP_PATH
from controlplane.api.deps import Limits
from controlplane.services.authorities import Fabric
from controlplane.store import secrets as secret_store
from controlplane.store.session import Database
from tests.api.enrolled import admitted, node, token_for
from tests.backend import Postgres, client_of

CHECKS = "/api/config/namespaces/shop/healthchecks"
DISCOVERIES = "/api/config/namespaces/system/discoverys"
Json = dict[str, Any]


def check(name: str = "alive") -> Json:
    spec = {"http_health_check": {"path": "/"}, "timeout": 3, "interval": 15, "unhealthy_threshold": 1, "healthy_threshold": 3}
    return {"metadata": {"name": name}, "spec": spec}


def discovery(secret: Json) -> Json:
    where = {"site": {"ref": [{"kind": "site", "namespace": "system", "name": "a"}], "network_type": "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE"}}
    access = {"kubeconfig_url": secret, "isolated": {}}
    return {
        "metadata": {"name": "k8s"},
        "spec": {"where": where, "discovery_k8s": {"access_info": access, "publish_info": {"disable": {}}}},
    }


def clear(secret: bytes) -> Json:
    return {"clear_secret_info": {"url": f"string:///{base64.b64encode(secret).decode()}"}}


@asynccontextmanager
async def changed(app: FastAPI, **services: Any) -> AsyncIterator[None]:
    """The application with other services for a while."""
    before = app.state.services
    app.state.services = replace(before, **services)
    yield
    app.state.services = before


# Committed or refused


async def test_a_failing_commit_is_never_a_success(app: FastAPI, user: httpx.AsyncClient, postgres: Postgres) -> None:
    """A constraint that is checked at commit, after the route has its answer ready."""
    with create_engine(postgres.owner_url, poolclass=NullPool).begin() as connection:
        connection.execute(
            text("""
                CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today' USING ERRCODE = '57P03'; END $$;
                CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON resources DEFERRABLE INITIALLY DEFERRED
                    FOR EACH ROW WHEN (NEW.name = 'doomed') EXECUTE FUNCTION refuse()
            """)
        )
    try:
        answer = await user.post(CHECKS, json=check("doomed"))
        assert (answer.status_code, answer.json()["code"]) == (503, 14)
        assert "not today" not in answer.text
        assert (await user.get(f"{CHECKS}/doomed")).status_code == 404
    finally:
        with create_engine(postgres.owner_url, poolclass=NullPool).begin() as connection:
            connection.execute(text("DROP TRIGGER refuse ON resources; DROP FUNCTION refuse()"))


async def test_without_a_database_there_is_503_and_health_says_so(app: FastAPI, user: httpx.AsyncClient, postgres: Postgres) -> None:
    nowhere = Database(postgres.app_url.set(query={"host": "/nonexistent"}))
    async with changed(app, database=nowhere):
        answer = await user.get(CHECKS)
        assert (answer.status_code, answer.json()["code"]) == (503, 14)
        assert "retry-after" in answer.headers
        assert (await user.get("/readyz")).status_code == 503
        assert (await user.get("/healthz")).status_code == 200
    assert (await user.get("/readyz")).status_code == 200
    await nowhere.close()


async def test_writers_of_one_tenant_stand_in_line(user: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(user.post(CHECKS, json=check(f"check-{number}")) for number in range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    revisions = sorted(answer.json()["revision"] for answer in answers)
    assert revisions == list(range(revisions[0], revisions[0] + 12))


async def test_of_many_who_create_the_same_one_succeeds(user: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(user.post(CHECKS, json=check()) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409, 409]


# Limits


async def test_a_credential_that_asks_too_fast_is_slowed_down(app: FastAPI, user: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    async with changed(app, limits=Limits(limits.parse("3/hour"), limits.parse("100/hour"))):
        answers = [await user.get(CHECKS) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[3].json()["code"] == 8
        assert 1 <= int(answers[3].headers["retry-after"]) <= 3600
        assert (await stranger.get("/api/web/namespaces")).status_code == 200


async def test_an_address_that_guesses_tokens_is_slowed_down(app: FastAPI, user: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    """Then nothing is looked up for it any more, but for credentials that were good a moment ago."""
    few = Limits(limits.parse("100/hour"), limits.parse("3/hour"))
    async with changed(app, limits=few), client_of(app, "ist_guess") as guesser, client_of(app, None) as nobody:
        assert (await user.get(CHECKS)).status_code == 200
        assert [(await guesser.get(CHECKS)).status_code for _ in range(4)] == [401, 401, 401, 429]
        async with changed(app, database=None):
            for client in (guesser, nobody, stranger):
                answer = await client.get(CHECKS)
                assert (answer.status_code, answer.json()["code"]) == (429, 8)
        assert (await user.get(CHECKS)).status_code == 200


async def test_an_address_that_guesses_nodes_is_slowed_down_and_no_node_that_is_known(app: FastAPI, user: httpx.AsyncClient) -> None:
    few = Limits(limits.parse("100/hour"), limits.parse("1/hour"))
    async with changed(app, limits=few), admitted(app, user, "a") as made, admitted(app, user, "b") as guesser:
        await made.beat()
        assert guesser.control.signer
        guesser.control.signer = replace(guesser.control.signer, node_id=str(uuid4()))
        with pytest.raises(NotRecognised):
            await guesser.beat()
        async with changed(app, database=None, gate=None):
            with pytest.raises(Busy):
                await guesser.manifest()
        await made.beat()


async def test_credentials_of_one_name_are_limited_each_for_itself(app: FastAPI, user: httpx.AsyncClient) -> None:
    bodies: dict[str, dict[str, Any]] = {"api_credentials": {"spec": {"type": "API_TOKEN"}}, "service_credentials": {"api_token": {}}}
    made = [
        (await user.post(f"/api/web/namespaces/system/{kind}", json={"name": "same", "namespace": "system", **body})).json()
        for kind, body in bodies.items()
    ]
    async with changed(app, limits=Limits(limits.parse("1/hour"), limits.parse("100/hour"))):
        for credential in made:
            async with client_of(app, credential["data"]) as client:
                assert [(await client.get(CHECKS)).status_code for _ in range(2)] == [200, 429]


async def test_an_address_that_tries_old_registration_tokens_is_slowed_down(app: FastAPI, user: httpx.AsyncClient) -> None:
    token = await token_for(user, "a")
    few = Limits(limits.parse("100/hour"), limits.parse("1/hour"))
    async with changed(app, limits=few), node(app, token, "a", "node-1") as first, node(app, token, "a", "node-2") as second:
        await first.bootstrap()
        with pytest.raises(Refused, match="was used 1 of 1 times"):
            await second.bootstrap()
        with pytest.raises(Busy):
            await second.bootstrap()


async def test_what_an_unknown_caller_sends_is_not_even_read(anonymous: httpx.AsyncClient) -> None:
    """Whatever is wrong with it, and wherever it goes."""
    for path in (CHECKS, "/api/web/namespaces/shop/cascade_delete", "/api/operator/tenants", "/api/register/namespaces/system/tokens"):
        answer = await anonymous.post(path, content=b'{"a": 1, "a": 2}')
        assert (answer.status_code, answer.json()["code"]) == (401, 16)


async def test_an_address_that_sends_newcomers_nonsense_is_slowed_down(app: FastAPI, anonymous: httpx.AsyncClient) -> None:
    async with changed(app, limits=Limits(limits.parse("100/hour"), limits.parse("3/hour"))):
        bodies = (b"{", b'{"a": 1, "a": 2}', b'{"spec": {}}', b'{"spec": {}}')
        assert [(await anonymous.post(BOOTSTRAP_PATH, content=body)).status_code for body in bodies] == [400, 400, 400, 429]


# What answers carry


async def test_every_answer_has_the_headers_of_security(user: httpx.AsyncClient, anonymous: httpx.AsyncClient) -> None:
    for answer in (await user.get(CHECKS), await anonymous.get(CHECKS), await anonymous.get("/nowhere"), await anonymous.get("/healthz")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "content-security-policy" not in (await anonymous.get("/docs")).headers


async def test_metrics_count_by_route_and_not_by_name(user: httpx.AsyncClient) -> None:
    await user.get(f"{CHECKS}/some-name")
    exported = (await user.get("/metrics")).text
    assert (
        'isthmus_http_requests_total{method="GET",route="/api/config/namespaces/{namespace}/healthchecks/{name}",status="404"}' in exported
    )
    assert "some-name" not in exported


async def test_changes_are_recorded_with_who_made_them(database: Database, user: httpx.AsyncClient) -> None:
    made = (await user.post(CHECKS, json=check())).json()
    await user.put(f"{CHECKS}/alive", json=check())
    await user.delete(f"{CHECKS}/alive")
    async with database.definer() as definer:
        tenant = made["system_metadata"]["tenant"]
        tenant_id = (await definer.execute(text("SELECT id FROM tenant_by_name(:name)"), {"name": tenant})).scalar_one()
    async with database.sessions(tenant_id) as session:
        rows = await session.execute(text("SELECT rpc, credential, revision FROM audit_log WHERE name = 'alive' ORDER BY id"))
        assert rows.all() == [
            (f"ves.io.schema.healthcheck.API.{verb}", "admin", made["revision"] + number)
            for number, verb in enumerate(("Create", "Replace", "Delete"))
        ]


# Secrets


async def test_a_statement_that_fails_does_not_tell_its_parameters(database: Database) -> None:
    with pytest.raises(DataError) as error:
        async with database.definer() as definer:
            await definer.execute(text("SELECT 1 / (length(:secret) - 12)"), {"secret": "crown jewels"})
    assert "jewels" not in str(error.value)


@pytest.fixture
async def with_site(user: httpx.AsyncClient) -> httpx.AsyncClient:
    assert (await user.post("/api/config/namespaces/system/sites", json={"metadata": {"name": "a"}})).status_code == 200
    return user


def location(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["spec"]["discovery_k8s"]["access_info"]["kubeconfig_url"]["blindfold_secret_info"]["location"]
    return found


async def test_a_secret_is_sealed_and_never_shown(
    with_site: httpx.AsyncClient, database: Database, fabric: Fabric, postgres: Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = b"kubeconfig-of-the-crown-jewels"
    answer = await with_site.post(DISCOVERIES, json=discovery(clear(secret)))
    ref = location(answer)
    listed = await with_site.get(f"{DISCOVERIES}?report_fields")
    assert "jewels" not in answer.text + listed.text + capsys.readouterr().out
    encoded = base64.b64encode(secret).decode()
    with create_engine(postgres.owner_url, poolclass=NullPool).connect() as connection:
        for table in ("resources", "secrets", "audit_log"):
            stored = connection.execute(text(f"SELECT count(*) FROM {table} AS t WHERE t::text ~ :secret"), {"secret": f"jewels|{encoded}"})
            assert stored.scalar_one() == 0
        tenant = connection.execute(text("SELECT tenant_id FROM secrets WHERE uid = :uid"), {"uid": ref.split(":")[1]}).scalar_one()
    async with database.sessions(tenant) as session:
        sealed = (await secret_store.find(session, tenant, (ref,)))[ref]
    assert fabric.ring.unseal(sealed.sealed, secret_store.purpose(tenant, ref)) == secret


async def test_a_secret_that_does_not_change_keeps_its_reference(with_site: httpx.AsyncClient) -> None:
    first = location(await with_site.post(DISCOVERIES, json=discovery(clear(b"one"))))
    path = f"{DISCOVERIES}/k8s"
    assert location(await with_site.put(path, json=discovery(clear(b"one")))) == first
    assert location(await with_site.put(path, json=discovery({"blindfold_secret_info": {"location": first}}))) == first
    second = location(await with_site.put(path, json=discovery(clear(b"two"))))
    assert second.split(":")[1:] == [first.split(":")[1], "2"]
    gone = await with_site.put(path, json=discovery({"blindfold_secret_info": {"location": first}}))
    assert gone.status_code == 400
    assert gone.json()["details"][0]["field"] == "spec.discovery_k8s.access_info.kubeconfig_url"


async def test_a_secret_of_another_object_cannot_be_named(with_site: httpx.AsyncClient) -> None:
    first = location(await with_site.post(DISCOVERIES, json=discovery(clear(b"one"))))
    other = discovery({"blindfold_secret_info": {"location": first}})
    other["metadata"]["name"] = "other"
    assert (await with_site.post(DISCOVERIES, json=other)).status_code == 400
