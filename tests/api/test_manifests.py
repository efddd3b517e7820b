"""One command installs an agent: what it is given, and what is refused."""

from base64 import b64decode

import httpx
import jwt
import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from tests.api.enrolled import SITES, TOKENS, Json
from tests.deploy.cluster import cluster

MANIFEST = TOKENS + "/{}/manifest"


def by_kind(answer: httpx.Response) -> dict[str, Json]:
    """Of several of a kind, the last."""
    assert answer.status_code == 200, answer.text
    return {each["kind"]: each for each in yaml.safe_load_all(answer.text)}


@pytest.mark.parametrize("replicas", [1, 3])
async def test_a_manifest_has_all_that_an_agent_needs(user: httpx.AsyncClient, replicas: int) -> None:
    answer = await user.post(MANIFEST.format("paris"), params={"replicas": replicas})
    assert answer.headers["content-type"].startswith("application/yaml")
    found = by_kind(answer)
    claims = jwt.decode(found["Secret"]["stringData"]["token"], options={"verify_signature": False})
    assert claims["site_name"] == "paris"
    assert claims["urls"]
    pods = found["StatefulSet"]["spec"]
    assert pods["replicas"] == replicas
    assert pods["template"]["spec"]["containers"][0]["image"] == "isthmus-agent"
    assert found["Secret"]["metadata"]["name"] in {
        volume["secret"]["secretName"] for volume in pods["template"]["spec"]["volumes"] if "secret" in volume
    }
    assert ("PodDisruptionBudget" in found) == (replicas == 3)
    token = (await user.get(f"{TOKENS}/paris")).json()
    assert token["spec"]["max_uses"] == replicas
    assert "paris" in answer.text.splitlines()[0]


async def test_what_the_pods_need_comes_before_them(user: httpx.AsyncClient) -> None:
    answer = await user.post(MANIFEST.format("paris"))
    kinds = [each["kind"] for each in yaml.safe_load_all(answer.text)]
    assert kinds[:2] == ["Namespace", "Secret"]
    assert kinds.index("StatefulSet") > kinds.index("ServiceAccount")


async def test_a_manifest_is_shown_once_as_its_token_is(user: httpx.AsyncClient) -> None:
    first = by_kind(await user.post(MANIFEST.format("paris")))
    again = await user.post(MANIFEST.format("paris"))
    assert again.status_code == 409
    assert first["Secret"]["stringData"]["token"] not in again.text + (await user.get(f"{TOKENS}/paris")).text


async def test_the_token_may_be_chosen_as_at_its_creation(user: httpx.AsyncClient) -> None:
    body = {"metadata": {"description": "spare"}, "spec": {"site_name": "berlin", "expiration_seconds": 60, "auto_approve": False}}
    found = by_kind(await user.post(MANIFEST.format("second"), json=body))
    claims = jwt.decode(found["Secret"]["stringData"]["token"], options={"verify_signature": False})
    assert (claims["site_name"], claims["exp"] - claims["iat"]) == ("berlin", 60)
    token = (await user.get(f"{TOKENS}/second")).json()
    assert token["spec"]["auto_approve"] is False
    assert token["metadata"]["description"] == "spare"


@pytest.mark.parametrize(
    ("query", "body", "field"),
    [
        ("?replicas=2", {}, "replicas"),
        ("", {"metadata": {"name": "other"}}, "metadata.name"),
        ("", {"spec": {"type": "NORMAL"}}, "spec.site_name"),
        ("", {"spec": {"max_use": 1}}, "spec.max_use"),
        ("", {"spec": []}, "spec"),
    ],
)
async def test_a_manifest_that_makes_no_sense_is_refused(user: httpx.AsyncClient, query: str, body: Json, field: str) -> None:
    answer = await user.post(MANIFEST.format("paris") + query, json=body)
    assert answer.status_code == 400
    assert answer.json()["details"][0]["field"] == field
    assert (await user.get(f"{TOKENS}/paris")).status_code == 404


async def test_an_edge_is_not_installed_in_a_cluster(operator: httpx.AsyncClient) -> None:
    made = await operator.post(SITES, json={"metadata": {"name": "edge"}, "spec": {"site_type": "REGIONAL_EDGE"}})
    assert made.status_code == 200
    assert (await operator.post(MANIFEST.format("edge"))).status_code == 400
    assert (await operator.get(f"{TOKENS}/edge")).status_code == 404


async def test_kubectl_applies_it_from_its_standard_input(user: httpx.AsyncClient) -> None:
    async with cluster() as target:
        answer = await user.post(MANIFEST.format("paris"), params={"replicas": 3})
        said = await target.kubectl("apply", "-f", "-", stdin=answer.text)
        assert said.count(" created") == len(list(yaml.safe_load_all(answer.text)))
        assert said.index("secret/isthmus-token") < said.index("statefulset.apps/isthmus")
        assert (await target.api.get("StatefulSet", "isthmus", "isthmus"))["spec"]["replicas"] == 3
        secret = await target.api.get("Secret", "isthmus-token", "isthmus")
        assert b64decode(secret["data"]["token"]).decode() == by_kind(answer)["Secret"]["stringData"]["token"]
