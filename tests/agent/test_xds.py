"""The xDS server against a real Envoy: its verdict is the only one that counts."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401  # ParseDict finds types that were imported
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2  # noqa: F401
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from agent.envoy.resources import CLUSTER, DELIVERY_ORDER, ENDPOINTS, LISTENER, ROUTES, Resource, Resources
from agent.protocol.base import content_hash
from agent.proxy import Proxy
from agent.xds import XdsServer
from tests.agent.real_envoy import until

ADS = {"ads": {}, "resource_api_version": "V3"}


def resource(type_url: str, message: Message, name: str) -> Resource:
    value = message.SerializeToString(deterministic=True)
    return Resource(type_url, name, content_hash(value), value, ())


def cluster(name: str, timeout: str = "1s") -> Resource:
    body = {"name": name, "type": "EDS", "connect_timeout": timeout, "eds_cluster_config": {"eds_config": ADS}}
    return resource(CLUSTER, ParseDict(body, cluster_pb2.Cluster()), name)


def poisoned(name: str) -> Resource:
    """What Envoy refuses: its timeout must be positive."""
    return cluster(name, timeout="0s")


def endpoints(name: str, *ports: int) -> Resource:
    addresses = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports]
    body = {"cluster_name": name, "endpoints": [{"lb_endpoints": addresses}]}
    return resource(ENDPOINTS, ParseDict(body, endpoint_pb2.ClusterLoadAssignment()), name)


def listener(name: str, routes: str, run_dir: Path) -> Resource:
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "rds": {"route_config_name": routes, "config_source": ADS},
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    body = {
        "name": name,
        "address": {"pipe": {"path": str(run_dir / f"{name}.sock")}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return resource(LISTENER, ParseDict(body, listener_pb2.Listener()), name)


def routes(name: str, to: str) -> Resource:
    host = {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": to}}]}
    return resource(ROUTES, ParseDict({"name": name, "virtual_hosts": [host]}, route_pb2.RouteConfiguration()), name)


def resources(*members: Resource) -> Resources:
    def of(type_url: str) -> Iterable[Resource]:
        return sorted((member for member in members if member.type_url == type_url), key=lambda member: member.name)

    return Resources({type_url: {member.name: member for member in of(type_url)} for type_url in DELIVERY_ORDER})


@pytest.fixture
async def server(run_dir: Path) -> AsyncIterator[XdsServer]:
    server = XdsServer(run_dir / "xds.sock", lambda: None, linger_s=0)
    await server.start()
    yield server
    await server.stop()


async def accepted(server: XdsServer, wanted: Resources) -> bool:
    return (await server.apply(wanted)).accepted


async def clusters_of(envoy: Proxy) -> set[str]:
    text = await envoy.admin.get("/clusters")
    return {line.partition("::")[0] for line in text.splitlines()} - {"xds"}


def whole(run_dir: Path, port: int = 1) -> Resources:
    return resources(cluster("a"), endpoints("a", port), listener("l", "r", run_dir), routes("r", "a"))


async def test_envoy_accepts_everything_and_serves(server: XdsServer, envoy: Proxy, run_dir: Path) -> None:
    await until(lambda: accepted(server, whole(run_dir)))
    assert await envoy.admin.ready()
    assert await envoy.admin.warming() == 0
    assert await clusters_of(envoy) == {"a"}


async def test_the_socket_is_for_its_owner_alone(server: XdsServer, run_dir: Path) -> None:
    assert (run_dir / "xds.sock").stat().st_mode & 0o777 == 0o600


async def test_an_empty_config_makes_envoy_ready(server: XdsServer, envoy: Proxy) -> None:
    await until(lambda: accepted(server, resources()))
    assert await envoy.admin.ready()


async def test_without_an_envoy_nothing_is_claimed(server: XdsServer, run_dir: Path) -> None:
    outcome = await server.apply(whole(run_dir))
    assert not outcome.complete
    assert not outcome.accepted


async def test_only_differences_are_sent(server: XdsServer, envoy: Proxy, run_dir: Path) -> None:
    await until(lambda: accepted(server, whole(run_dir)))
    before = await updates(envoy)
    assert await accepted(server, whole(run_dir, port=2))
    assert await updates(envoy) == {**before, "cluster.a.update_success": before["cluster.a.update_success"] + 1}
    assert "127.0.0.1:2" in await envoy.admin.get("/clusters")


async def updates(envoy: Proxy) -> dict[str, int]:
    text = await envoy.admin.get("/stats?filter=(^cluster_manager.cds|^listener_manager.lds|^http.l.rds.*|^cluster.a).update_success$")
    return {name: int(value) for name, _, value in (line.rpartition(": ") for line in text.splitlines())}


def changed(run_dir: Path) -> Resources:
    return resources(cluster("a", "2s"), endpoints("a", 1), listener("l", "r", run_dir), routes("r", "a"))


async def test_a_changed_cluster_is_in_use_at_once(server: XdsServer, envoy: Proxy, run_dir: Path) -> None:
    """Envoy waits for its endpoints to come again, and would do so for 15 s."""
    await until(lambda: accepted(server, whole(run_dir)))
    async with asyncio.timeout(5):
        assert await accepted(server, changed(run_dir))
    assert await envoy.admin.warming() == 0
    assert "127.0.0.1:1" in await envoy.admin.get("/clusters")


async def test_a_cluster_that_changed_while_there_was_no_server_is_in_use_at_once(server: XdsServer, envoy: Proxy, run_dir: Path) -> None:
    await until(lambda: accepted(server, whole(run_dir)))
    await server.stop()
    connected = asyncio.Event()
    successor = XdsServer(run_dir / "xds.sock", connected.set)
    await successor.start()
    try:
        await connected.wait()
        async with asyncio.timeout(5):
            assert await accepted(successor, changed(run_dir))
        assert await envoy.admin.warming() == 0
    finally:
        await successor.stop()


async def test_what_is_gone_is_removed(server: XdsServer, envoy: Proxy, run_dir: Path) -> None:
    await until(lambda: accepted(server, whole(run_dir)))
    assert await accepted(server, resources(cluster("b"), endpoints("b", 1)))
    assert await clusters_of(envoy) == {"b"}
    assert await envoy.admin.get("/listeners") == ""


async def test_a_cluster_stays_for_requests_that_still_know_it_and_goes_later(run_dir: Path, envoy: Proxy) -> None:
    """Clusters that come back meanwhile stay for good."""
    server = XdsServer(run_dir / "xds.sock", lambda: None, linger_s=0.5)
    await server.start()
    both = resources(cluster("a"), endpoints("a", 1), cluster("b"), endpoints("b", 1))
    try:
        await until(lambda: accepted(server, both))
        assert await accepted(server, resources())
        assert await clusters_of(envoy) == {"a", "b"}
        assert await accepted(server, resources(cluster("b"), endpoints("b", 1)))
        await until(lambda: clusters_are(envoy, {"b"}))
        assert await accepted(server, both)
        assert await clusters_of(envoy) == {"a", "b"}
    finally:
        await server.stop()


async def clusters_are(envoy: Proxy, names: set[str]) -> bool:
    return await clusters_of(envoy) == names


async def test_a_refusal_names_type_and_reason_and_the_next_apply_heals(server: XdsServer, envoy: Proxy) -> None:
    await until(lambda: accepted(server, resources(cluster("a"), endpoints("a", 1))))
    outcome = await server.apply(resources(cluster("a", "2s"), endpoints("a", 1), poisoned("bad"), cluster("new")))
    assert outcome.complete
    assert [nack.type_url for nack in outcome.nacks] == [CLUSTER]
    assert set(outcome.nacks[0].names) == {"a", "bad", "new"}
    assert "connect_timeout" in outcome.nacks[0].message.lower() or "ConnectTimeout" in outcome.nacks[0].message
    assert await accepted(server, resources(cluster("a"), endpoints("a", 1)))
    assert await clusters_of(envoy) == {"a"}


async def test_many_resources_arrive_in_bounded_responses(server: XdsServer, envoy: Proxy) -> None:
    names = [f"c{index:04}" for index in range(1500)]
    wide = range(1, 20)
    wanted = resources(*(cluster(name) for name in names), *(endpoints(name, *wide) for name in names))
    await until(lambda: accepted(server, wanted))
    assert await clusters_of(envoy) == set(names)


async def test_a_new_server_sends_a_running_envoy_only_what_it_lacks(server: XdsServer, envoy: Proxy, run_dir: Path) -> None:
    await until(lambda: accepted(server, whole(run_dir)))
    before = await updates(envoy)
    await server.stop()
    successor = XdsServer(run_dir / "xds.sock", lambda: None, linger_s=0)
    await successor.start()
    try:
        await until(lambda: accepted(successor, whole(run_dir)))
        assert (await updates(envoy))["cluster.a.update_success"] == before["cluster.a.update_success"]
        assert await accepted(successor, resources())
        assert await clusters_of(envoy) == set()
    finally:
        await successor.stop()
