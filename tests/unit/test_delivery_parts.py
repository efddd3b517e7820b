"""Small decisions of delivery and liveness."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from controlplane.compile.plan import Plan
from controlplane.compile.snapshot import snapshot_of
from controlplane.services.caches import OnEdges, Recent, TenantCache
from controlplane.services.heartbeats import is_fresh, lease, pace_s
from controlplane.services.topology import Observed, groups, together
from controlplane.services.view import Fleet, View
from controlplane.services.wanted import Wanted
from controlplane.store.nodes import NodeStatus
from tests.unit.compile.intents import full_mesh, intent, site, virtual_site

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def test_recent_values_go_by_weight_and_the_longest_unused_first() -> None:
    recent: Recent[str, str] = Recent(10, len)
    recent.put("a", "xxxx")
    recent.put("b", "xxxx")
    assert recent.get("a") == "xxxx"
    recent.put("c", "xxxx")
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == ("xxxx", None, "xxxx")


def test_a_value_that_is_too_heavy_is_not_kept() -> None:
    recent: Recent[str, str] = Recent(3, len)
    recent.put("a", "xxxx")
    assert recent.get("a") is None


@pytest.mark.parametrize(("fleet", "pace"), [(0, 3.0), (450, 3.0), (3000, 20.0), (100_000, 30.0)])
def test_the_pace_grows_with_the_fleet(fleet: int, pace: float) -> None:
    assert pace_s(fleet) == pace
    assert lease(fleet) == timedelta(seconds=3 * pace)


@pytest.mark.parametrize(("age_s", "fresh"), [(0, True), (9, True), (9.1, False)])
def test_a_lease_is_three_paces(age_s: float, fresh: bool) -> None:
    heard_at = NOW - timedelta(seconds=age_s)
    status = NodeStatus(uuid4(), "boot", 1, heard_at, None, 0, [], "live", [], 0.0, "")
    assert is_fresh(status, 1, NOW) is fresh


def cache_at(revision: int, site_id: str) -> TenantCache:
    """Of a tenant whose site has what it should."""
    cache = TenantCache(uuid4(), View(revision, intent(), Fleet({})), 0.0, 0.0)
    cache.publish(site_id, snapshot_of(site_id, ()), revision)
    return cache


def test_a_snapshot_holds_up_to_the_revision_before_the_first_change_that_it_lacks() -> None:
    cache = cache_at(3, "a")
    assert cache.published["a"].held_until is None
    for revision in (7, 9):
        cache.outdate({"a", "b"})
        cache.view = replace(cache.view, revision=revision)
    assert cache.published["a"].held_until == 3


def test_a_snapshot_that_was_outdated_while_it_was_compiled_holds_up_to_its_own_revision() -> None:
    cache = cache_at(3, "a")
    cache.outdate({"a"})
    cache.publish("a", snapshot_of("a", ()), 2)
    assert cache.published["a"].held_until == 2
    cache.stale.clear()
    cache.publish("a", snapshot_of("a", ()), 3)
    assert cache.published["a"].held_until is None


@pytest.mark.parametrize(
    ("share_at", "edge_outdated", "compiled"), [(5, False, True), (6, False, True), (4, False, False), (6, True, False)]
)
def test_on_an_edge_a_change_is_compiled_if_both_the_tenants_part_and_the_edge_are(
    share_at: int, edge_outdated: bool, compiled: bool
) -> None:
    operators = cache_at(100, "edge")
    if edge_outdated:
        operators.outdate({"edge"})
    told = OnEdges(uuid4(), share_at, operators, operators.published)
    assert Wanted(frozenset(), 5, told.of("edge", 5)).compiled is compiled


def test_who_was_never_heard_of_is_not_fresh() -> None:
    assert not is_fresh(None, 1, NOW)


def test_what_a_site_talks_to_is_worked_out_once_however_many_pairs_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [f"s{number}" for number in range(6)]
    made = intent(*(site(name, {"k": "1"}) for name in sites), virtual_site("all", "k"), full_mesh("mesh", "all"))
    asked, peers = [], Plan.peers

    def count(plan: Plan, site_id: str) -> frozenset[str]:
        asked.append(site_id)
        return peers(plan, site_id)

    monkeypatch.setattr(Plan, "peers", count)
    (group,) = groups(Observed(View(1, made, Fleet({})), (), {}, NOW))
    assert len(group.pairs) == 15
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    ("links", "status"),
    [
        ([], "UNKNOWN"),
        (["UNKNOWN", "UP"], "UP"),
        (["UP", "DOWN"], "DEGRADED"),
        (["DOWN", "DOWN", "UNKNOWN"], "DOWN"),
    ],
)
def test_links_between_two_sites_are_summed_up(links: list[str], status: str) -> None:
    assert together(f"LINK_STATUS_{link}" for link in links) == f"LINK_STATUS_{status}"
