"""Requests per second and bulk throughput of each path, with wrk and curl, all in one run: rounds are interleaved, so that a slow minute hits all."""

import asyncio
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.proxy import find_envoy
from bench import haproxy
from bench.propagation import Say
from bench.results import Section, median
from lab.fabric import Fabric
from lab.process import environment
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.wait import until

ROUNDS = 3
WRK_S = 6
CONNECTIONS = 32
DOMAIN = "bench.test"
NEEDED = ("wrk", "curl", "nginx")
HTTP_PORT, TCP_PORT, HOP_PORT, PAIR_PORT, PAIR_TUNNEL_PORT, ORIGIN_PORT = 8080, 9000, 9100, 9200, 9300, 9080


@dataclass
class Route:
    """One way to the same nginx."""

    label: str
    site: Site
    url: str
    requests: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)


async def run(say: Say) -> list[Section]:
    if missing := [tool for tool in NEEDED if not _which(tool)]:
        say(f"Skipped: {', '.join(missing)} not installed")
        return []
    async with Fabric(("a", "b"), progress=say) as fabric:
        paths = await _paths(fabric)
        for number in range(1, ROUNDS + 1):
            say(f"Round {number} of {ROUNDS}: {len(paths)} paths, {WRK_S} s of requests and one file of 512 MiB each")
            for path in paths:
                await _requests(path)
                await _bulk(path)
        versions = await _version(find_envoy(None))
    return [_section(paths, versions)]


async def _paths(fabric: Fabric) -> list[Route]:
    """Build everything and wait until each path answers."""
    a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
    origin = f"{b.place.underlay}:{ORIGIN_PORT}"
    argv = [sys.executable, "-m", "bench.origin"]
    await b.cluster.deploy("origin", argv)
    await fabric.process("origin", [*argv, "--listen", origin, "--pod", "origin"], b.place, fabric.directory / "origin").start()
    await api.create("origin_pool", "origin", k8s_pool("origin", ["b"]))
    await api.create("http_loadbalancer", "bench", http_loadbalancer(DOMAIN, ["origin"], ["a", "b"], HTTP_PORT))
    await api.create("tcp_loadbalancer", "bench", tcp_loadbalancer(["origin"], ["a"], TCP_PORT))
    await _plain_hop(fabric, a, origin)
    paths = [
        Route("plain Envoy hop to the remote nginx", a, f"http://{a.place.inside}:{HOP_PORT}"),
        Route("HTTP load balancer, through the tunnel", a, f"http://{a.place.inside}:{HTTP_PORT}"),
        Route("TCP load balancer, through the tunnel", a, f"http://{a.place.inside}:{TCP_PORT}"),
        Route("HTTP load balancer, pods of the same site", b, f"http://{b.place.inside}:{HTTP_PORT}"),
    ]
    if _which("haproxy"):
        await _haproxy_pair(fabric, a, b, origin)
        paths.append(Route("HAProxy pair, mutual TLS and HTTP/2", a, f"http://{a.place.inside}:{PAIR_PORT}"))
    for path in paths:
        await until(lambda path=path: _answers(path), path.label)  # type: ignore[misc]  # the default binds the loop's variable
    return paths


async def _plain_hop(fabric: Fabric, a: Site, origin: str) -> None:
    directory = fabric.directory / "hop"
    directory.mkdir()
    (directory / "envoy.json").write_text(json.dumps(_hop((a.place.inside, HOP_PORT), origin)))
    argv = [str(find_envoy(None)), "--use-dynamic-base-id", "--concurrency", "2", "-l", "warn", "-c", "envoy.json"]
    await fabric.process("envoy", argv, a.place, directory).start()


async def _haproxy_pair(fabric: Fabric, a: Site, b: Site, origin: str) -> None:
    directory = fabric.directory / "haproxy"
    near, far = haproxy.write(directory, f"{a.place.inside}:{PAIR_PORT}", f"{b.place.underlay}:{PAIR_TUNNEL_PORT}", origin)
    for name, conf, site in (("near", near, a), ("far", far, b)):
        await fabric.process(name, ["haproxy", "-db", "-f", str(conf)], site.place, directory).start()


async def _answers(path: Route) -> bool:
    return await _run(path.site, "curl", "-sf", "-m", "5", "-H", f"Host: {DOMAIN}", f"{path.url}/") == "ok\n"


async def _requests(path: Route) -> None:
    said = await _run(
        path.site, "wrk", "-t", "2", "-c", str(CONNECTIONS), "-d", f"{WRK_S}s", "--latency", "-H", f"Host: {DOMAIN}", f"{path.url}/"
    )
    rate, p99 = re.search(r"Requests/sec:\s+([\d.]+)", said), re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    if not rate or not p99 or "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{path.label}: {said}")
    path.requests.append(float(rate[1]))
    path.latency_ms.append(float(p99[1]) * {"us": 0.001, "ms": 1, "s": 1000}[p99[2]])


async def _bulk(path: Route) -> None:
    said = await _run(
        path.site, "curl", "-sf", "-o", "/dev/null", "-w", "%{speed_download}", "-H", f"Host: {DOMAIN}", "-m", "60", f"{path.url}/bulk"
    )
    path.megabytes.append(float(said) / 1e6)


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


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=environment(Path.cwd())["PATH"])


def _section(paths: list[Route], envoy: str) -> Section:
    hop = paths[0]
    rows: list[tuple[object, ...]] = [("path", "requests/s", "ratio", "p99 ms", "bulk MB/s", "ratio")]
    rows += [
        (
            path.label,
            median(path.requests),
            f"{median(path.requests) / median(hop.requests):.2f}",
            median(path.latency_ms),
            median(path.megabytes),
            f"{median(path.megabytes) / median(hop.megabytes):.2f}",
        )
        for path in paths
    ]
    notes = f"""
Medians of {ROUNDS} interleaved rounds on one machine, which also runs the clients and nginx. `wrk -t2 -c{CONNECTIONS}` with keep-alive and an answer of 3 bytes; one download of
512 MiB with curl. Envoy {envoy}; everything that crosses sites is TLS 1.3 with client certificates, except the plain hop. Ratios are to the plain hop.
Aims: HTTP ≥ 0.70, TCP ≥ 1.4. The HAProxy pair is what one would write by hand.
"""
    return Section("Data plane", notes, rows)


def _hop(listen: tuple[str, int], origin: str) -> dict[str, Any]:
    """One HTTP hop and nothing else."""
    host, port = origin.rsplit(":", 1)
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
