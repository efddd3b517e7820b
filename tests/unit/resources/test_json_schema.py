"""The published schemas say what `parse` does, choices included."""

from typing import Any

import jsonschema_rs
import pytest

from controlplane.resources.registry import KINDS, dump
from tests.unit.resources.resource_specs import POOL, SMALLEST, changed, read


def is_valid(kind: str, spec: Any) -> bool:
    return jsonschema_rs.is_valid(KINDS[kind].type.model_json_schema(), spec)


@pytest.mark.parametrize("kind", SMALLEST)
def test_bodies_and_answers_satisfy_the_schema(kind: str) -> None:
    assert is_valid(kind, SMALLEST[kind])
    assert is_valid(kind, dump(read(kind, SMALLEST[kind])))


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("site_mesh_group", {}),
        ("http_loadbalancer", changed("http_loadbalancer", http=None)),
        (
            "http_loadbalancer",
            changed("http_loadbalancer", advertise_custom={"advertise_where": [{"vk8s_service": {"site": {"name": "a"}}}]}),
        ),
        ("http_loadbalancer", changed("http_loadbalancer", default_pool_list={"pools": [POOL]}, default_route_pools=[POOL])),
        ("origin_pool", changed("origin_pool", no_tls={}, use_tls={"tls_config": {}})),
        ("origin_pool", changed("origin_pool", loadbalancer_algorithm="FASTEST")),
        ("service_policy", {"allow_all_requests": {}, "deny_all_requests": {}}),
        ("site", {"tenant": "x"}),
    ],
)
def test_what_the_schema_forbids_is_forbidden(kind: str, spec: Any) -> None:
    assert not is_valid(kind, spec)
