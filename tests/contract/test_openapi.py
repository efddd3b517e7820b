"""The exported description: current, complete, and without loose ends."""

import json
import re
from collections import Counter
from pathlib import Path

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
