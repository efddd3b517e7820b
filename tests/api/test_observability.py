"""What operators see: graphs, metrics, topology, discovered services, the audit log."""

import asyncio
import json
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI

from agent.protocol.report import (
    DiscoveredService,
    DiscoveryReport,
    EdgeMetrics,
    MetricsReport,
    OriginHealth,
    Report,
    ServicePort,
)
from controlplane.services import telemetry
from tests.api.enrolled import Node, admitted, caught_up
from tests.api.test_delivery import publish, tenant_of
from tests.backend import now

Json = dict[str, Any]
GRAPH = "/api/data/namespaces/shop/graph/service"


def edge(destination: str, load_balancer: str = "shop/cart", **counts: Any) -> EdgeMetrics:
    defaults: Json = {
        "requests": {"2xx": 90, "5xx": 10},
        "latency_ms": {"10": 50, "100": 99, "inf": 100},
        "latency_sum_ms": 1500.0,
        "bytes_sent": 1000,
        "bytes_received": 500,
    }
    return EdgeMetrics(load_balancer=load_balancer, protocol="http", destination=destination, **(defaults | counts))


async def served(made: Node, *edges: EdgeMetrics, sequence: int = 1) -> None:
    await made.control.report(Report(boot_id=made.boot_id, metrics=MetricsReport(sequence=sequence, edges=edges)))


def site_id(made: Node) -> str:
    assert made.credentials
    return made.credentials.site_id


def values(metrics: list[Json]) -> dict[str, float]:
    return {metric["type"]: float(metric["value"]["raw"][0]["value"]) for metric in metrics}


async def test_the_service_graph_tells_rate_errors_and_latency_of_every_edge(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        await publish(user, "a")
        await caught_up(app, tenant_of(a))
        await served(a, edge(site_id(b)), edge(site_id(a), requests={"2xx": 100}))
        start = int(now().timestamp()) - 100
        body = {"start_time": str(start), "end_time": str(start + 200), "group_by": ["VHOST", "SITE"]}
        answer = await user.post(GRAPH, json=body)
        assert answer.status_code == 200, answer.text
        graph = answer.json()["data"]
        edges = {(found["src_id"]["site"], found["dst_id"]["site"]): values(found["data"]["metric"]["data"]) for found in graph["edges"]}
        assert set(edges) == {("a", "a"), ("a", "b")}
        assert edges["a", "b"]["HTTP_REQUEST_RATE"] == pytest.approx(0.5)
        assert edges["a", "b"]["HTTP_ERROR_RATE_5XX"] == pytest.approx(0.05)
        assert edges["a", "b"]["HTTP_RESPONSE_LATENCY"] == pytest.approx(15)
        assert edges["a", "b"]["HTTP_RESPONSE_LATENCY_PERCENTILE_50"] == pytest.approx(10)
        assert edges["a", "b"]["HTTP_RESPONSE_LATENCY_PERCENTILE_99"] == pytest.approx(100)
        destination = next(node for node in graph["nodes"] if node["id"].get("vhost") and node["id"]["site"] == "b")
        assert destination["id"]["vhost"] == "ves-io-http-loadbalancer-cart"
        assert values(destination["data"]["metric"]["downstream"])["HTTP_REQUEST_RATE"] == pytest.approx(0.5)


async def test_the_service_graph_gives_what_is_selected_and_filtered(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a:
        await publish(user, "a")
        await publish(user, "a", "other", "other.test")
        await caught_up(app, tenant_of(a))
        await served(a, edge(site_id(a)), edge(site_id(a), "shop/other"))
        selector = {"edge": {"metric": {"types": ["HTTP_REQUEST_RATE"]}}}
        only = [{"label": "LABEL_VHOST", "op": "EQ", "value": "ves-io-http-loadbalancer-other"}]
        body = {"group_by": ["SERVICE"], "field_selector": selector, "label_filter": only, "step": "60s"}
        (found,) = (await user.post(GRAPH, json=body)).json()["data"]["edges"]
        assert (found["src_id"], found["dst_id"]) == ({"service": "N:public"}, {"service": "S:other"})
        assert set(values(found["data"]["metric"]["data"])) == {"HTTP_REQUEST_RATE"}
        unknown = {"field_selector": {"edge": {"metric": {"types": ["HTTP_REQUEST_RAT"]}}}}
        assert (await user.post(GRAPH, json=unknown)).status_code == 400
        often = {"field_selector": {"edge": {"metric": {"types": ["HTTP_REQUEST_RATE"] * 3}}}}
        (found, *_) = (await user.post(GRAPH, json=often)).json()["data"]["edges"]
        assert [metric["type"] for metric in found["data"]["metric"]["data"]] == ["HTTP_REQUEST_RATE"]
        for many in ({"field_selector": {"edge": {"metric": {"types": ["HTTP_REQUEST_RATE"] * 500}}}}, {"group_by": ["SITE"] * 500}):
            assert (await user.post(GRAPH, json=many)).status_code == 400
        everywhere = await user.post("/api/data/namespaces/system/graph/all_ns_service", json={"group_by": ["VHOST"]})
        assert len(everywhere.json()["data"]["edges"]) == 2
        elsewhere = await user.post("/api/data/namespaces/default/graph/service", json={})
        assert elsewhere.json()["data"] == {"nodes": [], "edges": []}


IMPOSSIBLE_TIMES = (
    {"start_time": "2", "end_time": "1"},
    {"end_time": "0001-01-01T00:00:00"},
    {"end_time": "9999-12-31T23:59:59-12:00"},
    {"step": "0s"},
    {"step": "soon"},
    {"start_time": "soon"},
)


@pytest.mark.parametrize("body", IMPOSSIBLE_TIMES)
async def test_a_graph_of_an_impossible_time_is_refused(user: httpx.AsyncClient, body: Json) -> None:
    assert (await user.post(GRAPH, json=body)).status_code == 400


async def test_each_report_of_metrics_counts_once_and_sums_are_what_prometheus_reads(
    app: FastAPI, user: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    async with admitted(app, user, "a") as a:
        await publish(user, "a")
        await caught_up(app, tenant_of(a))
        for sequence in (1, 1, 2):
            await served(a, edge(site_id(a)), sequence=sequence)
        await served(a, edge(site_id(a)), sequence=1)
        await served(a, edge("made-up"), edge(site_id(a), "shop/made-up"), sequence=3)
        tenant = (await app.state.services.delivery.cache(UUID(tenant_of(a)))).view.intent.tenant.name
        lines = [line for line in (await operator.get("/metrics")).text.splitlines() if f'tenant="{tenant}"' in line]
        labels = f'destination_site="a",loadbalancer="cart",namespace="shop",source_site="a",tenant="{tenant}"'
        assert {line.split("{")[0]: line.rsplit(" ", 1)[1] for line in lines if "bytes" in line} == {
            "isthmus_loadbalancer_sent_bytes_total": "2000.0",
            "isthmus_loadbalancer_received_bytes_total": "1000.0",
        }
        assert f'isthmus_loadbalancer_requests_total{{class="5xx",{labels}}} 20.0' in lines
        buckets = [line for line in lines if "latency_seconds_bucket" in line]
        assert [line.rsplit(" ", 1)[1] for line in buckets] == ["100.0", "198.0", "200.0"]
        assert any('le="0.01"' in line for line in buckets)
        assert any("latency_seconds_sum" in line and line.endswith(" 3.0") for line in lines)


async def test_a_graph_of_too_much_is_refused_and_one_of_less_is_not(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "MOST_ROLLUPS", 1)
    async with admitted(app, user, "a") as a:
        await publish(user, "a")
        await publish(user, "a", "till", "till.test")
        await caught_up(app, tenant_of(a))
        await served(a, edge(site_id(a)), edge(site_id(a), "shop/till"))
        answer = await user.post(GRAPH, json={})
        assert (answer.status_code, "shorter" in answer.json()["message"]) == (400, True)
        selected = {"label_filter": [{"label": "LABEL_VHOST", "op": "EQ", "value": "ves-io-http-loadbalancer-till"}]}
        assert (await user.post(GRAPH, json=selected)).status_code == 200


async def test_only_the_operator_sees_the_metrics_of_tenants(
    app: FastAPI, user: httpx.AsyncClient, operator: httpx.AsyncClient, anonymous: httpx.AsyncClient
) -> None:
    async with admitted(app, user, "a") as a:
        await publish(user, "a")
        await served(a, edge(site_id(a)))
    for client, sees in ((anonymous, False), (user, False), (operator, True)):
        answer = await client.get("/metrics")
        assert ("isthmus_http_requests_total" in answer.text, "isthmus_loadbalancer" in answer.text) == (True, sees)
    assert (await anonymous.get("/metrics", headers={"Authorization": "Bearer nobody"})).status_code == 401


async def test_reports_of_one_node_that_overlap_do_not_disturb_each_other(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a:
        await a.manifest()
        reports = (Report(boot_id=a.boot_id, origins=(OriginHealth(pool="shop/cart", healthy=n, total=9),)) for n in range(8))
        await asyncio.gather(*(a.control.report(report) for report in reports))


async def test_what_a_node_makes_up_does_not_reach_prometheus(app: FastAPI, user: httpx.AsyncClient, operator: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a:
        await publish(user, "a")
        await caught_up(app, tenant_of(a))
        await served(a, edge(site_id(a), requests={"2xx": 1, "evil": 1}, latency_ms={"soon": 1, "1.8e+06": 1, "inf": 1}))
        lines = [line for line in (await operator.get("/metrics")).text.splitlines() if 'source_site="a"' in line]
        assert lines
        assert not any("evil" in line or "soon" in line for line in lines)
        assert (await user.post(GRAPH, json={})).status_code == 200


async def test_discovered_services_are_listed_filtered_and_paged(
    app: FastAPI, user: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    path = "/api/discovery/namespaces/shop/discovered_services"
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        found = tuple(
            DiscoveredService(
                name=name, namespace="bank", labels={"app": name}, ports=(ServicePort(port=80, endpoints=("10.1.0.1:8080",)),), endpoints=2
            )
            for name in ("api", "ledger", "web")
        )
        await a.control.report(
            Report(boot_id=a.boot_id, discoveries=(DiscoveryReport(discovery="in-cluster", connected=True, services=found),))
        )
        elsewhere = found[0].model_copy(update={"cluster_id": "east", "delivery": "none", "reason": "it is headless"})
        await b.control.report(
            Report(boot_id=b.boot_id, discoveries=(DiscoveryReport(discovery="in-cluster", connected=True, services=(elsewhere,)),))
        )
        await caught_up(app, tenant_of(a))
        every = (await user.get(path)).json()["items"]
        assert len(every) == 4
        at_a = (await user.get(path, params={"site": "a", "label_filter": "app in (api, web)"})).json()["items"]
        assert [item["get_spec"]["k8s_service"]["service_name"] for item in at_a] == ["api.bank", "web.bank"]
        apis = (await user.get(path, params={"service": "api", "service_namespace": "bank"})).json()["items"]
        assert {item["get_spec"]["k8s_service"]["service_name"] for item in apis} == {"api.bank", "api.bank:east"}
        (east,) = (await user.get(path, params={"cluster_id": "east"})).json()["items"]
        shown = east["get_spec"]["k8s_service"]
        assert (shown["delivery"], shown["delivery_reason"]) == ("none", "it is headless")
        assert shown["ports"][0]["endpoints"] == ["10.1.0.1:8080"]
        assert len((await user.get(path, params={"cluster_id": ""})).json()["items"]) == 3
        assert (await user.get(path, params={"service_namespace": "shop"})).json()["items"] == []
        first = (await user.get(path, params={"limit": 3})).json()
        rest = (await user.get(path, params={"limit": 3, "continue": first["continue"]})).json()
        assert ([*first["items"], *rest["items"]], rest["continue"]) == (every, "")
        one = (await user.get(f"{path}/{every[0]['name']}")).json()
        assert one["spec"] == every[0]["get_spec"]
        assert (await user.get(f"{path}/none")).status_code == 404
        assert (await stranger.get(path)).json()["items"] == []


async def test_what_one_node_of_a_site_tells_of_services_stays_while_the_others_leave_it_to_that_one(
    app: FastAPI, user: httpx.AsyncClient
) -> None:
    path = "/api/discovery/namespaces/shop/discovered_services"
    found = DiscoveryReport(discovery="in-cluster", connected=True, services=(DiscoveredService(name="api", namespace="bank"),))
    async with admitted(app, user, "a") as leader, admitted(app, user, "a", "node-2") as other:
        await leader.report(discoveries=(found,))
        await other.report(discoveries=(found.model_copy(update={"services": None}),))
        await caught_up(app, tenant_of(leader))
        (item,) = (await user.get(path)).json()["items"]
        assert item["get_spec"]["k8s_service"]["service_name"] == "api.bank"
        await leader.report(discoveries=(found.model_copy(update={"services": None}),))
        await other.report(discoveries=(found.model_copy(update={"services": ()}),))
        assert (await user.get(path)).json()["items"] == []


async def test_services_of_a_discovery_that_is_not_there_are_not_shown(app: FastAPI, user: httpx.AsyncClient) -> None:
    path = "/api/discovery/namespaces/shop/discovered_services"
    async with admitted(app, user, "a") as made:
        services = (DiscoveredService(name="api", namespace="bank"),)
        found = (DiscoveryReport(discovery=of, connected=True, services=services) for of in ("in-cluster", "shop/gone", "nonsense"))
        await made.report(discoveries=tuple(found))
        await caught_up(app, tenant_of(made))
        for namespace in ("shop", "system"):
            answer = await user.get(path.replace("shop", namespace))
            assert [item["get_spec"]["k8s_service"]["service_name"] for item in answer.json()["items"]] == ["api.bank"]


async def test_the_audit_log_is_searched_with_the_query_language(user: httpx.AsyncClient) -> None:
    path = "/api/data/namespaces/system/audit_logs"
    await user.post("/api/register/namespaces/system/tokens", json={"metadata": {"name": "t"}, "spec": {}})
    answer = (await user.post(path, json={"query": '{rpc="ves.io.schema.token.API.Create", user!="nobody"}'})).json()
    (entry,) = (json.loads(line) for line in answer["logs"])
    assert (entry["name"], entry["namespace"], answer["total_hits"]) == ("t", "system", "1")
    everything = (await user.post(path, json={})).json()
    assert int(everything["total_hits"]) > 1
    first = (await user.post(path, json={"limit": 1, "sort": "ASCENDING"})).json()
    assert (len(first["logs"]), first["total_hits"]) == (1, everything["total_hits"])
    assert (await user.post(path, json={"query": '{name="a \\"b\\""}'})).json()["logs"] == []
    assert (await user.post("/api/data/namespaces/shop/audit_logs", json={})).json()["logs"] == []
    assert (await user.post(path, json={"query": "{user~}"})).status_code == 400
    assert (await user.post(path, json={"query": '{colour="red"}'})).status_code == 400
