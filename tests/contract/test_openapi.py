"""The exported description: current, complete, and without loose ends."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from controlplane.app import create_app
from controlplane.resources.registry import KINDS

EXPORTED = Path(__file__).parents[2] / "openapi" / "openapi.json"


@pytest.fixture(scope="module")
def document() -> dict[str, object]:
    return create_app().openapi()


def test_the_export_is_current(document: dict[str, object]) -> None:
    assert json.loads(EXPORTED.read_text()) == json.loads(json.dumps(document)), "run `make openapi`"


def test_every_reference_resolves(document: dict[str, object]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
        target: object = document
        for step in reference.split("/"):
            assert isinstance(target, dict)
            assert step in target, reference
            target = target[step]


OF_AGENTS = ("/api/agent/", "/api/register/registerBootstrap", "/api/register/requestConfig")
"""Their wire is `agent/protocol`."""


def test_whoever_sends_a_body_is_told_what_it_has(document: dict[str, Any]) -> None:
    without = {
        path
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in ("post", "put") and "requestBody" not in operation and not path.startswith(OF_AGENTS)
    }
    assert without == {
        "/api/operator/authorities/{role}/versions",
        "/api/register/namespaces/system/authority/versions",
        "/api/web/namespaces/{name}/cascade_delete",
    }, "these alone have nothing to say"


def test_a_token_is_described_as_any_object(document: dict[str, Any]) -> None:
    create = document["paths"]["/api/register/namespaces/system/tokens"]["post"]
    properties = create["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert properties["metadata"] == {"$ref": "#/components/schemas/Metadata"}
    assert set(properties["spec"]["properties"]) == {"type", "site_name", "max_uses", "expiration_seconds", "auto_approve"}


def test_operations_have_names_of_their_own() -> None:
    operations = [route for path in create_app().openapi()["paths"].values() for route in path.values()]
    names = Counter(operation["operationId"] for operation in operations)
    assert [name for name, count in names.items() if count > 1] == []
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_verbs(document: dict[str, object], kind: str) -> None:
    text = json.dumps(document)
    for verb in ("Create", "Get", "List", "Replace"):
        assert f'"ves.io.schema.{kind}.API.{verb}"' in text
