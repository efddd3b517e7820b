"""Services of a site's own cluster; requests enter at `a`."""

import asyncio

import httpx2
import pytest

from lab.cluster import NAMESPACE
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.objects import endpoint
from lab.specs import k8s_pool
from lab.wait import until
from tests.e2e.origins import PORT
from tests.e2e.two_sites import TwoSites

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]


@pytest.mark.parametrize("site", ["a", "b"])
async def test_a_pod_that_terminates_gets_no_more_requests_and_finishes_those_it_has(shared_sites: TwoSites, site: str) -> None:
    sites, service = shared_sites, f"leaving-{site}"
    leaving, staying = [await sites.origin(site, f"{each}-{site}") for each in ("leaving", "staying")]
    api = Client(httpx2.AsyncClient(base_url=sites.fabric.site(site).cluster.url, trust_env=False))
    await api.create(objects.service(service, NAMESPACE, PORT))
    await api.set_endpoints(service, NAMESPACE, [leaving.address], PORT)
    await sites.fabric.api.create("origin_pool", service, k8s_pool(service, [site], PORT))
    domain = await sites.load_balancer(service, service)
    await sites.settles(domain, {leaving.name}, 2)

    slow = asyncio.create_task(sites.call(domain, "/slow"))

    async def asked() -> bool:
        return any(request.path == "/slow" for request in leaving.seen)

    await until(asked, "the pod to have the slow request")
    terminating = endpoint(leaving.address, ready=False, serving=True, terminating=True)
    await api.set_endpoints(service, NAMESPACE, [terminating, endpoint(staying.address)], PORT)
    await sites.settles(domain, {staying.name})
    await api.set_endpoints(service, NAMESPACE, [staying.address], PORT)
    assert await sites.who(domain) == {staying.name}
    assert not slow.done()
    leaving.released.set()
    answer = await slow
    assert (answer.status_code, answer.headers["x-origin"]) == (200, leaving.name)
    await api.http.aclose()
