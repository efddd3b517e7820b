"""What becomes of services that clusters export to each other."""

from itertools import pairwise
from typing import Any

import pytest

from agent.protocol.items import Publish
from agent.protocol.report import ExportedPort, ServiceExport
from controlplane.compile import multicluster
from controlplane.compile.concern import concerned_sites
from controlplane.compile.intent import Intent
from controlplane.compile.multicluster import PORTS, Exported, with_imports
from controlplane.compile.site import compile_site, conditions
from controlplane.compile.snapshot import Snapshot
from tests.unit.compile.intents import Body, full_mesh, id_of, intent, observations_of, pool, site, tcp, virtual_site

A, B, C = (id_of(name) for name in "abc")


def mesh(*more: Body, allowed: bool = True) -> Intent:
    """Of sites a, b and c."""
    group = full_mesh("mesh", "all")
    group["spec"] |= {"enable_multi_cluster_services": {}} if allowed else {}
    return intent(*(site(name) for name in "abc"), virtual_site("all", "ves.io/siteName"), group, *more)


def export(name: str = "backend", *ports: int | ExportedPort, at: float = 100, namespace: str = "shop") -> ServiceExport:
    made = (port if isinstance(port, ExportedPort) else ExportedPort(name=f"p{port}", port=port) for port in ports or (80,))
    return ServiceExport(namespace=namespace, name=name, created_at=at, ports=tuple(made))


def compiled(intent: Intent) -> dict[str, Snapshot]:
    return {site_id: compile_site(site_id, intent, observations_of(intent)) for site_id in (A, B, C)}


def published(snapshot: Snapshot) -> dict[str, Any]:
    return {key: Publish.read(item.body) for (kind, key), item in snapshot.items.items() if kind == "publish"}


def test_nothing_is_imported_unless_the_mesh_group_allows_it() -> None:
    closed = mesh(allowed=False)
    assert with_imports(closed, {A: (export(),), B: ()}) is closed


def test_an_exported_service_is_published_where_clusters_take_part() -> None:
    found = compiled(with_imports(mesh(), {A: (export(),), B: ()}))
    assert {site_id: set(published(snapshot)) for site_id, snapshot in found.items()} == {
        A: {"shop/backend-clusterset"},
        B: {"shop/backend"},
        C: set(),
    }
    service = published(found[B])["shop/backend"]
    assert (service.service_import, service.clusters, [port.port for port in service.ports]) == ("backend", ("a",), [80])
    assert service.ports[0].target_port in PORTS
    assert ("service_export", "shop/backend") in found[A].items
    assert ("service_export", "shop/backend") not in found[B].items


def test_what_is_no_longer_exported_leaves_nothing_behind() -> None:
    before = mesh()
    exported = with_imports(before, {A: (export(),), B: ()})
    assert with_imports(exported, {A: (export(),), B: ()}) is exported
    after = with_imports(exported, {A: (), B: ()})
    assert compiled(after) == compiled(before)


def test_of_two_exports_that_differ_the_older_one_prevails() -> None:
    older, newer = export(at=100), export("backend", ExportedPort(name="p80", port=8080), ExportedPort(name="more", port=81), at=200)
    (found,) = with_imports(mesh(), {A: (newer,), B: (older,)}).imports
    assert [(port.port, port.exporters) for port in found.ports] == [(80, (B,)), (81, (A,))]
    assert found.exporters == (B, A)
    assert found.conflicts == ((A, "an older export has the port p80 80, and not p80 8080"),)


def test_ports_of_a_merged_service_all_have_names() -> None:
    unnamed, named = export("backend", ExportedPort(port=80)), export("backend", ExportedPort(name="admin", port=81), at=200)
    (found,) = with_imports(mesh(), {A: (unnamed,), B: (named,)}).imports
    assert [port.name for port in found.ports] == ["port-80", "admin"]
    (alone,) = with_imports(mesh(), {A: (unnamed,)}).imports
    assert [port.name for port in alone.ports] == [""]


def test_a_port_keeps_its_place_whatever_is_exported_later() -> None:
    first = with_imports(mesh(), {A: tuple(export(f"s{number}") for number in range(5))})
    places = {each.service: each.ports[0].target_port for each in first.imports}
    many = tuple(export(f"s{number}", at=100 if number < 5 else 200) for number in range(900))
    later = {each.service: each.ports[0].target_port for each in with_imports(first, {A: many}).imports}
    assert later.items() >= places.items()
    assert len(set(later.values())) == 900


def test_what_is_exported_when_all_ports_are_taken_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multicluster, "MOST_PORTS", 2)
    found = with_imports(mesh(), {A: (export("old", 80, 81), export("new", 80, at=200)), B: ()})
    assert set(published(compiled(found)[B])) == {"shop/old"}
    (said,) = conditions(found)
    assert (said.kind, said.key.name) == ("site_mesh_group", "mesh")
    assert said.message.startswith("shop/new is not imported on port 80")


def test_a_name_that_a_user_asked_for_is_not_taken_and_the_mesh_group_says_so() -> None:
    asked = tcp("lb", ["p"], [], 9000)
    service = {"vk8s_service": {"site": {"namespace": "system", "name": "b"}}, "publish": {"service": "backend", "namespace": "shop"}}
    asked["spec"] |= {"advertise_custom": {"advertise_where": [service]}}
    found = with_imports(mesh(pool("p", "a"), asked), {A: (export(),), B: ()})
    assert published(compiled(found)[B])["shop/backend"].service_import == ""
    (said,) = conditions(found)
    assert (said.kind, said.key.name, said.type) == ("site_mesh_group", "mesh", "Conflicted")
    assert "tcp_loadbalancer shop/lb has the published service shop/backend" in said.message


def test_a_port_that_a_user_listens_on_is_not_taken_and_the_mesh_group_says_so() -> None:
    (made,) = with_imports(mesh(), {A: (export(),), B: ()}).imports
    asked = tcp("lb", ["p"], [], made.ports[0].target_port)
    asked["spec"] |= {"advertise_custom": {"advertise_where": [{"vk8s_service": {"site": {"namespace": "system", "name": "b"}}}]}}
    found = with_imports(mesh(pool("p", "a"), asked), {A: (export(),), B: ()})
    assert published(compiled(found)[B]) == {}
    assert [(said.kind, said.key.name, said.type) for said in conditions(found)] == [("site_mesh_group", "mesh", "Conflicted")]


def test_what_changes_concerns_every_site_whose_snapshot_changes() -> None:
    steps: list[Exported] = [{}, {A: (export(),), B: ()}, {A: (export(),), B: (export(at=200),)}, {A: (), B: (export(at=200),), C: ()}]
    made = [with_imports(mesh(), step) for step in steps]
    for old, new in pairwise(made):
        keys = {key for each in {*old.imports} ^ {*new.imports} for key in each.keys}
        concerned = {site_id for key in keys for given in (old, new) for site_id in concerned_sites("tcp_loadbalancer", key, given)}
        before, after = compiled(old), compiled(new)
        assert {site_id for site_id in before if before[site_id].manifest != after[site_id].manifest} <= concerned
