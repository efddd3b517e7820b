"""Where requests to a pool begin, and what changes when endpoints come and go."""

import gc
from dataclasses import replace
from typing import Any

import pytest
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment

from agent.envoy.clusters import LB_METADATA, USABLE
from agent.envoy.inputs import Endpoint, Item, LocalState, OriginId, PeerView, body, scope_of
from agent.envoy.pools import PoolView, reach, view
from agent.envoy.render import render
from agent.envoy.resources import ENDPOINTS, ROUTES, Resources
from agent.protocol.items import ItemKind, LostSites, OriginPool
from tests.golden_files import ROOT
from tests.unit.envoy.golden_cases import local_of, snapshot_of

A, B, C = (f"0000000{number}-0000-4000-8000-000000000000" for number in (1, 2, 3))
CASE = ROOT / "envoy" / "pools"
SNAPSHOT = snapshot_of((CASE / "snapshot.json").read_text())
LOCAL = local_of((CASE / "local.json").read_text())


def orders(pool: str, local: LocalState) -> dict[tuple[str, ...], int]:
    assert SNAPSHOT.site is not None
    item = SNAPSHOT.by_key[ItemKind.ORIGIN_POOL][pool]
    scope = scope_of(SNAPSHOT.site, local.run_dir, local.trusted_ca_file)
    return dict(reach(view(item, scope, local, frozenset({B, C}))).orders())


def with_pods(pool: str, count: int, **fields: Any) -> LocalState:
    endpoints = tuple(Endpoint(f"10.2.0.{number}", 80) for number in range(count))
    return replace(LOCAL, endpoints={OriginId(pool, "pods"): endpoints}, **fields)


@pytest.mark.parametrize(
    ("pods", "healthy", "expected"),
    [
        (1, 3, {"here": 250, "away": 750}),
        (4, 4, {"here": 500, "away": 500}),
        (0, 4, {"away": 1000}),
        (3, 0, {"here": 1000}),
        (0, 0, {"here": 1000}),
    ],
)
def test_requests_are_spread_by_healthy_endpoints(pods: int, healthy: int, expected: dict[str, int]) -> None:
    local = with_pods("shop/mixed", pods, peers={B: PeerView(reachable=True, exports={"shop/mixed": healthy})})
    begin = {"pool|shop/mixed": "here", "http|shop/mixed": "away"}
    assert {begin[order[0]]: share for order, share in orders("shop/mixed", local).items()} == expected


def test_local_origins_come_first_when_they_are_preferred_and_alone_when_only_they_may_serve() -> None:
    assert list(orders("shop/preferred", LOCAL)) == [("pool|shop/preferred", "http|shop/preferred")]
    assert list(orders("shop/only", LOCAL)) == [("pool|shop/only",)]
    assert list(orders("shop/elsewhere", LOCAL)) == [("pool|shop/elsewhere",)]


def changed(before: Resources, after: Resources) -> set[tuple[str, str]]:
    return {
        (type_url, name)
        for type_url, named in after.by_type.items()
        for name, found in named.items()
        if before.by_type[type_url].get(name) != found
    }


def test_a_new_endpoint_changes_nothing_but_the_endpoints_of_its_cluster() -> None:
    before = render(SNAPSHOT, with_pods("shop/mixed", 4))
    after = render(SNAPSHOT, with_pods("shop/mixed", 5))
    assert changed(before, after) == {(ENDPOINTS, "pool|shop/mixed")}


def test_of_what_a_pool_was_only_the_last_is_remembered() -> None:
    def remembered() -> int:
        gc.collect()
        return len([found for found in gc.get_objects() if type(found) is PoolView])

    first = render(SNAPSHOT, with_pods("shop/mixed", 1))
    before = remembered()
    for count in (2, 3, 4, 1):
        last = render(SNAPSHOT, with_pods("shop/mixed", count))
    assert last == first
    assert remembered() == before


def test_a_peers_health_changes_no_cluster_and_no_listener() -> None:
    before, after = (
        render(SNAPSHOT, with_pods("shop/mixed", 4, peers={B: PeerView(reachable=True, exports={"shop/mixed": healthy})}))
        for healthy in (2, 8)
    )
    assert changed(before, after) == {(ENDPOINTS, "http|shop/mixed"), (ROUTES, "127.90.0.1|8080")}


@pytest.mark.parametrize(("fate", "first", "spare"), [("deprioritise", {C}, {B}), ("evict", {C}, set()), ("keep", {B, C}, set())])
def test_a_pool_says_what_becomes_of_a_lost_site(fate: LostSites, first: set[str], spare: set[str]) -> None:
    assert SNAPSHOT.site is not None
    known = SNAPSHOT.by_key[ItemKind.ORIGIN_POOL]["shop/mixed"]
    origin = body(known, OriginPool).origins[-1].model_copy(update={"sites": (B, C)})
    item = Item(known.id, fate, OriginPool(origins=(origin,), lost_sites=fate))
    scope = scope_of(SNAPSHOT.site, LOCAL.run_dir, LOCAL.trusted_ca_file)
    found = view(item, scope, replace(LOCAL, peers={}), frozenset({B, C}), lost=frozenset({B}))
    assert ({site for site, _ in found.remote or ()}, {site for site, _ in found.spare}) == (first, spare)
    alone = view(item, scope, replace(LOCAL, peers={}), frozenset({B}), lost=frozenset({B}))
    assert alone.remote == (((B, 1),) if fate == "keep" else ()), "none is to be used, which is not the same as that there is none"


@pytest.mark.parametrize(
    ("pool", "pods", "reachable", "expected"),
    [
        ("shop/far", 0, {B}, {B: {}}),
        ("shop/far", 0, {B, C}, {B: USABLE, C: USABLE}),
        ("shop/mixed", 0, {B}, {B: {}}),
        ("shop/mixed", 1, {B}, {B: USABLE}),
    ],
    ids=["one site", "two sites", "one site, and none of the pods here", "one site, and pods here"],
)
def test_a_site_is_reached_by_usable_paths_alone_where_another_one_serves(
    pool: str, pods: int, reachable: set[str], expected: dict[str, dict[str, str]]
) -> None:
    peers = {site: PeerView(reachable=site in reachable) for site in (B, C)}
    resource = render(SNAPSHOT, with_pods(pool, pods, peers=peers)).by_type[ENDPOINTS][f"http|{pool}"]
    assignment = ClusterLoadAssignment.FromString(resource.value)
    found = {
        locality.locality.zone: {key: value.string_value for key, value in endpoint.metadata.filter_metadata[LB_METADATA].fields.items()}
        for locality in assignment.endpoints
        for endpoint in locality.lb_endpoints
    }
    assert found == expected


def test_without_a_site_there_is_nothing() -> None:
    assert not any(render(SNAPSHOT.without([SNAPSHOT.site.id] if SNAPSHOT.site else []), LOCAL).by_type.values())
