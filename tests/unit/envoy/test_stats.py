"""Counters of Envoy's admin interface, and what is reported of them."""

from dataclasses import replace

from agent.envoy.stats import Edge, EdgeKey, Reading, difference, parse

B = "00000002-0000-4000-8000-000000000000"
HTTP = EdgeKey("http", "shop/front", B)
TCP = EdgeKey("tcp", "shop/db", "")
TEXT = f"""\
# TYPE envoy_isthmus_http_requests counter
envoy_isthmus_http_requests{{lb="shop/front",site="{B}",class="2"}} 7
envoy_isthmus_http_requests{{lb="shop/front",site="{B}",class="4"}} 1
envoy_isthmus_http_requests{{lb="shop/front",site="{B}",class="-"}} 2
envoy_isthmus_http_sent{{lb="shop/front",site="{B}"}} 700
envoy_isthmus_http_received{{lb="shop/front",site="{B}"}} 70
# TYPE envoy_server_uptime gauge
envoy_server_uptime{{}} 12
envoy_isthmus_http_ms_bucket{{lb="shop/front",site="{B}",le="0.5"}} 3
envoy_isthmus_http_ms_bucket{{lb="shop/front",site="{B}",le="+Inf"}} 10
envoy_isthmus_http_ms_sum{{lb="shop/front",site="{B}"}} 12.5
envoy_isthmus_http_ms_count{{lb="shop/front",site="{B}"}} 10
envoy_isthmus_tcp_connections{{lb="shop/db",site="-"}} 5
envoy_isthmus_tcp_failed{{lb="shop/db",site="-"}} 2
envoy_isthmus_tcp_sent{{lb="shop/db",site="-"}} 1
"""
READ = Reading(
    uptime_s=12,
    edges={
        HTTP: Edge({"2xx": 7, "4xx": 3}, {"0.5": 3, "inf": 10}, 12.5, 700, 70),
        TCP: Edge({"ok": 3, "failed": 2}, {}, 0, 1, 0),
    },
)


def grown(reading: Reading, *, uptime_s: int, requests: int) -> Reading:
    edge = reading.edges[HTTP]
    latency = {"0.5": edge.latency_ms["0.5"], "inf": edge.latency_ms["inf"] + requests}
    more = replace(edge, requests={**edge.requests, "2xx": edge.requests["2xx"] + requests}, latency_ms=latency)
    return Reading(uptime_s, {**reading.edges, HTTP: more})


def test_what_envoy_prints_is_read() -> None:
    assert parse(TEXT) == READ
    assert parse("") == Reading(0, {})


def test_only_what_grew_is_reported() -> None:
    (edge,) = difference(READ, grown(READ, uptime_s=13, requests=2))
    assert (edge.load_balancer, edge.protocol, edge.destination) == ("shop/front", "http", B)
    assert (edge.requests, edge.latency_ms) == ({"2xx": 2}, {"0.5": 0, "inf": 2})
    assert (edge.bytes_sent, edge.bytes_received, edge.latency_sum_ms) == (0, 0, 0)


def test_nothing_is_reported_of_what_an_earlier_agent_may_have_reported() -> None:
    assert difference(None, READ) == ()


def test_after_a_restart_of_envoy_everything_counts() -> None:
    before = grown(READ, uptime_s=100, requests=50)
    assert [edge.requests for edge in difference(before, READ)] == [{"2xx": 7, "4xx": 3}, {"ok": 3, "failed": 2}]


def test_an_edge_that_envoy_forgot_counts_from_zero() -> None:
    smaller = Reading(13, {HTTP: Edge({"2xx": 1}, {"inf": 1}, 1, 10, 1)})
    (edge,) = difference(READ, smaller)
    assert (edge.requests, edge.bytes_sent) == ({"2xx": 1}, 10)
