"""IPsec tunnels between two network namespaces: real strongSwan, real certificates, ESP in user space, and traffic inside."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from cryptography import x509

from agent import charon, overlay
from agent.envoy.inputs import AgentSnapshot, Item, ItemId, NodeIdentity
from agent.ipsec import CHILD, PORT
from agent.overlay import Overlay
from agent.protocol.items import IpsecNode, ItemKind, Peer, Site
from agent.protocol.overlay import overlay_address
from agent.protocol.report import IpsecTunnel
from agent.state import private_key_pem
from controlplane import pki
from controlplane.pki import Authority
from lab import faults
from lab.network import Network, Place, build, can_use_namespaces
from lab.wait import until
from tests.backend import now

NOW = now()
DOMAIN = "fabric.test"
_BULK = 8 << 20


def missing() -> str:
    """What these tests lack."""
    if not can_use_namespaces():
        return "needs root, iproute2 and the right to make network namespaces"
    try:
        charon.find_charon(None)
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except (charon.NoIpsec, OSError) as error:
        return f"needs strongSwan and /dev/net/tun: {error}"
    return ""


pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(missing()), reason=missing() or "can run")]


@dataclass(frozen=True)
class Fabric:
    """The authorities of one, with a tenant in it."""

    root: Authority = field(default_factory=lambda: pki.create_root(DOMAIN, NOW))
    tenant_id: str = field(default_factory=lambda: str(uuid4()))
    tenant: Authority = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tenant", pki.create_tenant_authority(self.root, self.tenant_id, DOMAIN, NOW))


@dataclass
class End:
    """One node with its daemon, in a network namespace of its own."""

    place: Place
    fabric: Fabric
    directory: Path
    dialable: bool = True
    node_id: str = field(default_factory=lambda: str(uuid4()))
    site_id: str = field(default_factory=lambda: str(uuid4()))
    peers: tuple["End", ...] = ()
    host: str | None = None
    """By which others know it, if that is not its address."""
    port: int = PORT
    timeout_ms: int = 10_000
    crl: str = ""
    shown: str = ""
    """Authorities that it knows besides, and so shows to others."""
    said: list[str] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None

    def __post_init__(self) -> None:
        self.key = pki.create_key()
        self.renew()
        wrapper = self.directory / "charon"
        wrapper.write_text(f"#!/bin/sh\nexec {' '.join(self.place.command([str(charon.find_charon(None))]))}\n")
        wrapper.chmod(0o755)
        self.overlay = self.agent()

    def agent(self) -> Overlay:
        """What keeps the tunnels of this node: one after the other."""
        return Overlay(
            off="",
            charon=self.directory / "charon",
            esp="userspace",
            dialable=lambda: self.dialable,
            run_dir=self.directory,
            log_path=self.directory / "charon.log",
            node=lambda: self.node,
            snapshot=self.snapshot,
            changed=lambda: self.said.append(self.overlay.reason),
        )

    def issue(self, *authorities: Authority) -> None:
        """Take a certificate of the first of these."""
        self.shown = "".join(authority.certificate_pem for authority in authorities)
        self.renew(issuer=authorities[0])

    def renew(self, at: datetime = NOW, issuer: Authority | None = None) -> None:
        identity = pki.NodeIdentity(DOMAIN, self.fabric.tenant_id, self.site_id, self.node_id)
        leaf = pki.to_pem(pki.issue_node(issuer or self.fabric.tenant, identity, self.key.public_key(), at))
        pem = leaf + (issuer or self.fabric.tenant).certificate_pem
        self.node = NodeIdentity(self.node_id, "node", self.site_id, "site", pem, private_key_pem(self.key).decode())

    def snapshot(self) -> AgentSnapshot:
        site = Site(
            tenant_id=self.fabric.tenant_id,
            tenant="t",
            site_id=self.site_id,
            name="site",
            trust_domain=DOMAIN,
            peer_anchor_pem=self.fabric.tenant.certificate_pem,
            root_anchor_pem=self.fabric.root.certificate_pem + self.shown,
            peer_crl_pem=self.crl,
            tunnel_dead_timeout=self.timeout_ms,
        )
        peers = [Peer(site_id=peer.site_id, name="peer", ipsec=(peer.known(),)) for peer in self.peers]
        return AgentSnapshot.of(
            [Item(ItemId(ItemKind.SITE, self.site_id), "", site), *(Item(ItemId(ItemKind.PEER, it.site_id), "", it) for it in peers)]
        )

    def known(self) -> IpsecNode:
        host = self.place.underlay if self.host is None else self.host
        return IpsecNode(node_id=self.node_id, host=host if self.dialable else "", port=self.port)

    async def stop(self) -> None:
        """As an agent that is killed."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    @property
    def address(self) -> str:
        return overlay_address(self.node_id)

    def to(self, other: "End") -> IpsecTunnel:
        return self.overlay.tunnels(other.site_id)[0] if self.overlay.tunnels(other.site_id) else IpsecTunnel(node_id="", up=False)

    @property
    def pid(self) -> int:
        assert self.overlay._daemon is not None
        assert self.overlay._daemon.pid is not None
        return self.overlay._daemon.pid


async def up(one: End, other: End, within_s: float = 30) -> IpsecTunnel:
    async def is_up() -> IpsecTunnel | None:
        return one.to(other) if one.to(other).up and other.to(one).up else None

    try:
        found = await until(is_up, "the tunnel to be up", within_s=within_s)
    except TimeoutError as error:
        logs = "\n".join((end.directory / "charon.log").read_text()[-2000:] for end in (one, other))
        raise AssertionError(f"{error}; {one.overlay.reason}; {one.to(other)}; {logs}") from error
    assert found is not None
    return found


async def refused(one: End, other: End) -> None:
    """The tunnel was tried, and `one` does not take the other's certificate. Until it has said so, the other may believe in a tunnel."""

    async def failed() -> bool:
        assert not one.to(other).up
        said = one.to(other).flap_reason + other.to(one).flap_reason
        return re.search("AUTHENTICATION_FAILED|no trusted|constraint", said) is not None

    assert await until(failed, "the tunnel to be refused", within_s=30)


async def carried(source: End, target: End, size: int = 1024, within_s: float = 60) -> int:
    """How many bytes of so many a TCP connection inside the tunnel brought."""
    listener = target.place.call(lambda: socket.create_server((target.address, 0), family=socket.AF_INET6))
    dialled = source.place.call(lambda: socket.socket(socket.AF_INET6))

    def receive() -> int:
        listener.settimeout(within_s)
        connection, _ = listener.accept()
        connection.settimeout(within_s)
        found = 0
        with connection:
            while piece := connection.recv(1 << 16):
                found += len(piece)
        return found

    def send() -> None:
        dialled.settimeout(within_s)
        dialled.connect((target.address, listener.getsockname()[1]))
        dialled.sendall(bytes(size))
        dialled.close()

    with listener, dialled:
        received, _ = await asyncio.gather(asyncio.to_thread(receive), asyncio.to_thread(send))
    return received


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with build(("a", "b")) as network:
        for number, place in enumerate(network.sites.values(), 1):
            _ip(place, "addr", "add", f"2001:db8::{number}/64", "dev", "eth0", "nodad")
            _ip(place, "route", "add", "default", "via", f"2001:db8::{3 - number}")
        yield network


def _ip(place: Place, *argv: str) -> None:
    subprocess.run(place.command(["ip", *argv]), check=True, capture_output=True)


@pytest.fixture
async def ends(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., tuple[End, End]]]:
    """Two nodes that know each other; what is given differs from the ordinary at the second."""
    made: list[End] = []

    def prepare(address: str, esp: charon.Esp) -> None:
        place = next(end.place for end in made if end.address == address)
        place.call(lambda: REAL(address, esp))

    REAL = charon.prepare  # noqa: N806
    remove = charon._assign
    monkeypatch.setattr(charon, "prepare", prepare)
    monkeypatch.setattr(overlay, "prepare", prepare)
    for name, seconds in (("_TRY_AGAIN_S", 0.2), ("_LOOK_EVERY_S", 0.2), ("_AGAIN_S", 0.3), ("_STAND_IN_S", 3.0)):
        monkeypatch.setattr(overlay, name, seconds)

    def assign(request: int, address: str) -> None:
        next(end.place for end in made if end.address == address).call(lambda: remove(request, address))

    def start(**different: Any) -> tuple[End, End]:
        fabric, more = Fabric(), {"a": {}, "b": different}
        for name, place in network.sites.items():
            (tmp_path / name).mkdir()
            made.append(End(place, fabric, tmp_path / name, **more[name]))
        one, other = made
        one.peers, other.peers = (other,), (one,)
        for end in made:
            end.task = asyncio.create_task(end.overlay.run())
        return one, other

    yield start
    for end in made:
        await end.stop()
        await end.overlay.stop()
        place, address = end.place, end.address
        place.call(lambda address=address: remove(charon._REMOVE_ADDRESS, address))  # type: ignore[misc]  # the loop's variable


Start = Callable[..., tuple[End, End]]


async def test_an_ipsec_tunnel_carries_traffic_and_tells_of_itself(ends: Start) -> None:
    one, other = ends()
    tunnel = await up(one, other)
    assert await carried(one, other) == 1024
    assert await carried(other, one) == 1024
    assert {one.to(other).initiator, other.to(one).initiator} == {True, False}
    assert tunnel.ike == "AES_GCM_16-128/PRF_HMAC_SHA2_256/ECP_256"
    assert tunnel.esp == "AES_GCM_16-128"
    assert tunnel.spi_in

    async def counted() -> bool:
        return one.to(other).bytes_in > 1024 and one.to(other).bytes_out > 1024

    assert await until(counted, "the bytes to be counted")
    assert one.said == [""]


async def test_what_no_ipsec_tunnel_takes_does_not_leave_in_clear(ends: Start) -> None:
    one, other = ends()
    await up(one, other)
    with one.place.call(lambda: socket.socket(socket.AF_INET6)) as dialled:
        dialled.settimeout(5)
        with pytest.raises(OSError, match=r"unreachable|No route"):
            dialled.connect((overlay_address("nobody"), 15443))


@pytest.mark.skipif(not shutil.which("nft"), reason="needs nft")
async def test_ipsec_passes_nat_that_changes_ports_on_both_sides(ends: Start) -> None:
    """One end is reached by another port, as by a NodePort; the other cannot be dialled, and its packets come from another port."""
    one, other = ends(dialable=False)
    one.port = 30_500
    with _nat(one.place, "prerouting", "udp dport 30500 redirect to :4500"), _nat(other.place, "postrouting", "masquerade to :40000-40010"):
        tunnel = await up(one, other)
        assert 40_000 <= int(tunnel.remote.rpartition(":")[2]) <= 40_010
        assert other.to(one).remote == f"{one.place.underlay}:30500"
        assert await carried(one, other) == 1024
        assert await carried(other, one, _BULK) == _BULK


@contextmanager
def _nat(place: Place, hook: str, rule: str) -> Iterator[None]:
    rules = f"add table ip nat; add chain ip nat it {{ type nat hook {hook} priority 0; }}; add rule ip nat it meta l4proto udp {rule}"
    subprocess.run(place.command(["nft", rules]), check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(place.command(["nft", "delete", "table", "ip", "nat"]), check=True, capture_output=True)


async def test_ipsec_goes_over_ipv6_as_well(ends: Start) -> None:
    one, other = ends()
    one.host, other.host = "2001:db8::1", "2001:db8::2"
    assert (await up(one, other)).remote == "2001:db8::2:4500"
    assert await carried(one, other) == 1024


async def test_the_end_that_cannot_be_dialled_begins_ipsec(ends: Start) -> None:
    one, other = ends(dialable=False)
    await up(one, other)
    assert other.to(one).initiator
    assert await carried(one, other) == 1024


async def test_ipsec_refuses_another_tenants_intermediate_under_the_same_root(ends: Start) -> None:
    """Even if it signed this tenant's names."""
    one, other = ends()
    other.issue(pki.create_tenant_authority(one.fabric.root, one.fabric.tenant_id, DOMAIN, NOW, version=2))
    await refused(one, other)


async def test_ipsec_refuses_a_certificate_of_another_root(ends: Start) -> None:
    one, other = ends()
    stranger = pki.create_root(DOMAIN, NOW, version=2)
    other.issue(pki.create_tenant_authority(stranger, one.fabric.tenant_id, DOMAIN, NOW), stranger)
    await refused(one, other)


async def test_ipsec_refuses_an_expired_certificate(ends: Start) -> None:
    one, other = ends()
    other.renew(NOW - timedelta(days=8))
    await refused(one, other)


async def test_ipsec_refuses_a_revoked_certificate(ends: Start) -> None:
    one, other = ends()
    serial = x509.load_pem_x509_certificate(other.node.certificate_pem.encode()).serial_number
    one.crl = pki.revocations(one.fabric.tenant, [serial], NOW)
    await refused(one, other)


async def test_an_ipsec_tunnel_that_is_not_wanted_any_more_ends(ends: Start) -> None:
    one, other = ends()
    await up(one, other)
    one.peers = ()

    async def is_down() -> bool:
        return not other.to(one).up

    assert await until(is_down, "the other end to notice")


async def test_rekeying_and_new_certificates_drop_nothing_of_ipsec(ends: Start) -> None:
    one, other = ends()
    before = (await up(one, other)).spi_in
    sending = asyncio.create_task(carried(one, other, 4 * _BULK, within_s=90))
    for end in (one, other):
        end.renew(NOW + timedelta(hours=1))
    assert one.overlay._daemon is not None
    with one.overlay._daemon.session() as session:
        session.rekey({"child": CHILD})
        session.rekey({"ike": other.node_id})

    async def is_rekeyed() -> bool:
        return one.to(other).up and one.to(other).spi_in != before

    assert await until(is_rekeyed, "new keys", within_s=30)
    assert await sending == 4 * _BULK
    assert one.to(other).last_flap is None
    assert await carried(other, one) == 1024


async def test_large_transfers_in_ipsec_pass_a_path_of_small_packets(ends: Start) -> None:
    one, other = ends()
    await up(one, other)
    for end in (one, other):
        _ip(end.place, "link", "set", "eth0", "mtu", "1380")
    try:
        assert await carried(one, other, _BULK) == _BULK
        assert await carried(other, one, _BULK) == _BULK
    finally:
        for end in (one, other):
            _ip(end.place, "link", "set", "eth0", "mtu", "1500")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_ipsec_comes_back_when_the_daemon_is_lost(ends: Start, monkeypatch: pytest.MonkeyPatch, sign: signal.Signals) -> None:
    monkeypatch.setattr(charon, "_CALL_S", 0.5)
    one, other = ends()
    await up(one, other)
    lost = one.pid
    os.kill(lost, sign)

    async def has_flapped() -> bool:
        return one.to(other).up and one.to(other).last_flap is not None and one.pid != lost

    assert await until(has_flapped, "a new daemon and a new tunnel", within_s=60)
    assert "daemon" in one.to(other).flap_reason
    await up(one, other)
    assert await carried(one, other) == 1024


@pytest.mark.skipif(not shutil.which("nft"), reason="needs nft")
async def test_a_silent_ipsec_peer_is_given_up_by_the_dead_timeout_and_found_again(ends: Start) -> None:
    one, other = ends(timeout_ms=6_000)
    one.timeout_ms = 6_000
    await up(one, other)
    with faults.silent([one.place], [other.place]):

        async def is_down() -> bool:
            return not one.to(other).up and not other.to(one).up

        assert await until(is_down, "both ends to give up", within_s=40)
    assert "silent" in one.to(other).flap_reason
    await up(one, other, within_s=40)


async def test_another_agent_adopts_the_ipsec_daemon_and_its_tunnel(ends: Start) -> None:
    one, other = ends()
    before, pid = (await up(one, other)).spi_in, one.pid
    await one.stop()
    first = one.overlay._daemon
    one.overlay = one.agent()
    one.task = asyncio.create_task(one.overlay.run())
    assert (await up(one, other)).spi_in == before
    assert one.pid == pid
    await one.overlay.stop()
    assert first is not None
    first._reap()
