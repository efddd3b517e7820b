"""From a change in the Kubernetes API until requests go to the new pod, in the same site and through the tunnel from another."""

import asyncio
import sys

from bench.probe import Probe
from bench.propagation import Say
from bench.results import Section, median, quantile
from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool

CHANGES = 60
IDLE_S = 0.2
"""Before each change, which would otherwise be part of a burst with the one before."""
DOMAIN, PORT = "echo.test", 8080


async def run(say: Say) -> list[Section]:
    async with Fabric(("a", "b"), progress=say) as fabric:
        await fabric.site("b").cluster.deploy("echo", (sys.executable, "-m", "lab.echo"), replicas=2)
        await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await fabric.api.create("http_loadbalancer", "echo", http_loadbalancer(DOMAIN, ["echo"], ["a", "b"], PORT))
        await fabric.api.applied("http_loadbalancer", "echo")
        times = {}
        for site in ("b", "a"):
            say(f"{CHANGES} changes of endpoints in b, seen at {site}")
            times[site] = await _changes(fabric, site)
    notes = """
Two pods run all the time; the service's EndpointSlice names one or the other. The clock runs from the Kubernetes API's answer until a request is served
by the other pod. No call to the control plane is on this path.
"""
    rows = [("seen at", "p50 ms", "p99 ms")]
    rows += [(label, median(times[site]), quantile(times[site], 0.99)) for site, label in (("b", "the same site"), ("a", "the other site"))]  # type: ignore[misc]  # numbers are formatted later
    return [Section("Endpoints", notes, rows)]


async def _changes(fabric: Fabric, site: str) -> list[float]:
    cluster = fabric.site("b").cluster
    service = cluster.services["echo"]
    both = list(service.pods)
    probe = Probe(fabric.site(site).place, fabric.site(site).place.inside, PORT, DOMAIN)
    loop = asyncio.get_running_loop()
    times = []
    for number in range(CHANGES):
        await asyncio.sleep(IDLE_S)
        service.pods = [both[number % 2]]
        await cluster.publish("echo")
        answered = loop.time()
        times.append(1000 * (await probe.shows(f"x-pod: {service.pods[0].name}".encode()) - answered))
    service.pods = both
    await cluster.publish("echo")
    probe.close()
    return times
