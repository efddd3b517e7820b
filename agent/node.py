"""One admitted node: the only place where the agent's parts know each other."""

import asyncio
import os
import signal
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn
from uuid import uuid4

import certifi

from agent.advertise import Advertiser
from agent.control import ControlPlane
from agent.discovery.kubeconfig import ClusterAccess
from agent.election import Election
from agent.enrol import Identity
from agent.envoy.bootstrap import MAX_HEAP_BYTES, bootstrap
from agent.envoy.inputs import Addresses, AgentSnapshot, NodeIdentity, body
from agent.envoy.resources import Resources
from agent.errors import Misconfigured, Retired
from agent.forward import Forwarder
from agent.intake import Intake, restored
from agent.ipsec import PORT
from agent.leases import Leases
from agent.log import log
from agent.origins import SiteOrigins
from agent.overlay import Overlay
from agent.paths import home_edges
from agent.peers import Exports, PeerServer
from agent.pods import SitePods
from agent.probes import Probes
from agent.protocol.enrolment import Credentials
from agent.protocol.items import Edge, Gateway, ItemKind, Peer, Site
from agent.protocol.report import DiscoveryReport, EdgeHealth, GatewayListener, IpsecAbility, MultiClusterServices, OriginHealth, PeerHealth
from agent.proxy import Proxy, ProxyState, find_envoy
from agent.publish import Publishing, hindrance
from agent.published import Publisher
from agent.reconcile import Reconciler, Verdict
from agent.reporting import Heartbeats, Metrics, Reports
from agent.scrape import Scrape
from agent.service_exports import ServiceExports
from agent.settings import NOWHERE, Settings, host_and_port, usable_heap_bytes
from agent.state import Keeper, StateDirectory, private_key_pem
from agent.status import StatusFile
from agent.xds import Outcome, XdsServer

VERSION = version("isthmus")
_SHOWN = {"site_id", "path", "state", "since", "in_use", "reason", "tunnels", "tls", "error"}


def _addresses(settings: Settings) -> Addresses:
    host, port = host_and_port(settings.gateway_address)
    networks = (settings.inside_address, settings.outside_address, settings.service_address)
    inside, outside, service = (str(address) if address is not None else None for address in networks)
    return Addresses(host, port, inside=inside, outside=outside, service=service)


def _node_identity(credentials: Credentials, key_pem: str) -> NodeIdentity:
    return NodeIdentity(
        node_id=credentials.node_id,
        node_name=credentials.node_name,
        site_id=credentials.site_id,
        site_name=credentials.site_name,
        certificate_pem=credentials.certificate_pem,
        private_key_pem=key_pem,
    )


@dataclass
class _Envoy:
    """Envoy as the reconciler needs it: config in through xDS, warming out through the admin interface."""

    xds: XdsServer
    proxy: Proxy
    accepted: Resources | None = None

    async def apply(self, resources: Resources) -> Outcome:
        outcome = await self.xds.apply(resources)
        if outcome.accepted:
            self.accepted = resources
        return outcome

    async def warming(self) -> int:
        return await self.proxy.admin.warming()


@dataclass
class Node:
    """One admitted node: all its loops, and what it has to say."""

    settings: Settings
    directory: StateDirectory
    credentials: Credentials
    cluster: Callable[[], ClusterAccess] | None
    """How to reach the cluster that this node belongs to, if there is one."""

    def __post_init__(self) -> None:
        settings, run_dir, boot_id = self.settings, self.settings.sockets, uuid4().hex
        saved = self.directory.snapshot()
        self._key_pem = private_key_pem(self.directory.node_key()).decode()
        node = _node_identity(self.credentials, self._key_pem)
        urls = settings.control_plane_urls or self.credentials.control_plane_urls
        self._control = ControlPlane(urls, self.credentials.control_plane_anchor_pem)
        self._identity = Identity(self.directory, self._control, self.credentials, self._renewed)
        self._anchors_due = asyncio.Event()
        self._proxy = Proxy(
            binary=find_envoy(settings.envoy),
            run_dir=run_dir,
            log_path=settings.state_dir.absolute() / "envoy.log",
            bootstrap=bootstrap(node, str(run_dir), max_heap_bytes=usable_heap_bytes(MAX_HEAP_BYTES)),
            concurrency=settings.concurrency,
            log_level=settings.envoy_log_level,
            drain_s=settings.drain_s,
        )
        self._metrics = Metrics()
        self._scrape = Scrape(self._proxy, self._nudge, self._metrics.add)
        self._xds = XdsServer(run_dir / "xds.sock", self._nudge)
        self._intake = Intake(self._control, restored(saved), self._wanted_changed)
        self._probes = Probes(run_dir / "probe.sock", self._nudge, saved.dials, saved.paths)
        self._edges = Probes(run_dir / "probe.sock", lambda: None)
        self._origins = SiteOrigins(node.site_id, self.cluster, lambda: self._intake.current.secrets, self._nudge)
        self._pods = SitePods(self.cluster, lambda: self._intake.current.secrets, self._nudge)
        envoy = _Envoy(self._xds, self._proxy)
        publisher = Publisher(node.site_id, node.node_id, _addresses(settings).service)
        published_in = self.cluster if settings.publish else None
        self._service_exports = ServiceExports(
            self.cluster, lambda: self._origins.own_services, self._service_exports_changed, hindrance(publisher, published_in)
        )
        self._publishing = Publishing(
            publisher,
            published_in,
            self._published,
            lambda: envoy.accepted,
            self._nudge,
            self._service_exports,
        )
        self._reconciler = Reconciler(
            node=node,
            addresses=_addresses(settings),
            run_dir=str(run_dir),
            trusted_ca_file=ssl.get_default_verify_paths().cafile or certifi.where(),
            wanted=lambda: self._intake.current,
            proxy=envoy,
            origins=self._origins,
            pods=self._pods,
            peers=self._probes,
            own=lambda: self._scrape.own,
            passed=self._passed,
            changed=self._verdict_changed,
            start=saved,
            version=VERSION,
            workers=settings.concurrency,
            refused=lambda snapshot: {**self._publishing.refused(snapshot), **self._pods.refused(snapshot)},
            no_ipsec=lambda: self._overlay.reason,
        )
        self._overlay = Overlay(
            off=self._without_ipsec(),
            charon=settings.charon,
            esp=settings.ipsec,
            dialable=lambda: bool(self._ike_address[0]),
            run_dir=run_dir,
            log_path=settings.state_dir.absolute() / "charon.log",
            node=lambda: self._reconciler.node,
            snapshot=lambda: self._reconciler.good,
            changed=self._ipsec_changed,
        )
        self._keeper = Keeper(self.directory, self._reconciler.to_save)
        self._reports = Reports(self._control, self, boot_id, self._metrics)
        electing = self.cluster if settings.leader_election else None
        self._election = Election(Leases(publisher), "discovery", electing, self._reports.look)
        identity = self._identity
        self._heartbeats = Heartbeats(self._control, self, boot_id, VERSION, self._reports.resend, identity.hurry, identity.retry)
        self._advertiser = Advertiser(settings, node.node_id, lambda: self._control.url, self._reports.look, self.cluster)
        self._forwarders = () if settings.forward_address is None else (self._forwarder(settings.forward_address),)
        self._status_file = StatusFile(run_dir, self._status)
        self._exports = Exports(node, lambda: self._exported, self._usable, self._probes.reaches)
        self._peer_server = PeerServer(run_dir / "peers.sock", self._exports.document)

    def _without_ipsec(self) -> str:
        """Why this node is not to use IPsec, if it is not."""
        if self.credentials.kind == "regional_edge":
            return "regional edges have none"
        return "AGENT_IPSEC is off" if self.settings.ipsec == "off" else ""

    def _forwarder(self, address: str) -> Forwarder:
        if self.credentials.kind != "regional_edge":
            raise Misconfigured("only regional edges carry connections to the control plane: leave AGENT_FORWARD_ADDRESS out")
        host, port = host_and_port(address)
        return Forwarder(host, port, lambda: self._control.own_urls)

    async def serve(self, stopping: "asyncio.Future[signal.Signals]") -> None:
        """Until the future says which signal came. If a loop fails, this fails too, and Envoy serves on for the next agent.

        Raises `Retired` when the control plane says that this node is, after Envoy was drained and stopped.
        """
        async with AsyncExitStack() as stack:
            closing = (self._control, self._proxy.admin, self._origins, self._pods, self._probes, self._edges)
            for close in [each.close for each in closing]:
                stack.push_async_callback(close)
            for start, stop in ((self._xds.start, self._xds.stop), (self._peer_server.start, self._peer_server.stop)):
                await start()
                stack.push_async_callback(stop)
            retired: BaseException | None = None
            try:
                await self._run_until(stopping)
            except* Retired as told:
                retired = told.exceptions[0]
                self._exports.draining = True
                log.error("this node was retired, stopping", reason=str(retired))
            await self._keeper.flush()
            if retired or stopping.result() is not signal.SIGHUP:
                await asyncio.gather(self._publishing.withdraw(), self._election.resign())
                await self._proxy.stop()
                await self._overlay.stop()
            if retired:
                raise retired

    async def _run_until(self, stopping: "asyncio.Future[signal.Signals]") -> None:
        serving = (self._identity, self._proxy, self._intake, self._reconciler, self._keeper, self._scrape, self._overlay)
        telling = (self._reports, self._heartbeats, self._advertiser, self._election, self._status_file, *self._forwarders)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(loop.run(), name=type(loop).__name__)
                for loop in (*serving, self._publishing, self._service_exports, *telling)
            ]
            tasks.append(group.create_task(self._keep_trusting(), name="trust"))
            which = await stopping
            log.info("stopping", signal=which.name)
            self._exports.draining = which is not signal.SIGHUP
            for task in tasks:
                task.cancel()

    # What wakes what

    def _nudge(self) -> None:
        self._reconciler.nudge()

    def _ipsec_changed(self) -> None:
        self._nudge()
        self._reports.look()

    def _wanted_changed(self) -> None:
        self._anchors_due.set()
        self._nudge()

    async def _keep_trusting(self) -> NoReturn:
        """The control plane under the roots that it announces."""
        while True:
            await self._anchors_due.wait()
            self._anchors_due.clear()
            site = self._intake.current.snapshot.site
            if site is not None:
                await self._identity.trust(body(site, Site).control_plane_anchor_pem)

    def _passed(self) -> None:
        self._edges.watch(home_edges(self._reconciler.good))
        self._keeper.keep()
        self._scrape.look()

    def _verdict_changed(self) -> None:
        self._heartbeats.beat()
        self._publishing.look()

    def _service_exports_changed(self) -> None:
        self._publishing.wake()
        self._reports.look()

    def _renewed(self, credentials: Credentials) -> None:
        if credentials.control_plane_urls and not self.settings.control_plane_urls:
            self._control.follow(credentials.control_plane_urls)
        self._reconciler.node = _node_identity(credentials, self._key_pem)
        self._nudge()

    # What there is to say

    @property
    def serves(self) -> bool:
        """Whether Envoy runs with a config of the control plane's, be it one from before a restart."""
        return self.proxy == "live" and self.verdict.applied_hash is not None and not self._exports.draining

    @property
    def verdict(self) -> Verdict:
        return self._reconciler.verdict

    @property
    def proxy(self) -> ProxyState:
        return self._scrape.state

    @property
    def issuer(self) -> str:
        return self._identity.issuer

    @property
    def pace_s(self) -> float:
        return self._heartbeats.pace_s

    @property
    def gateways(self) -> tuple[Gateway, ...] | None:
        return self._advertiser.gateways

    @property
    def gateway_listener(self) -> GatewayListener:
        at = self._reconciler.addresses
        return GatewayListener(address=at.gateway_host, port=at.gateway_port, networks=at.gateway_networks)

    @property
    def ipsec(self) -> IpsecAbility | None:
        """None: not known yet."""
        if not self._overlay.decided or self.gateways is None:
            return None
        if self._overlay.reason:
            return IpsecAbility(able=False, reason=self._overlay.reason)
        host, port = self._ike_address
        return IpsecAbility(able=True, host=host, port=port)

    @property
    def _ike_address(self) -> tuple[str, int]:
        """Where peers reach the IKE daemon; without a host, they cannot."""
        told = self.settings.advertised_ipsec
        if told == NOWHERE:
            return "", PORT
        if told is not None:
            return host_and_port(told, PORT)
        return (self.gateways[0].host if self.gateways else "", PORT)

    @property
    def edges(self) -> tuple[EdgeHealth, ...]:
        return self._edges.edge_health(self._scrape.tunnels, self._scrape.encryption.of)

    @property
    def discoveries(self) -> tuple[DiscoveryReport, ...]:
        """All nodes of a site discover the same services: one suffices to tell them."""
        reports = self._origins.reports
        return reports if self._election.leads else tuple(report.model_copy(update={"services": None}) for report in reports)

    @property
    def multi_cluster_services(self) -> MultiClusterServices | None:
        return self._service_exports.report

    @property
    def origins(self) -> tuple[OriginHealth, ...] | None:
        return self._scrape.origins

    @property
    def peers(self) -> tuple[PeerHealth, ...]:
        return self._probes.health(self._scrape.encryption.of, self._overlay.tunnels)

    @property
    def warnings(self) -> tuple[str, ...]:
        skew_s = self._control.skew_s
        skew = f"the node's clock is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the control plane's" if skew_s else None
        fault = f"envoy refuses the node's own config: {self.verdict.fault}" if self.verdict.fault else None
        every = (
            self._identity.warning,
            self._keeper.warning,
            skew,
            fault,
            self._heartbeats.warning,
            self._advertiser.warning,
            self._election.warning,
        )
        return tuple(text for text in every if text)

    @property
    def _exported(self) -> AgentSnapshot:
        """What peers may be told of: not what has no endpoints only because they are still being looked up."""
        good = self._reconciler.good
        if self._origins.settled:
            return good
        return good.without(export.id for export in good.by_kind[ItemKind.EXPORT] if not self._reconciler.endpoints_of(export.id.key))

    def _published(self) -> AgentSnapshot | None:
        """What the control plane wants, with the last version of what this agent does not understand; None while nothing is served."""
        if not self.serves:
            return None
        wanted, good = self._intake.current, self._reconciler.good
        broken = {(it.kind, it.key) for it in wanted.broken}
        stand_ins = [item for id, item in good.items.items() if (id.kind, id.key) in broken]
        return wanted.snapshot.with_items(stand_ins) if stand_ins else wanted.snapshot

    def _usable(self, pool: str) -> int:
        """Endpoints of a pool that peers may count on: those that are there and that Envoy finds healthy, as soon as it has any."""
        health = self._scrape.health.get(pool)
        known = len(self._reconciler.endpoints_of(pool))
        return min(known, health.healthy) if health is not None and health.total else known

    def _names(self) -> dict[str, str]:
        """Of peers and regional edges, by id."""
        known = self._intake.current.snapshot.by_key
        peers = {id: body(item, Peer).name for id, item in known[ItemKind.PEER].items()}
        return peers | {id: body(item, Edge).name for id, item in known[ItemKind.EDGE].items()}

    def _status(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "pid": os.getpid(),
            "version": VERSION,
            "kind": self.credentials.kind,
            "site": self.credentials.site_name,
            "node": self.credentials.node_name,
            "control_plane": self._control.url,
            "connected": self._intake.connected,
            "last_error": self._heartbeats.last_error,
            "gateways": [f"{it.host}:{it.port}" for it in self.gateways or ()],
            "envoy": self.proxy,
            "envoy_pid": self._proxy.pid,
            "applied": verdict.applied_hash,
            "revision": verdict.applied_revision,
            "since": verdict.since,
            "rejected": [{"kind": it.kind, "key": it.key, "reason": it.reason} for it in verdict.rejected],
            "peers": [it.model_dump(include=_SHOWN) for it in self.peers],
            "edges": [it.model_dump(include=_SHOWN) for it in self.edges],
            "names": self._names(),
            "discoveries": {it.discovery: {"connected": it.connected, "reason": it.reason} for it in self.discoveries},
            "ipsec": self._overlay.reason or "usable",
            "warnings": list(self.warnings),
        }
