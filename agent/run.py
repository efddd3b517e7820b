"""From the settings to a node that serves: enrolment if need be, and the signals that end it."""

import asyncio
import gc
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agent.discovery.kubeconfig import ClusterAccess, from_kubeconfig, in_cluster
from agent.enrol import Applicant, enrol
from agent.errors import Misconfigured, Retired, StorageFailed
from agent.health import DEFAULT_PORT, answering
from agent.log import log
from agent.node import VERSION, Node
from agent.protocol.enrolment import Credentials
from agent.proxy import find_envoy
from agent.settings import NOWHERE, Settings, host_and_port
from agent.state import StateDirectory

COLLECTED_AFTER = 20_000
"""New objects, instead of 700: a change makes thousands that are no garbage, and waits while they are looked at."""


async def run(settings: Settings) -> None:
    """Enrol if need be, then serve until told to stop: SIGTERM and SIGINT drain and stop Envoy, SIGHUP leaves it to the next agent.

    Raises `AgentError` when there is no point in trying again, such as `Retired`, also for every later run with this state directory.
    """
    gc.set_threshold(COLLECTED_AFTER)
    gc.freeze()
    find_envoy(settings.envoy)
    cluster = _cluster(settings)
    _make_private(settings.sockets)
    node: Node | None = None
    probed = host_and_port(settings.health_address, DEFAULT_PORT) if settings.health_address else None
    with StateDirectory(settings.state_dir) as directory:
        if said := directory.retirement():
            raise _retired(directory, said)
        async with answering(probed, lambda: node is not None and node.serves):
            stopping = _stop_signal()
            enrolling = asyncio.create_task(_credentials(settings, directory))
            either: list[asyncio.Future[Any]] = [enrolling, stopping]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not enrolling.done():
                enrolling.cancel()
                return
            credentials = enrolling.result()
            if credentials.kind == "regional_edge":
                _check_edge(settings)
                cluster = None
            node = Node(settings, directory, credentials, cluster)
            try:
                await node.serve(stopping)
            except Retired as told:
                with suppress(StorageFailed):  # the next agent is told again
                    directory.retire(str(told))
                raise _retired(directory, str(told)) from told


def _make_private(run_dir: Path) -> None:
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_dir.chmod(0o700)
    except OSError as error:
        raise Misconfigured(f"{run_dir} (run directory) cannot be made, for this user alone: {error.strerror}") from error


def _retired(directory: StateDirectory, said: str) -> Retired:
    what_next = f"its state stays in {directory.path}; to register it anew, give it an empty state directory and a new token"
    return Retired(f"this node was retired and serves no more; the control plane said {said!r}; {what_next}", 401, ("Revoked",))


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
        log.info("registered already", site=stored.site_name, node=stored.node_name, node_id=stored.node_id)
        return stored
    applicant = Applicant(settings.site, settings.node, settings.labels, settings.latitude, settings.longitude, VERSION)
    return await enrol(directory, settings.registration_token(), settings.control_plane_urls, applicant)


def _check_edge(settings: Settings) -> None:
    """It has no services of its own, and sites must be able to dial it."""
    if settings.kubeconfig not in ("auto", "none"):
        raise Misconfigured("this node belongs to a regional edge, which discovers nothing: leave AGENT_KUBECONFIG out")
    if settings.advertised_gateway == NOWHERE:
        raise Misconfigured("this node belongs to a regional edge, which sites dial: AGENT_ADVERTISED_GATEWAY cannot be none")
    if needs := _needs_cluster(settings):
        raise Misconfigured(f"this node belongs to a regional edge, which has no cluster: leave {needs} out")


def _needs_cluster(settings: Settings) -> str:
    """The first variable that is set and means nothing without a cluster."""
    return next((f"AGENT_{name.upper()}" for name in ("publish", "gateway_service", "leader_election") if getattr(settings, name)), "")


def _cluster(settings: Settings) -> partial[ClusterAccess] | None:
    """How to read the access to the node's own cluster; raises `Misconfigured` if a named file is not there, or there is none and has to be."""
    match settings.kubeconfig:
        case "in-cluster":
            return partial(in_cluster)
        case "auto" if "KUBERNETES_SERVICE_HOST" in os.environ:
            return partial(in_cluster)
        case "auto" | "none":
            if needs := _needs_cluster(settings):
                raise Misconfigured(f"this node has no cluster: set AGENT_KUBECONFIG, or leave {needs} out")
            return None
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
