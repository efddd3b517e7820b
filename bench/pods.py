"""From a pod's new label until policies that select pods judge it by that, in a cluster with many pods; and what following them costs the agent."""

import asyncio
import sys
from typing import Any

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

PODS, APPS = 5_000, 200
CHANGES = 40
IDLE_S = 0.3
DOMAIN, PORT = "echo.test", 8080
SELECTORS = ((f"1 of {APPS} applications", "app in (app-1, called)"), ("all", "app, app != shunned"))
"""What the policy lets in; both labels of the pod that calls are treated differently by each."""


async def run(say: Say) -> list[Section]:
    async with Fabric(("a",), progress=say) as fabric:
        site = fabric.site("a")
        api = Client(httpx2.AsyncClient(base_url=site.cluster.url, timeout=10, trust_env=False))
        await site.cluster.deploy("echo", (sys.executable, "-m", "lab.echo"))
        await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["a"]))
        say(f"{PODS} pods")
        for number in range(PODS):
            address = f"10.{100 + number // 65_536}.{number // 256 % 256}.{number % 256}"
            await api.create(objects.pod(f"pod-{number}", NAMESPACE, address, {"app": f"app-{number % APPS}", "pod-template-hash": "abc"}))
        await api.create(objects.pod("caller", NAMESPACE, site.place.inside, {"app": "called"}))
        before = resident_kb(site.agent.pid)
        await fabric.api.create("service_policy", "who", _policy(SELECTORS[0][1]))
        active = {"active_service_policies": {"policies": [{"namespace": "lab", "name": "who"}]}}
        await fabric.api.create("http_loadbalancer", "echo", http_loadbalancer(DOMAIN, ["echo"], ["a"], PORT, **active))
        rows: list[tuple[object, ...]] = [("pods that the policy lets in", "p50 ms", "p99 ms", "agent MiB")]
        for name, selector in SELECTORS:
            say(f"{CHANGES} changes of a label, while the policy lets in {name}")
            await fabric.api.replace("service_policy", "who", _policy(selector))
            await fabric.api.applied("service_policy", "who")
            times = await _changes(fabric, api)
            rows.append((name, median(times), quantile(times, 0.99), f"{resident_kb(site.agent.pid) / 1024:.0f}"))
        await api.http.aclose()
    notes = f"""
{PODS} pods in the cluster of one site. The clock runs from the Kubernetes API's answer about the label of the pod that calls until its requests are let in, or are not any more. Pods are
followed only while a policy selects some: before there was one the agent was {before / 1024:.0f} MiB large.
"""
    return [Section("Pods that call", notes, rows)]


def _policy(selector: str) -> dict[str, Any]:
    rule = {"action": "ALLOW", "client_pod_selector": {"expressions": [selector]}}
    return {"rule_list": {"rules": [{"metadata": {"name": "who"}, "spec": rule}]}}


async def _changes(fabric: Fabric, api: Client) -> list[float]:
    site, loop = fabric.site("a"), asyncio.get_running_loop()
    probe = Probe(site.place, site.place.inside, PORT, DOMAIN)
    await probe.shows(b"HTTP/1.1 200")
    times = []
    for number in range(CHANGES):
        await asyncio.sleep(IDLE_S)
        label, seen = (("shunned", b"HTTP/1.1 403"), ("called", b"HTTP/1.1 200"))[number % 2]
        await api.patch("Pod", "caller", {"metadata": {"labels": {"app": label}}}, NAMESPACE)
        answered = loop.time()
        times.append(1000 * (await probe.shows(seen) - answered))
    probe.close()
    return times
