"""Metadata, and what may stand around a spec."""

from typing import Any

import pytest

from controlplane.errors import Invalid
from controlplane.resources.normal import MAX_DETAILS
from controlplane.resources.registry import KINDS, parse


def metadata_of(**metadata: Any) -> Any:
    return parse("healthcheck", body(**metadata), namespace="shop").metadata


def body(**metadata: Any) -> dict[str, Any]:
    spec = {"tcp_health_check": {}, "interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 1}
    return {"metadata": {"name": "x", **metadata}, "spec": spec}


def refused(sent: Any, **path: Any) -> dict[str, str]:
    with pytest.raises(Invalid) as error:
        parse("healthcheck", sent, **({"namespace": "shop"} | path))
    return {detail.field: detail.description for detail in error.value.details}


def test_the_namespace_comes_from_the_path() -> None:
    assert metadata_of().namespace == metadata_of(namespace="").namespace == metadata_of(namespace="shop").namespace == "shop"
    assert refused(body(namespace="bank")) == {"metadata.namespace": "should be shop, as in the path"}


def test_a_namespace_cannot_be_disabled() -> None:
    with pytest.raises(Invalid) as error:
        parse("namespace", {"metadata": {"name": "shop", "disable": True}}, namespace="")
    assert [detail.field for detail in error.value.details] == ["metadata.disable"]
    assert metadata_of(disable=True).disable


def test_of_many_unknown_fields_those_that_are_shown_get_a_hint() -> None:
    sent = body()
    sent["spec"] |= {f"timeouts{number}": 1 for number in range(5000)}
    found = refused(sent)
    assert len(found) == MAX_DETAILS
    assert set(found.values()) == {"is not a field of the API: did you mean timeout?"}


def test_the_name_comes_from_the_path_where_it_has_one() -> None:
    unnamed = body(name=None)
    assert parse("healthcheck", unnamed, namespace="shop", name="y").metadata.name == "y"
    assert refused(unnamed) == {"metadata.name": "should be not nil, got nil in request"}
    assert refused(body(), name="y") == {"metadata.name": "should be y, as in the path"}


def test_a_body_without_metadata_takes_its_name_from_the_path() -> None:
    sent = {"spec": body()["spec"]}
    assert parse("healthcheck", sent, namespace="shop", name="y").metadata.name == "y"


@pytest.mark.parametrize(
    ("metadata", "path"),
    [
        ({"name": "A"}, "metadata.name"),
        ({"name": "1a"}, "metadata.name"),
        ({"name": "a-"}, "metadata.name"),
        ({"name": "a\n"}, "metadata.name"),
        ({"name": "a" * 65}, "metadata.name"),
        ({"name": 7}, "metadata.name"),
        ({"description": "é" * 601}, "metadata.description"),
        ({"disable": "yes"}, "metadata.disable"),
        ({"labels": {"a b": "c"}}, "metadata.labels.a b"),
        ({"labels": {"a": "b c"}}, "metadata.labels.a"),
        ({"labels": {"a": "b" * 64}}, "metadata.labels.a"),
        ({"labels": {"a": 1}}, "metadata.labels.a"),
        ({"labels": {"ves.io/siteName": "a"}}, "metadata.labels.ves.io/siteName"),
        ({"annotations": {"a": ""}}, "metadata.annotations.a"),
        ({"annotations": {"a" * 65: "b"}}, f"metadata.annotations.{'a' * 65}"),
        ({"annotations": {"a": "b" * 1025}}, "metadata.annotations.a"),
        ({"uid": "x"}, "metadata.uid"),
    ],
)
def test_bad_metadata_is_refused_at_its_path(metadata: dict[str, Any], path: str) -> None:
    assert list(refused(body(**metadata))) == [path]


def test_good_metadata_is_kept() -> None:
    sent = {
        "name": "x",
        "labels": {"env": "prod", "example.com/team": "", "ves.io/region": "eu"},
        "annotations": {"any key": "any value"},
        "description": "é" * 600,
        "disable": True,
    }
    assert metadata_of(**sent).model_dump() == sent | {"namespace": "shop"}


def test_what_only_answers_have_is_tolerated_and_other_words_are_not() -> None:
    answer = body() | {"system_metadata": {}, "status": [], "create_form": None, "revision": 3, "referring_objects": []}
    assert parse("healthcheck", answer, namespace="shop")
    assert refused(body() | {"sepc": {}}) == {"sepc": "is not a field of the API: did you mean spec?"}


@pytest.mark.parametrize("version", [None, "", "7", 7])
def test_a_resource_version_may_be_given(version: object) -> None:
    assert parse("healthcheck", body() | {"resource_version": version}, namespace="shop")


def test_a_resource_version_is_no_object() -> None:
    assert refused(body() | {"resource_version": {}}) == {"resource_version": "should be a string"}


def test_a_missing_spec_is_an_empty_one() -> None:
    assert "spec.health_check" in refused({"metadata": {"name": "x"}})
    assert parse("namespace", {"metadata": {"name": "shop"}}, namespace="").metadata.name == "shop"


def test_plurals_are_those_of_the_api() -> None:
    assert KINDS["service_policy"].plural == "service_policys"
    assert KINDS["discovery"].plural == "discoverys"
    assert {kind.slug for kind in KINDS.values()} == {"config", "web"}
