"""What holds for every tenant, however its objects meet, compete and dangle."""

from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.protocol import items
from agent.protocol.base import content_hash
from agent.protocol.items import TYPES, ItemKind
from controlplane.compile.concern import changed_sites, concerned_sites
from controlplane.compile.edge import public_items, tenant_of
from controlplane.compile.intent import Intent
from controlplane.compile.plan import plan
from controlplane.compile.public_names import covers
from controlplane.compile.site import compile_site, conditions
from controlplane.compile.snapshot import Snapshot, snapshot_of
from controlplane.resources.base import Stored
from tests.unit.compile.intents import id_of, intent_of, observations_of, written
from tests.unit.compile.tenants import EDGES, SITES, changed_tenants, tenants

SITE_IDS = tuple(id_of(name) for name in SITES)
EDGE_IDS = tuple(id_of(name) for name in EDGES)
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # a tenant is as large as it is
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def compiled(intent: Intent) -> dict[str, Snapshot]:
    observations = observations_of(intent)
    return {site_id: compile_site(site_id, intent, observations) for site_id in SITE_IDS}


def bodies(snapshot: Snapshot, kind: ItemKind) -> dict[str, Any]:
    return {key: TYPES[kind].read(item.body) for (of_kind, key), item in snapshot.items.items() if of_kind == kind}


def pools_of(snapshot: Snapshot) -> dict[str, set[str]]:
    """By load balancer with its kind."""
    http = bodies(snapshot, ItemKind.HTTP_LOADBALANCER)
    called = {f"http {key}": {use.pool for route in lb.routes if route.forward for use in route.forward.pools} for key, lb in http.items()}
    tcp = bodies(snapshot, ItemKind.TCP_LOADBALANCER)
    return called | {f"tcp {key}": {use.pool for use in lb.pools} for key, lb in tcp.items()}


@quick
@given(tenants())
def test_every_item_reads_back_under_its_hash_and_in_order(intent: Intent) -> None:
    for snapshot in compiled(intent).values():
        assert list(snapshot.items) == sorted(snapshot.items)
        for (kind, key), item in snapshot.items.items():
            assert (item.kind, item.key, item.hash) == (kind, key, content_hash(item.body))
            assert TYPES[kind].read(item.body).canonical() == item.body
    assert all(condition.message for condition in conditions(intent))


@quick
@given(tenants())
def test_what_an_item_refers_to_is_in_the_snapshot(intent: Intent) -> None:
    for site_id, snapshot in compiled(intent).items():
        pools = bodies(snapshot, ItemKind.ORIGIN_POOL)
        exports = bodies(snapshot, ItemKind.EXPORT)
        called = set[str]().union(*pools_of(snapshot).values())
        assert called | set(exports) == set(pools)
        balancers = {key.partition(" ")[2] for key in pools_of(snapshot)}
        for listener in bodies(snapshot, ItemKind.LISTENER).values():
            assert set(listener.load_balancers) <= balancers
        remote = {
            site for key in called if pools[key].selection != "LOCAL_ONLY" for origin in pools[key].origins for site in origin.sites or ()
        }
        callers = {peer for export in exports.values() for use in export.uses for peer in use.peers}
        assert set(bodies(snapshot, ItemKind.PEER)) == (remote | callers) - {site_id}
        asked = {policy for export in exports.values() for use in export.uses for policy in use.policies or ()}
        for kind in (ItemKind.HTTP_LOADBALANCER, ItemKind.TCP_LOADBALANCER):
            asked |= {policy for balancer in bodies(snapshot, kind).values() for policy in balancer.policies or ()}
        assert asked == set(bodies(snapshot, ItemKind.POLICY))


@quick
@given(tenants())
def test_who_calls_a_pool_is_let_in_where_its_origins_are_and_nobody_else(intent: Intent) -> None:
    snapshots = compiled(intent)
    wanted = {
        (site, load_balancer, key, origin_site)
        for site, snapshot in snapshots.items()
        for load_balancer, called in pools_of(snapshot).items()
        for key in called
        for origin in bodies(snapshot, ItemKind.ORIGIN_POOL)[key].origins
        for origin_site in (origin.sites if origin.sites is not None else (site,))
        if _through_gateway(bodies(snapshot, ItemKind.ORIGIN_POOL)[key], load_balancer, site, origin_site)
    }
    open_to = {
        (peer, f"{use.protocol} {use.load_balancer}", key, site)
        for site, snapshot in snapshots.items()
        for key, export in bodies(snapshot, ItemKind.EXPORT).items()
        for use in export.uses
        for peer in use.peers
    }
    assert open_to == wanted


def _through_gateway(pool: items.OriginPool, load_balancer: str, site: str, origin_site: str) -> bool:
    if site == origin_site:
        return load_balancer.startswith("tcp ")
    return pool.selection != "LOCAL_ONLY"


@quick
@given(tenants(), st.randoms(use_true_random=False))
def test_the_order_in_which_objects_were_read_does_not_matter(intent: Intent, random: Random) -> None:
    objects: list[Stored[Any]] = [stored for of_kind in (*intent.objects.values(), intent.edges) for stored in of_kind.values()]
    random.shuffle(objects)
    assert conditions(intent_of(objects, intent.names)) == conditions(intent)
    for ours, shuffled in zip(compiled(intent).values(), compiled(intent_of(objects, intent.names)).values(), strict=True):
        assert list(ours.items.items()) == list(shuffled.items.items())
        assert ours.manifest == shuffled.manifest


@settings(parent=quick, max_examples=200)
@given(changed_tenants())
def test_a_write_changes_only_sites_that_it_concerns_before_or_after(change: tuple[Intent, Intent, Stored[Any] | None]) -> None:
    before, after, touched = change
    plan(before)
    after = written(before, after)
    concerned = changed = frozenset[str]()
    if touched:
        changed = changed_sites(touched.kind, touched.key, before, after)
        concerned = concerned_sites(touched.kind, touched.key, before) | concerned_sites(touched.kind, touched.key, after)
    old, new = compiled(before), compiled(after)
    assert {site_id for site_id in SITE_IDS if old[site_id].manifest != new[site_id].manifest} <= changed <= concerned
    public = public_items(before, observations_of(before)), public_items(after, observations_of(after))
    assert {edge for edge in EDGE_IDS if public[0].get(edge) != public[1].get(edge)} <= changed


@settings(parent=quick, max_examples=200)
@given(changed_tenants())
def test_what_was_worked_out_of_the_intent_before_makes_no_difference(change: tuple[Intent, Intent, Stored[Any] | None]) -> None:
    before, after, _ = change
    plan(before)
    later = written(before, after)
    assert compiled(later) == compiled(after)
    assert conditions(later) == conditions(after)
    assert public_items(later, observations_of(later)) == public_items(after, observations_of(after))


@quick
@given(tenants())
def test_everything_of_a_tenant_on_an_edge_is_under_its_id_and_complete(intent: Intent) -> None:
    for edge, own in public_items(intent, observations_of(intent)).items():
        snapshot = snapshot_of(edge, own)
        peers = bodies(snapshot, ItemKind.PEER)
        assert all(tenant_of(key) == intent.tenant.id for kind, key in snapshot.items if kind is not ItemKind.PEER)
        assert all(peer.tenant_id == intent.tenant.id for peer in peers.values())
        pools = bodies(snapshot, ItemKind.ORIGIN_POOL)
        assert set[str]().union(*pools_of(snapshot).values()) == set(pools)
        sites = {site for pool in pools.values() if pool.selection != "LOCAL_ONLY" for origin in pool.origins for site in origin.sites}
        assert peers.keys() == {peer.site_id for peer in peers.values()} == sites
        listened = [key for listener in bodies(snapshot, ItemKind.LISTENER).values() for key in listener.load_balancers]
        assert set(listened) == {key.partition(" ")[2] for key in pools_of(snapshot)}
        assert b"secret:" not in b"".join(pool.canonical() for pool in pools.values())
        for balancer in bodies(snapshot, ItemKind.HTTP_LOADBALANCER).values():
            assert all(covers(intent.names, name.removeprefix("*.")) for name in balancer.domains)
