"""A large cluster that never rests: how late endpoints come, and what following them costs the agent."""

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

from bench.memory import resident_kb
from bench.probe import Probe
from bench.propagation import Say
from bench.results import Section, median, quantile
from lab.cluster import NAMESPACE
from lab.fabric import Fabric
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.specs import http_loadbalancer, k8s_pool

SERVICES, ENDPOINTS, POOLS = 500, 10, 50
"""Services, endpoints of each, and how many of the services origin pools name."""
PER_S = 100
CHANGES = 100
BETWEEN_S = 0.3
DOMAIN, PORT = "echo.test", 8080
_TICK = os.sysconf("SC_CLK_TCK")


async def run(say: Say) -> list[Section]:
    async with Fabric(("a",), progress=say) as fabric:
        cluster = fabric.site("a").cluster
        api = Client(httpx2.AsyncClient(base_url=cluster.url, timeout=10, trust_env=False))
        await cluster.deploy("echo", (sys.executable, "-m", "lab.echo"), replicas=2)
        await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["a"]))
        await fabric.api.create("http_loadbalancer", "echo", http_loadbalancer(DOMAIN, ["echo"], ["a"], PORT))
        small = resident_kb(fabric.site("a").agent.pid)
        say(f"{SERVICES} services with {ENDPOINTS} endpoints each, {POOLS} of them in origin pools")
        for number in range(SERVICES):
            await api.apply(objects.service(f"s{number}", NAMESPACE))
            await api.apply(_slice(number, ENDPOINTS))
        for number in range(POOLS):
            await fabric.api.create("origin_pool", f"s{number}", k8s_pool(f"s{number}", ["a"], port=80))
            balancer = http_loadbalancer(f"s{number}.test", [f"s{number}"], ["a"], PORT)
            await fabric.api.create("http_loadbalancer", f"s{number}", balancer)
        await fabric.api.applied("http_loadbalancer", f"s{POOLS - 1}")
        rows: list[tuple[object, ...]] = [("changes a second", "p50 ms", "p99 ms", "agent CPU %", "agent MiB")]
        for wanted in (0, PER_S):
            say(f"{CHANGES} changes of one service, while the others change {wanted} times a second")
            rows.append(await _row(fabric, api, wanted))
    notes = f"""
{SERVICES} services with {ENDPOINTS} endpoints each in the cluster of one site, {POOLS} of them named by origin pools and load balancers; each of the changes beside takes
an endpoint out of one of the services or puts it back. The clock runs from the Kubernetes API's answer about yet another service until a request is served by its
other pod. The agent is one process with one thread of Python, and was {small / 1024:.0f} MiB large before there were any of these services.
"""
    return [Section("Discovery", notes, rows)]


async def _row(fabric: Fabric, api: Client, per_s: int) -> tuple[object, ...]:
    loop, pid = asyncio.get_running_loop(), fabric.site("a").agent.pid
    async with _restless(api, per_s) as done:
        started, used, before = loop.time(), _cpu_s(pid), next(done)
        times = await _changes(fabric)
        passed = loop.time() - started
        happened = (next(done) - before - 1) / passed
        share = 100 * (_cpu_s(pid) - used) / passed
    return f"{happened:.0f}", median(times), quantile(times, 0.99), share, f"{resident_kb(pid) / 1024:.0f}"


@asynccontextmanager
async def _restless(api: Client, per_s: int) -> AsyncIterator["itertools.count[int]"]:
    """Changes all the while; they count themselves."""
    done = itertools.count()

    async def change() -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for number in itertools.count():
            await api.apply(_slice(number % SERVICES, ENDPOINTS - 1 + number // SERVICES % 2))
            next(done)
            await asyncio.sleep(max(0.0, started + (number + 1) / per_s - loop.time()))

    task = asyncio.create_task(change()) if per_s else None
    try:
        yield done
    finally:
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _changes(fabric: Fabric) -> list[float]:
    site = fabric.site("a")
    service = site.cluster.services["echo"]
    both = list(service.pods)
    probe = Probe(site.place, site.place.inside, PORT, DOMAIN)
    loop = asyncio.get_running_loop()
    times = []
    for number in range(CHANGES):
        await asyncio.sleep(BETWEEN_S)
        service.pods = [both[number % 2]]
        await site.cluster.publish("echo")
        answered = loop.time()
        times.append(1000 * (await probe.shows(f"x-pod: {service.pods[0].name}".encode()) - answered))
    service.pods = both
    await site.cluster.publish("echo")
    probe.close()
    return times


def _slice(number: int, endpoints: int) -> objects.Body:
    addresses = [f"10.{100 + number // 250}.{number % 250}.{each + 1}" for each in range(endpoints)]
    return objects.endpoint_slice(f"s{number}", NAMESPACE, addresses)


def _cpu_s(pid: int) -> float:
    """User and system time."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK
