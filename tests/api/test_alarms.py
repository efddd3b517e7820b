"""What a site says about its nodes that a person should look into."""

from datetime import timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from agent.errors import Refused
from controlplane.services.heartbeats import TWIN, Heartbeats
from tests.api.enrolled import SITES, Node, admitted, caught_up, node, token_for
from tests.backend import now

Json = dict[str, Any]


async def conditions(app: FastAPI, user: httpx.AsyncClient, made: Node) -> list[tuple[str, str]]:
    """Of site `a`."""
    assert made.credentials
    await app.state.services.heartbeats.flush(now())
    await caught_up(app, made.credentials.tenant_id)
    body: Json = (await user.get(f"{SITES}/a/status")).json()
    warnings = [warning for site in body["sites"] for node in site["nodes"] for warning in node["warnings"]]
    for condition in body["conditions"]:
        assert condition["message"].partition(": ")[2] in warnings
    return [(condition["type"], condition["message"]) for condition in body["conditions"]]


async def test_a_copied_state_directory_is_noticed_though_each_copy_speaks_to_a_replica_of_its_own(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = app.state.services
    async with admitted(app, user, "a") as made:
        at = now() - timedelta(seconds=30)
        replicas = [Heartbeats(services.database, at) for _ in range(2)]
        for _ in range(4):
            for number, replica in enumerate(replicas):
                at += timedelta(seconds=4)
                monkeypatch.setattr("controlplane.api.deps.clock", lambda at=at: at)
                object.__setattr__(services, "heartbeats", replica)
                await made.beat(boot_id=f"boot-{number}", sent_at=at.timestamp())
                await replica.flush(at)
        monkeypatch.undo()
        assert await conditions(app, user, made) == [("DuplicateNode", f"node node-1: {TWIN}")]


async def test_a_restart_is_no_copy(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made:
        await made.beat(boot_id="first")
        await app.state.services.heartbeats.flush(now())
        await made.beat(boot_id="second")
        assert await conditions(app, user, made) == []


@pytest.mark.parametrize(("skew_s", "words"), [(3600, "3600 s ahead of"), (-3600, "3600 s behind"), (20, "")])
async def test_a_clock_that_is_off_is_told(app: FastAPI, user: httpx.AsyncClient, skew_s: float, words: str) -> None:
    async with admitted(app, user, "a") as made:
        await made.beat(sent_at=now().timestamp() + skew_s)
        told = [("ClockSkew", f"node node-1: its clock is {words} the control plane's")] if words else []
        assert await conditions(app, user, made) == told


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
async def test_a_proof_from_such_a_clock_is_refused_with_both_times(app: FastAPI, user: httpx.AsyncClient, skew_s: float) -> None:
    async with admitted(app, user, "a") as made:
        made.control.skew_s = skew_s
        with pytest.raises(Refused, match=r"the node's clock says .*, the control plane's"):
            await made.manifest()


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
async def test_a_node_whose_clock_is_off_enrols_all_the_same(app: FastAPI, user: httpx.AsyncClient, skew_s: float) -> None:
    async with node(app, await token_for(user, "a"), "a") as made:
        assert await made.bootstrap(timestamp=now().timestamp() + skew_s) == "APPROVED"
        assert (await made.fetch_credentials()).certificate_pem
        (found,) = (await user.get("/api/register/namespaces/system/registrations_by_site/a")).json()["items"]
        assert found["spec"]["clock_skew_s"] == pytest.approx(skew_s, abs=30)
