"""From the answer to a `PUT` until the change is in force at another site's Envoy."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

from bench import floor
from bench.probe import EVERY_S, Probe
from bench.results import Section, median, quantile
from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool

SITES = tuple(f"s{number}" for number in range(1, 11))
CHANGES = 100
BROAD_CHANGES = 30
IDLE_S = 0.2
"""Before each change, which would otherwise be part of a burst with the one before."""
LOAD_BALANCERS = 1000
PORT = 8080
PARALLEL = 8

Say = Callable[[str], None]


async def run(say: Say) -> list[Section]:
    async with Fabric(SITES, progress=say) as fabric:
        await fabric.api.create("origin_pool", "nobody", k8s_pool("nobody", [SITES[0]]))
        for place in (*((site,) for site in SITES), SITES):
            await fabric.api.create("http_loadbalancer", _name(place), _spec(place, "start"))
        for place in (*((site,) for site in SITES), SITES):
            await fabric.api.applied("http_loadbalancer", _name(place), timeout_s=60)
        say("Measuring the floor")
        least = await floor.measure(fabric)
        say(f"{CHANGES} changes, each of one of {len(SITES)} sites")
        few = [await _change(fabric, (SITES[number % len(SITES)],), f"few-{number}") for number in range(CHANGES)]
        say(f"{BROAD_CHANGES} changes of all {len(SITES)} sites")
        broad = [await _change(fabric, SITES, f"broad-{number}") for number in range(BROAD_CHANGES)]
        say(f"Creating {LOAD_BALANCERS} load balancers and as many pools")
        await _fill(fabric)
        say(f"{CHANGES} changes with {LOAD_BALANCERS} load balancers")
        many = [await _change(fabric, (SITES[number % len(SITES)],), f"many-{number}") for number in range(CHANGES)]
    return [_section(least, few, broad, many)]


async def _change(fabric: Fabric, sites: tuple[str, ...], body: str) -> float:
    """Milliseconds from the answer to the `PUT` until the last of these sites, which are those that it concerns, shows it."""
    await asyncio.sleep(IDLE_S)
    probes = [Probe(fabric.site(name).place, fabric.site(name).place.inside, PORT, _domain(sites)) for name in sites]
    answered, *shown = await asyncio.gather(
        _put(fabric, sites, body), *(probe.shows(body.encode(), every_s=EVERY_S * len(sites)) for probe in probes)
    )
    for probe in probes:
        probe.close()
    return max(0.0, 1000 * (max(shown) - answered))


async def _put(fabric: Fabric, sites: tuple[str, ...], body: str) -> float:
    await fabric.api.replace("http_loadbalancer", _name(sites), _spec(sites, body))
    return asyncio.get_running_loop().time()


def _name(sites: tuple[str, ...]) -> str:
    return f"change-{sites[0]}" if len(sites) == 1 else "change-all"


def _domain(sites: tuple[str, ...]) -> str:
    return f"{_name(sites)}.test"


def _spec(sites: tuple[str, ...], body: str) -> dict[str, Any]:
    """A load balancer with its answer in the config itself."""
    answer = {"response_code": 200, "response_body_encoded": f"string:///{base64.b64encode(body.encode()).decode()}"}
    route = {"direct_response_route": {"path": {"prefix": "/"}, "http_method": "ANY", "route_direct_response": answer}}
    return http_loadbalancer(_domain(sites), ["nobody"], sites, PORT, routes=[route])


async def _fill(fabric: Fabric) -> None:
    """Each site gets as many of them."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(number: int) -> None:
        site = SITES[number % len(SITES)]
        async with gate:
            await fabric.api.create("origin_pool", f"pool-{number}", k8s_pool(f"service-{number}", [site]))
            await fabric.api.create(
                "http_loadbalancer", f"lb-{number}", http_loadbalancer(f"lb-{number}.test", [f"pool-{number}"], [site], PORT)
            )

    await asyncio.gather(*(one(number) for number in range(LOAD_BALANCERS)))
    for number in range(LOAD_BALANCERS - len(SITES), LOAD_BALANCERS):
        await fabric.api.applied("http_loadbalancer", f"lb-{number}", timeout_s=120)


def _section(least: floor.Floor, few: list[float], broad: list[float], many: list[float]) -> Section:
    def row(what: str, times: list[float]) -> tuple[object, ...]:
        return what, median(times), quantile(times, 0.99), median(times) / least.sum, quantile(times, 0.99) / least.sum

    notes = f"""
{len(SITES)} sites, all on this machine and all waiting. A load balancer answers with a text of its own; each change replaces the text. The clock runs from the answer to the
`PUT` until a request at the site's Envoy gets the new text (a new request every {1000 * EVERY_S:.0f} ms, so up to that much after the ACK), at the last of the sites that the change concerns.

The floor is {least.sum:.2f} ms, medians measured alone in the same run: commit and NOTIFY {least.commit_and_notify:.2f} ms, one HTTPS round trip
{least.round_trip:.2f} ms, one xDS ACK {least.ack:.2f} ms. With {LOAD_BALANCERS} load balancers and pools in the tenant, evenly over the sites, a change takes
{median(many) / median(few):.2f} × what it took without them. Aims: p50 ≤ 3 floors, p99 ≤ 10 floors, ≤ 1.5 ×.
"""
    head = ("change", "p50 ms", "p99 ms", "p50 / floor", "p99 / floor")
    rows = (
        head,
        row("concerns one site", few),
        row(f"concerns one site, {LOAD_BALANCERS} load balancers", many),
        row(f"concerns all {len(SITES)} sites", broad),
    )
    return Section("Propagation", notes, rows)
