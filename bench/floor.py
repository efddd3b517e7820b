"""The least that a change can cost on this machine: commit, wake-up by NOTIFY, one HTTPS round trip, one xDS ACK, each measured alone."""

import asyncio
import json
from dataclasses import dataclass

import psycopg
from envoy.config.cluster.v3 import cluster_pb2
from google.protobuf import duration_pb2

from agent.envoy.resources import CLUSTER, DELIVERY_ORDER, Resources, resource
from agent.proxy import find_envoy
from agent.xds import XdsServer
from bench.results import median
from lab.fabric import Fabric

ROUNDS = 100


@dataclass(frozen=True)
class Floor:
    """Medians in milliseconds."""

    commit_and_notify: float
    round_trip: float
    ack: float

    @property
    def sum(self) -> float:
        return self.commit_and_notify + self.round_trip + self.ack


async def measure(fabric: Fabric) -> Floor:
    return Floor(await _commit_and_notify(fabric), await _round_trip(fabric), await _ack(fabric))


async def _commit_and_notify(fabric: Fabric) -> float:
    """One row and one NOTIFY in a transaction, until a listening session has it."""
    address = f"host={fabric.directory / 'state' / 'postgres'} user=postgres dbname=postgres"
    times = []
    loop = asyncio.get_running_loop()
    async with (
        await psycopg.AsyncConnection.connect(address) as writer,
        await psycopg.AsyncConnection.connect(address, autocommit=True) as listener,
    ):
        await writer.execute("CREATE SCHEMA bench")
        await writer.execute("CREATE TABLE bench.floor (body text)")
        await writer.commit()
        await listener.execute("LISTEN bench_floor")
        for number in range(ROUNDS):
            start = loop.time()
            await writer.execute("INSERT INTO bench.floor VALUES (%s)", ["x" * 1000])
            await writer.execute("SELECT pg_notify('bench_floor', %s)", [str(number)])
            await writer.commit()
            [_ async for _ in listener.notifies(stop_after=1)]
            times.append(1000 * (loop.time() - start))
        await writer.execute("DROP SCHEMA bench CASCADE")
    return median(times)


async def _round_trip(fabric: Fabric) -> float:
    times = []
    loop = asyncio.get_running_loop()
    for _ in range(ROUNDS):
        start = loop.time()
        (await fabric.api.client.get("/healthz")).raise_for_status()
        times.append(1000 * (loop.time() - start))
    return median(times)


async def _ack(fabric: Fabric) -> float:
    """One cluster, changed in an Envoy that has nothing else."""
    directory = fabric.directory / "floor"
    directory.mkdir()
    (directory / "envoy.json").write_text(json.dumps(_BOOTSTRAP))
    argv = [str(find_envoy(None)), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warn", "-c", "envoy.json"]
    envoy = fabric.process("envoy", argv, fabric.network.home, directory)
    connected = asyncio.Event()
    server = XdsServer(directory / "xds.sock", connected.set)
    await server.start()
    await envoy.start()
    try:
        await asyncio.wait_for(connected.wait(), 10)
        return median([await _applied_ms(server, number) for number in range(ROUNDS + 1)][1:])
    finally:
        await envoy.stop()
        await server.stop()


async def _applied_ms(server: XdsServer, number: int) -> float:
    cluster = resource(cluster_pb2.Cluster(name="floor", connect_timeout=duration_pb2.Duration(seconds=1 + number)), ())
    loop = asyncio.get_running_loop()
    start = loop.time()
    outcome = await server.apply(Resources({kind: {"floor": cluster} if kind == CLUSTER else {} for kind in DELIVERY_ORDER}))
    if not outcome.accepted:
        raise RuntimeError(f"Envoy did not accept a cluster: {outcome}")
    return 1000 * (loop.time() - start)


_BOOTSTRAP = {
    "node": {"id": "floor", "cluster": "floor"},
    "dynamic_resources": {
        "ads_config": {
            "api_type": "DELTA_GRPC",
            "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}],
        },
        "cds_config": {"ads": {}, "resource_api_version": "V3"},
        "lds_config": {"ads": {}, "resource_api_version": "V3"},
    },
    "static_resources": {
        "clusters": [
            {
                "name": "xds",
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": {"http2_protocol_options": {}},
                    }
                },
                "load_assignment": {
                    "cluster_name": "xds",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": "xds.sock"}}}}]}],
                },
            }
        ]
    },
}
