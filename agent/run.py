"""Puts the agent together and runs it: the only place where its parts know each other."""

import asyncio
import json
import os
import signal
import ssl
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import certifi
import structlog

from agent.control import ControlPlane, source_address
from agent.discovery.kubeconfig import ClusterAccess, from_kubeconfig, in_cluster
from agent.enrol import Applicant, Identity, enrol
from agent.envoy.bootstrap import bootstrap
from agent.envoy.inputs import Addresses, AgentSnapshot, NodeIdentity
from agent.envoy.resources import Resources
from agent.errors import Misconfigured, StorageFailed, Unreachable
from agent.intake import Intake, restored
from agent.origins import SiteOrigins
from agent.peers import Exports, PeerServer, Probe
from agent.protocol.enrolment import Credentials
from agent.protocol.items import Gateway, ItemKind
from agent.protocol.report import DiscoveryReport, OriginHealth, PeerHealth
from agent.proxy import Proxy, ProxyState, find_envoy
from agent.reconcile import Reconciler, Verdict
from agent.reporting import Heartbeats, Metrics, Reports
from agent.scrape import Scrape
from agent.settings import Settings, host_and_port
from agent.state import Keeper, StateDirectory, private_key_pem, write
from agent.xds import Outcome, XdsServer

log = structlog.get_logger()

VERSION = version("isthmus")
STATUS_FILE = "status.json"
_STATUS_EVERY_S = 1.0
_ADVERTISE_AGAIN_S = 60.0
_ANY = ("0.0.0.0", "::")  # noqa: S104  # to recognise them


async def run(settings: Settings) -> None:
    """Enrol if need be, then serve until told to stop: SIGTERM and SIGINT drain and stop Envoy, SIGHUP leaves it to the next agent.

    Raises `AgentError` when there is no point in trying again.
    """
    find_envoy(settings.envoy)
    settings.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings.sockets.chmod(0o700)
    with StateDirectory(settings.state_dir) as directory:
        stopping = _stop_signal()
        enrolling = asyncio.create_task(_credentials(settings, directory))
        either: list[asyncio.Future[Any]] = [enrolling, stopping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not enrolling.done():
            enrolling.cancel()
            return
        await Node(settings, directory, enrolling.result()).serve(stopping)


def _stop_signal() -> "asyncio.Future[signal.Signals]":
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(which: signal.Signals) -> None:
        if not stopping.done():
            stopping.set_result(which)

    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(which, stop, which)
    return stopping


async def _credentials(settings: Settings, directory: StateDirectory) -> Credentials:
    stored = directory.credentials()
    if stored is not None:
        return stored
    applicant = Applicant(settings.site, settings.node, settings.labels, settings.latitude, settings.longitude, VERSION)
    return await enrol(directory, settings.registration_token(), settings.control_plane_urls, applicant)


def _cluster(settings: Settings) -> partial[ClusterAccess] | None:
    """How to read the access to the node's own cluster; raises `Misconfigured` if a named file is not there."""
    match settings.kubeconfig:
        case "none":
            return None
        case "in-cluster":
            return partial(in_cluster)
        case "auto":
            return partial(in_cluster) if "KUBERNETES_SERVICE_HOST" in os.environ else None
        case name:
            path = Path(name).absolute()
            if not path.is_file():
                raise Misconfigured(f"{path} (kubeconfig) is not a file")
            return partial(_from_file, path)


def _from_file(path: Path) -> ClusterAccess:
    try:
        return from_kubeconfig(path.read_bytes(), path.parent)
    except OSError as error:
        raise Misconfigured(f"{path}: {error.strerror}") from error


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

    async def apply(self, resources: Resources) -> Outcome:
        return await self.xds.apply(resources)

    async def warming(self) -> int:
        return await self.proxy.admin.warming()


@dataclass
class Node:
    """One admitted node: all its loops, and what it has to say."""

    settings: Settings
    directory: StateDirectory
    credentials: Credentials
    gateways: tuple[Gateway, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        settings, run_dir, boot_id = self.settings, self.settings.sockets, uuid4().hex
        saved = self.directory.snapshot()
        self._key_pem = private_key_pem(self.directory.node_key()).decode()
        node = _node_identity(self.credentials, self._key_pem)
        urls = settings.control_plane_urls or self.credentials.control_plane_urls
        self._control = ControlPlane(urls, self.credentials.control_plane_anchor_pem)
        self._identity = Identity(self.directory, self._control, self.credentials, self._renewed)
        self._proxy = Proxy(
            binary=find_envoy(settings.envoy),
            run_dir=run_dir,
            log_path=settings.state_dir.absolute() / "envoy.log",
            bootstrap=bootstrap(node, str(run_dir)),
            concurrency=settings.concurrency,
            log_level=settings.envoy_log_level,
            drain_s=settings.drain_s,
        )
        self._metrics = Metrics()
        self._scrape = Scrape(self._proxy, self._nudge, self._metrics.add)
        self._xds = XdsServer(run_dir / "xds.sock", self._nudge)
        self._intake = Intake(self._control, restored(saved), self._nudge)
        self._probe = Probe(run_dir / "probe.sock", self._nudge)
        self._origins = SiteOrigins(node.site_id, _cluster(settings), lambda: self._intake.current.secrets, self._nudge)
        self._reconciler = Reconciler(
            node=node,
            addresses=_addresses(settings),
            run_dir=str(run_dir),
            trusted_ca_file=ssl.get_default_verify_paths().cafile or certifi.where(),
            wanted=lambda: self._intake.current,
            proxy=_Envoy(self._xds, self._proxy),
            origins=self._origins,
            peers=self._probe,
            own=lambda: self._scrape.own,
            passed=self._passed,
            changed=self._verdict_changed,
            start=saved,
        )
        self._keeper = Keeper(self.directory, self._reconciler.to_save)
        self._reports = Reports(self._control, self, boot_id, self._metrics)
        self._heartbeats = Heartbeats(self._control, self, boot_id, VERSION, self._reports.resend)
        exports = Exports(node, lambda: self._exported, lambda: self.verdict.applied_hash, self._usable)
        self._peer_server = PeerServer(run_dir / "peers.sock", exports.document)

    async def serve(self, stopping: "asyncio.Future[signal.Signals]") -> None:
        """Until the future says which signal came. If a loop fails, this fails too, and Envoy serves on for the next agent."""
        async with AsyncExitStack() as stack:
            for close in (self._control.close, self._proxy.admin.close, self._origins.close, self._probe.close):
                stack.push_async_callback(close)
            for start, stop in ((self._xds.start, self._xds.stop), (self._peer_server.start, self._peer_server.stop)):
                await start()
                stack.push_async_callback(stop)
            await self._run_until(stopping)
            await self._keeper.flush()
            if stopping.result() is not signal.SIGHUP:
                await self._proxy.stop()

    async def _run_until(self, stopping: "asyncio.Future[signal.Signals]") -> None:
        loops = (self._identity, self._proxy, self._intake, self._reconciler, self._keeper, self._scrape, self._reports, self._heartbeats)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop.run(), name=type(loop).__name__) for loop in loops]
            tasks += [group.create_task(self._advertise()), group.create_task(self._write_status())]
            which = await stopping
            log.info("stopping", signal=which.name)
            for task in tasks:
                task.cancel()

    # What wakes what

    def _nudge(self) -> None:
        self._reconciler.nudge()

    def _passed(self) -> None:
        self._keeper.keep()
        self._scrape.look()

    def _verdict_changed(self) -> None:
        self._heartbeats.beat()

    def _renewed(self, credentials: Credentials) -> None:
        self._reconciler.node = _node_identity(credentials, self._key_pem)
        self._nudge()

    # What there is to say

    @property
    def verdict(self) -> Verdict:
        return self._reconciler.verdict

    @property
    def proxy(self) -> ProxyState:
        return self._scrape.state

    @property
    def discoveries(self) -> tuple[DiscoveryReport, ...]:
        return self._origins.reports

    @property
    def origins(self) -> tuple[OriginHealth, ...] | None:
        return self._scrape.origins

    @property
    def peers(self) -> tuple[PeerHealth, ...]:
        return self._probe.health

    @property
    def warnings(self) -> tuple[str, ...]:
        skew_s = self._control.skew_s
        skew = f"the node's clock is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the control plane's" if skew_s else None
        fault = f"envoy refuses the node's own config: {self.verdict.fault}" if self.verdict.fault else None
        return tuple(text for text in (self._identity.warning, self._keeper.warning, skew, fault) if text)

    @property
    def _exported(self) -> AgentSnapshot:
        """What peers may be told of: not what has no endpoints only because they are still being looked up."""
        good = self._reconciler.good
        if self._origins.settled:
            return good
        return good.without(export.id for export in good.by_kind[ItemKind.EXPORT] if not self._reconciler.endpoints_of(export.id.key))

    def _usable(self, pool: str) -> int:
        """Endpoints of a pool that peers may count on: those that are there and that Envoy finds healthy, as soon as it has any."""
        health = self._scrape.health.get(pool)
        known = len(self._reconciler.endpoints_of(pool))
        return min(known, health.healthy) if health is not None and health.total else known

    async def _advertise(self) -> NoReturn:
        """Keep `gateways` right: the node's address may change."""
        while True:
            try:
                host, port = await self._advertised()
                self.gateways = (Gateway(node_id=self.credentials.node_id, host=host, port=port),)
                self._reports.look()
            except Unreachable as error:
                log.debug("no gateway to advertise", reason=str(error))
            await asyncio.sleep(_ADVERTISE_AGAIN_S if self.gateways else 1.0)

    async def _advertised(self) -> tuple[str, int]:
        listening = host_and_port(self.settings.gateway_address)
        if self.settings.advertised_gateway is not None:
            return host_and_port(self.settings.advertised_gateway, listening[1])
        return (await source_address(self._control.url), listening[1]) if listening[0] in _ANY else listening

    async def _write_status(self) -> NoReturn:
        """For `isthmus-agent status`, when there is something new."""
        written: dict[str, Any] = {}
        while True:
            status = self._status()
            if status != written:
                try:
                    await asyncio.to_thread(write, self.settings.sockets / STATUS_FILE, json.dumps({**status, "at": time.time()}).encode())
                    written = status
                except StorageFailed:
                    log.debug("the status cannot be written")
            await asyncio.sleep(_STATUS_EVERY_S)

    def _status(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "pid": os.getpid(),
            "version": VERSION,
            "site": self.credentials.site_name,
            "node": self.credentials.node_name,
            "control_plane": self._control.url,
            "connected": self._intake.connected,
            "last_error": self._heartbeats.last_error,
            "envoy": self.proxy,
            "envoy_pid": self._proxy.pid,
            "applied": verdict.applied_hash,
            "revision": verdict.applied_revision,
            "since": verdict.since,
            "rejected": [{"kind": it.kind, "key": it.key, "reason": it.reason} for it in verdict.rejected],
            "peers": {peer.site_id: {"state": peer.state, "since": peer.since, "error": peer.error} for peer in self.peers},
            "discoveries": {it.discovery: {"connected": it.connected, "reason": it.reason} for it in self.discoveries},
            "warnings": list(self.warnings),
        }
