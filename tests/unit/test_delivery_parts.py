"""Small decisions of delivery and liveness."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from controlplane.services.caches import Recent
from controlplane.services.heartbeats import is_fresh, lease, pace_s
from controlplane.services.topology import together
from controlplane.store.nodes import NodeStatus

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


def test_who_was_never_heard_of_is_not_fresh() -> None:
    assert not is_fresh(None, 1, NOW)


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
