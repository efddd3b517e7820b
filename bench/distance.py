"""One download over a long path: how much of what the path gives alone comes through a tunnel."""

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from agent.envoy.clusters import STREAM_WINDOW
from bench.dataplane import DOMAIN, HTTP_PORT, NEEDED, ORIGIN_PORT, TCP_PORT, which
from bench.propagation import Say
from bench.results import Section, median
from lab.fabric import Fabric
from lab.forwarder import Forwarder
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.wait import until

ROUND_TRIP_S = 0.050
ROUNDS = 2


async def run(say: Say) -> list[Section]:
    if missing := [tool for tool in NEEDED if not which(tool)]:
        say(f"Skipped: {', '.join(missing)} not installed")
        return []
    async with Fabric(("a", "b"), tapped=True, progress=say) as fabric, AsyncExitStack() as stack:
        a, b = fabric.site("a"), fabric.site("b")
        plain = await _furnish(fabric, stack)
        urls = {
            "plain path": f"http://{plain}",
            "HTTP load balancer, through the tunnel": f"http://{a.place.inside}:{HTTP_PORT}",
            "TCP load balancer, through the tunnel": f"http://{a.place.inside}:{TCP_PORT}",
        }
        for label, url in urls.items():
            await until(lambda url=url: _speed(a, f"{url}/"), label)  # type: ignore[misc]  # the default binds the loop's variable
        assert b.tap
        b.tap.delay_s, b.tap.window = ROUND_TRIP_S / 2, _window()
        speeds: dict[str, list[float]] = {label: [] for label in urls}
        for number in range(1, ROUNDS + 1):
            say(f"Round {number} of {ROUNDS}: one file of 512 MiB over each of {len(urls)} paths of {1000 * ROUND_TRIP_S:.0f} ms")
            for label, url in urls.items():
                speeds[label].append(await _speed(a, f"{url}/bulk") / 1e6)
    return [_section(speeds)]


async def _furnish(fabric: Fabric, stack: AsyncExitStack) -> str:
    """Everything; says where the plain path begins: a forwarder like the one before the gateway, straight to nginx."""
    a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
    origin = (b.place.underlay, ORIGIN_PORT)
    argv = [sys.executable, "-m", "bench.origin"]
    await b.cluster.deploy("origin", argv)
    listen = f"{origin[0]}:{origin[1]}"
    await fabric.process("origin", [*argv, "--listen", listen, "--pod", "origin"], b.place, fabric.directory / "origin").start()
    await api.create("origin_pool", "origin", k8s_pool("origin", ["b"]))
    await api.create("http_loadbalancer", "bench", http_loadbalancer(DOMAIN, ["origin"], ["a"], HTTP_PORT))
    await api.create("tcp_loadbalancer", "bench", tcp_loadbalancer(["origin"], ["a"], TCP_PORT))
    forwarder = Forwarder(a.place.listen(a.place.inside), b.place, origin, ROUND_TRIP_S / 2, _window())
    await forwarder.start()
    stack.push_async_callback(forwarder.stop)
    host, port = forwarder.address
    return f"{host}:{port}"


def _window() -> int:
    """Bytes that the kernel's TCP sends at most before they are acknowledged: what limits one connection on any path of such length."""
    return int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])


async def _speed(site: Site, url: str) -> float:
    """Bytes per second; 0 if it failed."""
    argv = ["curl", "-sf", "-o", "/dev/null", "-w", "%{speed_download}", "-H", f"Host: {DOMAIN}", "-m", "60", url]
    process = await asyncio.create_subprocess_exec(
        *site.place.command(argv), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return float(said) if process.returncode == 0 else 0.0


def _section(speeds: dict[str, list[float]]) -> Section:
    plain = median(speeds["plain path"])
    rows: list[tuple[object, ...]] = [("path", "MB/s", "ratio")]
    rows += [(label, median(values), f"{median(values) / plain:.2f}") for label, values in speeds.items()]
    notes = f"""
Medians of {ROUNDS} interleaved rounds: one download of 512 MiB with curl, on one connection, over a path of {1000 * ROUND_TRIP_S:.0f} ms round trip that the lab's forwarder emulates,
with at most {_window() >> 20} MiB under way, which is all that TCP sends here before it hears of the other end (`tcp_wmem`). The plain path is the same forwarder in
front of the origin itself. Aim: ≥ 0.8 of it. Where TCP is allowed more, a stream between sites ends at its own window of {STREAM_WINDOW >> 20} MiB for each round trip.
"""
    return Section("Distance", notes, rows)
