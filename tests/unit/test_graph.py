"""Percentiles and groups of the service graph."""

from datetime import UTC, datetime, timedelta

import pytest

from controlplane.services.graph import Span, graph, percentile
from controlplane.store.telemetry import Rollup

START = datetime(2030, 1, 1, tzinfo=UTC)
NAMES = {"1": "a", "2": "b"}


def rollup(seconds: int = 0, source: str = "1", destination: str = "2", load_balancer: str = "shop/cart", protocol: str = "http") -> Rollup:
    return Rollup(START + timedelta(seconds=seconds), load_balancer, protocol, source, destination, requests={"2xx": 3})


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, 5.0), (0.5, 10.0), (0.75, 55.0), (1.0, 100.0)],
)
def test_percentiles_are_linear_inside_a_bucket(share: float, expected: float) -> None:
    assert percentile({"inf": 100, "100": 100, "10": 50}, share) == pytest.approx(expected)


def test_a_percentile_beyond_the_last_bound_is_that_bound() -> None:
    assert percentile({"10": 50, "inf": 100}, 0.99) == 10.0


@pytest.mark.parametrize("histogram", [{}, {"10": 0, "inf": 0}])
def test_without_requests_there_is_no_percentile(histogram: dict[str, int]) -> None:
    assert percentile(histogram, 0.5) is None


def test_rollups_go_to_the_step_in_which_they_begin() -> None:
    span = Span(START, START + timedelta(seconds=60), timedelta(seconds=30))
    made = graph([rollup(0), rollup(20), rollup(30)], span, ("SITE",), NAMES)
    ((_, series),) = made.edges.items()
    assert {step: sums.total for step, sums in series.items()} == {START: 6, START + timedelta(seconds=30): 3}


def test_groups_decide_what_is_one_node() -> None:
    span = Span(START, START + timedelta(seconds=10), timedelta(seconds=10))
    rollups = [rollup(), rollup(load_balancer="shop/other"), rollup(source="2"), rollup(destination="gone")]
    by_site = graph(rollups, span, ("SITE",), NAMES)
    assert by_site.nodes == [(("site", "a"),), (("site", "b"),), (("site", "gone"),)]
    assert set(by_site.edges) == {
        ((("site", "a"),), (("site", "b"),)),
        ((("site", "b"),), (("site", "b"),)),
        ((("site", "a"),), (("site", "gone"),)),
    }
    by_balancer = graph(rollups, span, ("NAMESPACE", "VHOST"), NAMES)
    assert {dict(destination)["vhost"] for _, destination in by_balancer.edges} == {
        "ves-io-http-loadbalancer-cart",
        "ves-io-http-loadbalancer-other",
    }
    assert len(graph(rollups, span, ("NONE",), NAMES).edges) == 1


def test_connections_are_not_requests() -> None:
    span = Span(START, START + timedelta(seconds=10), timedelta(seconds=10))
    tcp = Rollup(START, "shop/db", "tcp", "1", "2", requests={"ok": 2, "failed": 1})
    ((_, series),) = graph([tcp], span, ("VHOST",), NAMES).edges.items()
    assert (series[START].total, dict(series[START].connections)) == (0, {"ok": 2, "failed": 1})
