"""Requests, connections and bulk throughput of each path, with wrk and curl, all in one run: rounds are interleaved, so that a slow minute hits all."""

import asyncio
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.proxy import find_envoy
from bench import haproxy
from bench.origin import BULK_BYTES
from bench.propagation import Say
from bench.results import Section, median
from lab.api import NAMESPACE
from lab.fabric import MESH, Fabric
from lab.network import can_use_namespaces
from lab.process import environment
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.wait import until

ROUNDS = 3
WRK_S, CONNECTIONS_S = 4, 2
CONNECTIONS = 32
DOMAIN = "bench.test"
NEEDED = ("wrk", "curl", "nginx")
HTTP_PORT, TCP_PORT, HOP_PORT, TWO_HOPS_PORT, PAIR_PORT, PAIR_TUNNEL_PORT, ORIGIN_PORT = 8080, 9000, 9100, 9110, 9200, 9300, 9080
TLS_HOPS_PORT, TLS_TUNNEL_PORT = 9120, 9130
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_HTTP2: dict[str, Any] = {"explicit_http_config": {"http2_protocol_options": {}}}


@dataclass
class Route:
    """One way to the same nginx."""

    label: str
    site: Site
    url: str
    ours: bool = True
    """Whether our own Envoys carry it."""
    requests: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    connections: list[float] = field(default_factory=list)
    """Per second, of one request each."""
    cpu_s: list[float] = field(default_factory=list)
    """Of gateways and IKE daemons at both ends, for a gigabit of bulk."""


async def run(say: Say) -> list[Section]:
    if missing := [tool for tool in NEEDED if not which(tool)]:
        say(f"Skipped: {', '.join(missing)} not installed")
        return []
    ipsec = ("b", "d") if which("charon-systemd") and can_use_namespaces() else ()
    async with Fabric(("a", "b", "c", *ipsec[1:]), edges=("e",), mesh=False, ipsec=ipsec, progress=say) as fabric:
        await _mesh(fabric)
        paths = await _paths(fabric)
        for number in range(1, ROUNDS + 1):
            say(f"Round {number} of {ROUNDS}: {len(paths)} paths, {WRK_S + CONNECTIONS_S} s of requests and one file of 512 MiB each")
            for path in paths:
                await _requests(path)
                await _connections(path)
                await _bulk(path)
        versions = await _version(find_envoy(None))
    return [_section(paths, versions)]


async def _mesh(fabric: Fabric) -> None:
    """Sites a, b and d; c reaches them through the regional edge alone."""
    members = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["ves.io/siteName in (a, b, d)"]}}
    await fabric.api.create("namespace", NAMESPACE, {})
    await fabric.api.create("virtual_site", "all", members, namespace="shared")
    await fabric.api.create("site_mesh_group", "all", MESH)


async def _paths(fabric: Fabric) -> list[Route]:
    """Build everything and wait until each path answers."""
    a, b, c, api = fabric.site("a"), fabric.site("b"), fabric.site("c"), fabric.api
    origin = f"{b.place.underlay}:{ORIGIN_PORT}"
    argv = [sys.executable, "-m", "bench.origin"]
    await b.cluster.deploy("origin", argv)
    await fabric.process("origin", [*argv, "--listen", origin, "--pod", "origin"], b.place, fabric.directory / "origin").start()
    await api.create("origin_pool", "origin", k8s_pool("origin", ["b"]))
    await api.create("http_loadbalancer", "bench", http_loadbalancer(DOMAIN, ["origin"], sorted(fabric.sites), HTTP_PORT))
    await api.create("tcp_loadbalancer", "bench", tcp_loadbalancer(["origin"], sorted(fabric.sites.keys() - {"b"}), TCP_PORT))
    await _plain_hop(fabric, a, (a.place.inside, HOP_PORT), origin)
    await _plain_hop(fabric, a, (a.place.inside, TWO_HOPS_PORT), f"{b.place.underlay}:{HOP_PORT}")
    await _plain_hop(fabric, b, (b.place.underlay, HOP_PORT), origin)
    await _tls_hops(fabric, a, b, origin)
    paths = [
        Route("plain Envoy hop to the remote nginx", a, f"http://{a.place.inside}:{HOP_PORT}", ours=False),
        Route("two plain Envoy hops, one at each site", a, f"http://{a.place.inside}:{TWO_HOPS_PORT}", ours=False),
        Route("two Envoy hops, mutual TLS and HTTP/2 between them", a, f"http://{a.place.inside}:{TLS_HOPS_PORT}", ours=False),
        Route("HTTP load balancer, through the tunnel", a, f"http://{a.place.inside}:{HTTP_PORT}"),
        Route("TCP load balancer, through the tunnel", a, f"http://{a.place.inside}:{TCP_PORT}"),
        Route("HTTP load balancer, through a regional edge", c, f"http://{c.place.inside}:{HTTP_PORT}"),
        Route("TCP load balancer, through a regional edge", c, f"http://{c.place.inside}:{TCP_PORT}"),
        Route("HTTP load balancer, pods of the same site", b, f"http://{b.place.inside}:{HTTP_PORT}"),
    ]
    if fabric.ipsec:
        d = fabric.site("d")
        await until(lambda: _in_ipsec(fabric), "d to reach b by IPsec", within_s=60)
        paths[5:5] = [
            Route("HTTP load balancer, through the tunnel in IPsec", d, f"http://{d.place.inside}:{HTTP_PORT}"),
            Route("TCP load balancer, through the tunnel in IPsec", d, f"http://{d.place.inside}:{TCP_PORT}"),
        ]
    if which("haproxy"):
        await _haproxy_pair(fabric, a, b, origin)
        paths.append(Route("HAProxy pair, mutual TLS and HTTP/2", a, f"http://{a.place.inside}:{PAIR_PORT}", ours=False))
    for path in paths:
        await until(lambda path=path: _answers(path), path.label)  # type: ignore[misc]  # the default binds the loop's variable
    return paths


async def _in_ipsec(fabric: Fabric) -> bool:
    found = await fabric.api.request("GET", "/api/data/namespaces/system/topology/path?from=d&to=b")
    return bool(found["path"] == "ipsec")


async def _plain_hop(fabric: Fabric, site: Site, listen: tuple[str, int], upstream: str) -> None:
    await _envoy(fabric, site, listen[1], _hop(listen, upstream))


async def _tls_hops(fabric: Fabric, a: Site, b: Site, origin: str) -> None:
    """What two Envoys cost that do nothing but encrypt and multiplex what is between them."""
    certificates = fabric.directory / "tls-hops"
    haproxy.certificates(certificates, b.place.underlay)
    near = _hop((a.place.inside, TLS_HOPS_PORT), f"{b.place.underlay}:{TLS_TUNNEL_PORT}")
    far = _hop((b.place.underlay, TLS_TUNNEL_PORT), origin)
    [cluster], [listener] = near["static_resources"]["clusters"], far["static_resources"]["listeners"]
    cluster["transport_socket"] = _tls("Upstream", certificates, "near")
    cluster["typed_extension_protocol_options"] = {HTTP_OPTIONS: {"@type": f"type.googleapis.com/{HTTP_OPTIONS}", **_HTTP2}}
    listener["filter_chains"][0]["transport_socket"] = _tls("Downstream", certificates, "far", require_client_certificate=True)
    await _envoy(fabric, b, TLS_TUNNEL_PORT, far)
    await _envoy(fabric, a, TLS_HOPS_PORT, near)


def _tls(side: str, certificates: Path, name: str, **fields: object) -> dict[str, Any]:
    """Transport socket: TLS 1.3, with certificates of both sides."""
    pair = {"filename": str(certificates / f"{name}.pem")}
    context = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": ["h2"],
        "tls_certificates": [{"certificate_chain": pair, "private_key": pair}],
        "validation_context": {"trusted_ca": {"filename": str(certificates / "ca.pem")}},
    }
    kind = f"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{side}TlsContext"
    return {"name": "tls", "typed_config": {"@type": kind, "common_tls_context": context, **fields}}


async def _envoy(fabric: Fabric, site: Site, port: int, config: dict[str, Any]) -> None:
    directory = fabric.directory / f"hop-{site.name}-{port}"
    directory.mkdir()
    (directory / "envoy.json").write_text(json.dumps(config))
    argv = [str(find_envoy(None)), "--use-dynamic-base-id", "--concurrency", "2", "-l", "warn", "-c", "envoy.json"]
    await fabric.process("envoy", argv, site.place, directory).start()


async def _haproxy_pair(fabric: Fabric, a: Site, b: Site, origin: str) -> None:
    directory = fabric.directory / "haproxy"
    near, far = haproxy.write(directory, f"{a.place.inside}:{PAIR_PORT}", f"{b.place.underlay}:{PAIR_TUNNEL_PORT}", origin)
    for name, conf, site in (("near", near, a), ("far", far, b)):
        await fabric.process(name, ["haproxy", "-db", "-f", str(conf)], site.place, directory).start()


async def _answers(path: Route) -> bool:
    return await _run(path.site, "curl", "-sf", "-m", "5", "-H", f"Host: {DOMAIN}", f"{path.url}/") == "ok\n"


async def _requests(path: Route) -> None:
    said = await _wrk(path, WRK_S, "--latency")
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    assert p99, said
    path.requests.append(_rate(said))
    path.latency_ms.append(float(p99[1]) * {"us": 0.001, "ms": 1, "s": 1000}[p99[2]])


async def _connections(path: Route) -> None:
    path.connections.append(_rate(await _wrk(path, CONNECTIONS_S, "-H", "Connection: close")))


async def _wrk(path: Route, seconds: int, *more: str) -> str:
    said = await _run(
        path.site, "wrk", "-t", "2", "-c", str(CONNECTIONS), "-d", f"{seconds}s", "-H", f"Host: {DOMAIN}", *more, f"{path.url}/"
    )
    if "Requests/sec" not in said or "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{path.label}: {said}")
    return said


def _rate(said: str) -> float:
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert found, said
    return float(found[1])


async def _bulk(path: Route) -> None:
    before = _cpu_s(path)
    said = await _run(
        path.site, "curl", "-sf", "-o", "/dev/null", "-w", "%{speed_download}", "-H", f"Host: {DOMAIN}", "-m", "60", f"{path.url}/bulk"
    )
    path.megabytes.append(float(said) / 1e6)
    path.cpu_s.append((_cpu_s(path) - before) / (BULK_BYTES * 8 / 1e9))


def _cpu_s(path: Route) -> float:
    """Used so far by Envoys and IKE daemons of the path's site and of the one that serves."""
    nodes = [*path.site.nodes, *path.site.fabric.site("b").nodes]
    pids = {node.envoy_pid() for node in nodes}
    if path.site.name in path.site.fabric.ipsec:
        pids |= {node.charon_pid() for node in nodes}
    ticks = 0
    for pid in pids:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def _run(site: Site, *argv: str) -> str:
    """Standard output of a command at a site; empty when it failed."""
    process = await asyncio.create_subprocess_exec(
        *site.place.command(argv), env=environment(Path.cwd()), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return said.decode() if process.returncode == 0 else ""


async def _version(envoy: Path) -> str:
    process = await asyncio.create_subprocess_exec(str(envoy), "--version", stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    found = re.search(r"/(\d+\.\d+\.\d+)/", said.decode())
    return found[1] if found else "?"


def which(tool: str) -> str | None:
    """Where the lab finds a program."""
    return shutil.which(tool, path=environment(Path.cwd())["PATH"])


def _section(paths: list[Route], envoy: str) -> Section:
    hop = paths[0]
    rows: list[tuple[object, ...]] = [
        ("path", "requests/s", "ratio", "p99 ms", "connections/s", "ratio", "bulk MB/s", "ratio", "CPU s/Gbit")
    ]
    rows += [
        (
            path.label,
            *_compared(path.requests, hop.requests),
            median(path.latency_ms),
            *_compared(path.connections, hop.connections),
            *_compared(path.megabytes, hop.megabytes),
            f"{median(path.cpu_s):.2f}" if path.ours else "",
        )
        for path in paths
    ]
    notes = f"""
Medians of {ROUNDS} interleaved rounds on one machine, which also runs the clients and nginx. `wrk -t2 -c{CONNECTIONS}` with keep-alive and an answer of 3 bytes; the same with a new connection
for each request; one download of 512 MiB with curl. Envoy {envoy}; everything that crosses sites is TLS 1.3 with client certificates, except the plain hops, and
from end to end where it crosses a regional edge, too; IPsec comes on top of that, in user space. CPU is that of the Envoys and IKE daemons of both sites. Ratios are to the single plain hop. Aims: HTTP ≥ 0.70, TCP ≥ 1.4, HTTP through an edge ≥ 0.48. Two plain hops in a
row are what an Envoy at either end costs in any case; with TLS between them that is the floor, before anything is authorised, tunnelled or counted. The HAProxy pair is what one would write by hand.
"""
    return Section("Data plane", notes, rows)


def _compared(values: list[float], others: list[float]) -> tuple[float, str]:
    return median(values), f"{median(values) / median(others):.2f}"


def _hop(listen: tuple[str, int], upstream: str) -> dict[str, Any]:
    """One HTTP hop and nothing else."""
    host, port = upstream.rsplit(":", 1)
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hop",
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "origin", "timeout": "60s"}}]}
            ]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}
        ],
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "hop",
                    "address": _address(*listen),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "origin",
                    "type": "STATIC",
                    "load_assignment": {
                        "cluster_name": "origin",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, int(port))}}]}],
                    },
                }
            ],
        }
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
