"""The loop, the renderer, the xDS server and a real Envoy together: what ends up in force."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.envoy.bootstrap import bootstrap
from agent.envoy.inputs import Addresses, NodeIdentity, PeerView
from agent.envoy.resources import Resources
from agent.intake import Intake, Wanted
from agent.origins import SiteOrigins
from agent.pods import SitePods
from agent.probes import Probes
from agent.protocol.items import DirectResponse, HttpLoadBalancer, ItemKind, Listener, Route, RouteMatch
from agent.protocol.manifest import Manifest
from agent.proxy import Proxy, find_envoy
from agent.reconcile import Reconciler
from agent.state import private_key_pem
from agent.xds import Outcome, XdsServer
from tests.agent.real_envoy import until
from tests.agent.wanted import SITE, FakeControlPlane

LB = ItemKind.HTTP_LOADBALANCER
ADDRESS = f"127.41.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"
"""Another one in every run: Envoys share ports, so that one left over would answer as well."""
GATEWAY, PORT = 25443, 18080


def certified(uri: str | None = "spiffe://td/tenant/t/site/here/node/n1") -> tuple[str, str]:
    """A certificate that is its own anchor, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)  # noqa: TID251  # Envoy reads the clock as well
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
    if uri is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
    signed = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode(), private_key_pem(key).decode()


@dataclass
class Converging:
    control: FakeControlPlane
    intake: Intake
    reconciler: Reconciler
    envoy: Proxy

    async def pull(self) -> None:
        await self.intake.step()
        await until(self.settled)

    def settled(self) -> bool:
        return self.reconciler.verdict.applied_hash == self.intake.current.manifest.hash

    def listen(self, *load_balancers: str, port: int = PORT) -> None:
        listener = Listener(network="inside", port=port, protocol="http", load_balancers=load_balancers)
        self.control.put(ItemKind.LISTENER, f"inside/*/{port}", listener)

    async def get(self, domain: str, port: int = PORT) -> httpx2.Response:
        async with httpx2.AsyncClient(trust_env=False) as http:
            return await http.get(f"http://{ADDRESS}:{port}/", headers={"host": domain})

    @property
    def rejected(self) -> dict[str, str]:
        return {rejection.key: rejection.reason for rejection in self.reconciler.verdict.rejected}


class Envoy:
    """What the reconciler needs, as `agent.node` puts it together."""

    def __init__(self, xds: XdsServer, proxy: Proxy) -> None:
        self.xds, self.proxy = xds, proxy
        self.applied = 0

    async def apply(self, resources: Resources) -> Outcome:
        self.applied += 1
        return await self.xds.apply(resources)

    async def warming(self) -> int:
        return await self.proxy.admin.warming()


def answering(domain: str, body: str = "hello", regex: str | None = None) -> HttpLoadBalancer:
    match = RouteMatch(prefix="/") if regex is None else RouteMatch(regex=regex)
    return HttpLoadBalancer(domains=(domain,), routes=(Route(match=match, response=DirectResponse(status=200, body=body)),))


@pytest.fixture
async def node(run_dir: Path) -> AsyncIterator[Converging]:
    certificate, key = certified()
    identity = NodeIdentity("n1", "a-1", "here", "a", certificate_pem=certificate, private_key_pem=key)
    control = FakeControlPlane()
    control.put(ItemKind.SITE, "here", SITE.model_copy(update={"peer_anchor_pem": certificate}))
    envoy = Proxy(find_envoy(None), run_dir, run_dir / "envoy.log", bootstrap(identity, str(run_dir)), concurrency=1, drain_s=0)
    xds = XdsServer(run_dir / "xds.sock", lambda: reconciler.nudge())  # noqa: PLW0108  # it is made below
    intake = Intake(control, Wanted(Manifest(entries=())), lambda: reconciler.nudge())  # noqa: PLW0108  # it is made below
    origins, probe = SiteOrigins("here", None, dict, lambda: None), Probes(run_dir / "probe.sock", lambda: None)
    reconciler = Reconciler(
        node=identity,
        addresses=Addresses(ADDRESS, GATEWAY, inside=ADDRESS),
        run_dir=str(run_dir),
        trusted_ca_file="/etc/ssl/certs/ca-certificates.crt",
        wanted=lambda: intake.current,
        proxy=Envoy(xds, envoy),
        origins=origins,
        pods=SitePods(None, dict, lambda: None),
        peers=probe,
        own=PeerView,
        passed=lambda: None,
        changed=lambda: None,
    )
    async with AsyncExitStack() as stack:
        for close in (probe.close, origins.close, xds.stop, envoy.admin.close, envoy.stop):
            stack.push_async_callback(close)
        await xds.start()
        for loop in (envoy, reconciler):
            stack.push_async_callback(cancelled, asyncio.create_task(loop.run()))
        yield Converging(control, intake, reconciler, envoy)


async def cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_what_is_wanted_is_in_force(node: Converging) -> None:
    node.control.put(LB, "n/a", answering("a.test"))
    node.listen("n/a")
    await node.pull()
    assert (await node.get("a.test")).text == "hello"
    assert node.rejected == {}


async def test_one_poisoned_load_balancer_of_many_is_named_and_holds_back_no_other_even_at_the_first_start(node: Converging) -> None:
    names = [f"n/{index:02}" for index in range(30)]
    for name in names:
        node.control.put(LB, name, answering(f"{name[2:]}.test", name))
    node.control.put(LB, "n/bad", answering("bad.test", regex="("))
    node.listen(*names[:15], "n/bad", *names[15:])
    await node.pull()
    assert "n/bad" in node.rejected
    assert "missing" in node.rejected["n/bad"]
    assert not set(names) & node.rejected.keys()
    for name in names:
        assert (await node.get(f"{name[2:]}.test")).text == name
    assert (await node.get("bad.test")).status_code == 404


async def test_a_poisoned_change_leaves_the_last_good_version_in_force_until_it_is_mended(node: Converging) -> None:
    node.control.put(LB, "n/a", answering("a.test", "first"))
    node.control.put(LB, "n/b", answering("b.test", "first"))
    node.listen("n/a", "n/b")
    await node.pull()
    node.control.put(LB, "n/a", answering("a.test", "second", regex="("))
    node.control.put(LB, "n/b", answering("b.test", "second"))
    await node.pull()
    assert set(node.rejected) == {"n/a"}
    assert (await node.get("a.test")).text == "first"
    assert (await node.get("b.test")).text == "second"
    node.control.put(LB, "n/a", answering("a.test", "third"))
    await node.pull()
    assert node.rejected == {}
    assert (await node.get("a.test")).text == "third"


async def test_a_port_that_is_taken_holds_back_no_other_listener(node: Converging) -> None:
    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    taken = await asyncio.start_server(nobody, ADDRESS, PORT + 1)
    node.control.put(LB, "n/a", answering("a.test"))
    node.listen("n/a")
    node.listen("n/a", port=PORT + 1)
    await node.pull()
    assert set(node.rejected) == {f"inside/*/{PORT + 1}"}
    assert "in use" in node.rejected[f"inside/*/{PORT + 1}"]
    assert (await node.get("a.test")).text == "hello"
    taken.close()
    await taken.wait_closed()


async def test_a_gateways_port_that_is_taken_is_the_nodes_fault_and_holds_back_no_load_balancer(node: Converging) -> None:
    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    taken = await asyncio.start_server(nobody, ADDRESS, GATEWAY)
    node.control.put(LB, "n/a", answering("a.test"))
    node.listen("n/a")
    await node.intake.step()
    await until(lambda: node.reconciler.verdict.fault)
    assert "in use" in node.reconciler.verdict.fault
    assert node.rejected == {}
    assert (await node.get("a.test")).text == "hello"
    taken.close()
    await taken.wait_closed()


async def test_a_renewed_certificate_is_swapped_without_touching_listeners(node: Converging) -> None:
    node.control.put(LB, "n/a", answering("a.test"))
    node.listen("n/a")
    await node.pull()
    before = await node.envoy.admin.get("/stats?filter=listener_manager.(listener_modified|lds.version)")
    certificate, key = certified()
    node.reconciler.node = replace(node.reconciler.node, certificate_pem=certificate, private_key_pem=key)
    node.reconciler.nudge()
    serial = f"{x509.load_pem_x509_certificate(certificate.encode()).serial_number:x}"

    async def swapped() -> bool:
        return serial in await node.envoy.admin.get("/certs")

    await until(swapped)
    assert await node.envoy.admin.get("/stats?filter=listener_manager.(listener_modified|lds.version)") == before
    assert (await node.get("a.test")).text == "hello"


async def test_a_certificate_that_envoy_refuses_stays_the_nodes_fault_until_there_is_another(node: Converging) -> None:
    """When it comes a second time, Envoy acknowledges it, and still does not use it."""
    good = node.reconciler.node
    certificate, key = certified(uri=None)
    node.reconciler.node = replace(good, certificate_pem=certificate, private_key_pem=key)
    node.control.put(LB, "n/a", answering("a.test"))
    node.listen("n/a")
    await node.intake.step()
    await until(lambda: node.reconciler.verdict.fault)
    for load_balancer in ("second", "third"):
        node.control.put(LB, "n/a", answering("a.test", load_balancer))
        await node.intake.step()
        await until(lambda: node.reconciler.verdict.applied_revision == node.control.revision)
        assert "neither subject CN nor SAN" in node.reconciler.verdict.fault
        assert (await node.get("a.test")).text == load_balancer
    node.reconciler.node = good
    node.reconciler.nudge()
    await until(node.settled)
    assert node.reconciler.verdict.fault == ""


async def test_a_killed_envoy_comes_back_with_everything(node: Converging) -> None:
    node.control.put(LB, "n/a", answering("a.test"))
    node.listen("n/a")
    await node.pull()
    pid = node.envoy.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    async def serves() -> bool:
        with suppress(httpx2.TransportError):
            return (await node.get("a.test")).text == "hello"
        return False

    await until(lambda: node.envoy.pid not in (None, pid))
    await until(serves)
