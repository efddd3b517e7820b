"""In which order a peer is reached, and what changes when a path is judged."""

from dataclasses import replace
from typing import Any

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.base_pb2 import Metadata
from envoy.config.core.v3.health_check_pb2 import DEGRADED
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.extensions.upstreams.http.v3.http_protocol_options_pb2 import HttpProtocolOptions

from agent.envoy.clusters import HTTP_OPTIONS, LB_METADATA, USABLE
from agent.envoy.inputs import Item, ItemId, LocalState, PeerView, Scope
from agent.envoy.paths import paths
from agent.envoy.render import render
from agent.envoy.resources import CLUSTER, ENDPOINTS, Resources
from agent.protocol.items import Edge, Gateway, ItemKind, Peer
from tests.golden_files import ROOT
from tests.unit.envoy.golden_cases import local_of, snapshot_of

B = "00000002-0000-4000-8000-000000000000"
E = "00000011-0000-4000-8000-000000000000"
CASE = ROOT / "envoy" / "relay"
SNAPSHOT = snapshot_of((CASE / "snapshot.json").read_text())
LOCAL = local_of((CASE / "local.json").read_text())
GATEWAYS = (Gateway(node_id="n0", host="192.0.2.1", port=15443),)


def scope(**fields: Any) -> Scope:
    common = {"tenant_id": "t", "site_id": "a", "trust_domain": "d", "peer_anchor_pem": "p", "trusted_ca_file": "f", "run_dir": "r"}
    return Scope(**{**common, "edge_anchor_pem": "e", **fields})


def edges(*found: Edge) -> dict[str, Item]:
    return {edge.site_id: Item(ItemId(ItemKind.EDGE, edge.site_id), str(edge), edge) for edge in found}


def edge(site_id: str, **fields: Any) -> Edge:
    return Edge(site_id=site_id, name=site_id, **{"gateways": GATEWAYS, **fields})


KNOWN = edges(edge("e"), edge("f", draining=True), edge("g"), edge("n", gateways=()))


def found(view: PeerView | None = None, of: Scope | None = None, **fields: Any) -> dict[str, bool]:
    peer = Peer(site_id="b", name="b", **fields)
    item = Item(ItemId(ItemKind.PEER, "b"), str(peer), peer)
    return {path.way.path: path.usable for path in paths(item, KNOWN, view, of or scope())}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gateways": GATEWAYS, "edges": ("f", "e", "g")}, ["direct", "reverse", "e", "g", "f"]),
        ({"gateways": GATEWAYS, "direct": False, "edges": ("g", "e")}, ["g", "e"]),
        ({"edges": ("e", "n", "unknown")}, ["reverse", "e"]),
        ({"direct": False}, []),
    ],
    ids=["all", "edges alone", "behind a wall", "none"],
)
def test_paths_are_tried_in_order_and_draining_edges_last(fields: dict[str, Any], expected: list[str]) -> None:
    assert list(found(**fields)) == expected


def test_a_path_is_used_until_it_is_judged_but_tunnels_of_a_peer_that_can_be_dialled_only_after() -> None:
    assert found(gateways=GATEWAYS, edges=("e",)) == {"direct": True, "reverse": False, "e": True}
    assert found(edges=("e",)) == {"reverse": True, "e": True}
    judged = PeerView(paths={"direct": False, "reverse": True, "e": False})
    assert found(judged, gateways=GATEWAYS, edges=("e",)) == {"direct": False, "reverse": True, "e": False}


def test_where_there_are_no_regional_edges_peers_are_dialled_or_not_reached() -> None:
    nowhere = scope(edge_anchor_pem="")
    assert list(found(of=nowhere, gateways=GATEWAYS)) == ["direct"]
    assert found(of=nowhere) == {}


def changed(before: Resources, after: Resources) -> set[tuple[str, str]]:
    return {
        (type_url, name)
        for type_url, named in after.by_type.items()
        for name, resource in named.items()
        if before.by_type[type_url].get(name) != resource
    }


def with_paths(**judged: bool) -> LocalState:
    return replace(
        LOCAL, peers={B: PeerView(reachable=True, paths={E if path == "e" else path: usable for path, usable in judged.items()})}
    )


def test_a_path_that_is_judged_changes_nothing_but_endpoints() -> None:
    before, after = render(SNAPSHOT, with_paths(direct=True, e=True)), render(SNAPSHOT, with_paths(direct=False, e=True))
    assert changed(before, after) == {(ENDPOINTS, f"site|{B}"), (ENDPOINTS, "http|shop/cart")}


def test_a_path_that_is_not_in_use_moves_no_request() -> None:
    before, after = render(SNAPSHOT, with_paths(direct=True, e=True)), render(SNAPSHOT, with_paths(direct=True, e=False))
    assert changed(before, after) == {(ENDPOINTS, f"site|{B}")}


def test_a_path_is_judged_before_its_connections_are_closed_so_that_nothing_dials_it_again() -> None:
    cluster = Cluster.FromString(render(SNAPSHOT, LOCAL).by_type[CLUSTER][f"site|{B}"].value)
    (check,) = cluster.health_checks
    options = HttpProtocolOptions.FromString(cluster.typed_extension_protocol_options[HTTP_OPTIONS].value)
    keepalive = options.explicit_http_config.http2_protocol_options.connection_keepalive
    judged = check.interval.ToTimedelta() + check.unhealthy_threshold.value * check.timeout.ToTimedelta()
    assert judged < keepalive.timeout.ToTimedelta()


@pytest.mark.parametrize(
    ("direct", "reverse", "expected"),
    [(True, False, {0, 2, 3}), (True, True, {0, 2, 3}), (False, True, {1, 2, 3}), (False, False, {2, 3})],
    ids=["direct", "both over one link", "reverse", "neither"],
)
def test_what_another_site_can_serve_as_well_finds_only_usable_paths_that_do_not_fail_together(
    direct: bool, reverse: bool, expected: set[int]
) -> None:
    rendered = render(SNAPSHOT, with_paths(direct=direct, reverse=reverse, e=True))
    cluster = Cluster.FromString(rendered.by_type[CLUSTER][f"site|{B}"].value)
    (selector,) = cluster.lb_subset_config.subset_selectors
    assert set(selector.keys) == set(USABLE)
    assert cluster.lb_subset_config.fallback_policy == Cluster.LbSubsetConfig.ANY_ENDPOINT
    assignment = ClusterLoadAssignment.FromString(rendered.by_type[ENDPOINTS][f"site|{B}"].value)
    endpoints = {locality.priority: endpoint for locality in assignment.endpoints for endpoint in locality.lb_endpoints}
    assert {priority for priority, endpoint in endpoints.items() if asked_for(endpoint.metadata) == USABLE} == expected
    unusable = {priority for priority, usable in enumerate((direct, reverse, True, True)) if not usable}
    assert {priority for priority, endpoint in endpoints.items() if endpoint.health_status == DEGRADED} == unusable


def asked_for(metadata: Metadata) -> dict[str, str]:
    return {key: value.string_value for key, value in metadata.filter_metadata[LB_METADATA].fields.items()}
