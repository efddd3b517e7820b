"""Keeps this node's IPsec tunnels as the config wants them, and knows how they are.

Level-triggered: every second, what strongSwan has is compared with what there should be. A tunnel that is not there is begun again and again; one that
is not wanted any more ends.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import vici

from agent.charon import Charon, CharonFailed, CharonRefused, NoIpsec, find_charon, prepare, who_encrypts
from agent.envoy.inputs import AgentSnapshot, NodeIdentity
from agent.ipsec import CHILD, Association, Connection, Trust, associations, connections, trust
from agent.log import log
from agent.protocol.overlay import overlay_address
from agent.protocol.report import MOST_IPSEC_TUNNELS, IpsecTunnel

_LOOK_EVERY_S = 1.0
_TRY_AGAIN_S = 60.0
"""What is missing may be installed, or allowed, while the agent runs."""
_START_S = 10.0
_AGAIN_S = 2.0
"""Between two attempts to begin a tunnel."""
_STAND_IN_S = 8.0
"""After which the other end, which was not to begin, tries as well."""
_BEGIN_S = 8.0
_HANGS_AFTER = 2
"""Calls in a row without an answer."""
_MOST_AT_ONCE = 8
_STARTING = "strongSwan is starting"
_TELLING = ("received ", "giving up", "no ", "authentication", "certificate", "subject certificate", "unable", "constraint")
"""How lines of strongSwan's log begin that say why a tunnel is not there."""


@dataclass
class _Flap:
    """What became of a tunnel that is not up, or was not."""

    since: float
    """Of the steady clock: not up for so long."""
    at: float | None = None
    """Unix seconds when it last went down."""
    reason: str = ""
    tried: float = float("-inf")
    error: str = ""
    """Of the last attempt."""


@dataclass
class Overlay:
    """`changed` is called when this node becomes able to use IPsec, or is no more."""

    off: str
    """Why the node is not to use IPsec; empty: it is to."""
    charon: Path | None
    esp: str
    dialable: Callable[[], bool]
    """Whether others can reach the IKE daemon."""
    run_dir: Path
    log_path: Path
    node: Callable[[], NodeIdentity]
    snapshot: Callable[[], AgentSnapshot]
    changed: Callable[[], None]
    reason: str = field(default=_STARTING, init=False)
    """Why there is no IPsec here; empty: there is."""

    def __post_init__(self) -> None:
        self.reason = self.off or _STARTING
        self._daemon: Charon | None = None
        self._known: dict[str, Association] = {}
        self._flaps: dict[str, _Flap] = {}
        self._wanted: Mapping[str, Connection] = {}
        self._loaded: dict[str, dict[str, Any]] = {}
        self._trusted = Trust()
        self._generation = 0
        self._silent = 0
        self._beginning: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="vici")
        # Apart, so that no look waits for nodes that do not answer.
        self._beginners = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="vici-begin")

    @property
    def decided(self) -> bool:
        """Whether it is known if this node can."""
        return self.reason != _STARTING

    def tunnels(self, site_id: str) -> tuple[IpsecTunnel, ...]:
        """To the nodes of a peer."""
        own = (node_id for node_id, connection in self._wanted.items() if connection.site_id == site_id)
        return tuple(self._tunnel(node_id) for node_id in own)[:MOST_IPSEC_TUNNELS]

    def _tunnel(self, node_id: str) -> IpsecTunnel:
        flap = self._flaps.get(node_id) or _Flap(0)
        up = self._known.get(node_id)
        found = up.tunnel if up else IpsecTunnel(node_id=node_id, up=False)
        reason = flap.reason if up or not flap.error else f"{flap.reason}; {flap.error}".removeprefix("; ")
        return found.model_copy(update={"last_flap": flap.at, "flap_reason": reason})

    async def run(self) -> NoReturn:
        while True:
            if not self.off:
                try:
                    await self._serve()
                except* NoIpsec as errors:
                    self._say(str(errors.exceptions[0]))
                    await self.stop()
            await asyncio.sleep(_TRY_AGAIN_S)

    async def stop(self) -> None:
        if self._daemon is not None:
            await self._daemon.stop()

    def _say(self, reason: str) -> None:
        if reason != self.reason:
            log.info("IPsec", usable=not reason, reason=reason)
            self.reason = reason
            self.changed()

    async def _serve(self) -> None:
        """Raises `NoIpsec` if this node cannot."""
        esp, address = who_encrypts(self.esp), overlay_address(self.node().node_id)
        binary = find_charon(self.charon)
        prepare(address, esp)
        self._daemon = Charon(binary, self.run_dir, self.log_path, esp, address)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._daemon.run(), name="charon")
            await self._started(self._daemon)
            self._say("")
            while True:
                await self._look(self._daemon)
                await asyncio.sleep(_LOOK_EVERY_S)

    async def _started(self, daemon: Charon) -> None:
        """Until the daemon answers; raises `NoIpsec` if it lacks something."""
        deadline = time.monotonic() + _START_S
        while silence := await self._in_thread(lambda: _silence(daemon)):
            if time.monotonic() > deadline:
                self._say(f"strongSwan does not answer ({silence}): see {self.log_path}")
            await asyncio.sleep(0.1)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _look(self, daemon: Charon) -> None:
        """One pass."""
        snapshot, node = self.snapshot(), self.node()
        self._wanted = connections(snapshot, node, dialable=self.dialable())
        trusted, told = trust(snapshot, node), self._generation
        try:
            up, building = await self._in_thread(lambda: self._settle(daemon, trusted))
        except CharonRefused as error:
            log.warning("strongSwan refuses", reason=str(error))
            return
        except CharonFailed as error:
            self._silent += 1
            if self._silent >= _HANGS_AFTER:
                log.warning("strongSwan hangs, and is started again", error=str(error))
                daemon.kill()
                self._note({}, lost=True)
            return
        self._silent = 0
        self._note(up, lost=self._generation != told)
        for node_id in sorted(self._due(building)):
            task = asyncio.create_task(self._begin(daemon, node_id), name=f"ipsec {node_id}")
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    def _settle(self, daemon: Charon, trusted: Trust) -> tuple[dict[str, Association], frozenset[str]]:
        """Tell the daemon what differs from what it has, and ask how its tunnels are. In a thread."""
        with daemon.session() as session:
            if daemon.starts != self._generation:
                self._generation, self._trusted = daemon.starts, Trust()
                self._loaded = {name.decode(): {} for name in session.get_conns()["conns"]}
            if trusted != self._trusted:
                _load_trust(session, trusted)
                self._trusted, self._loaded = trusted, {name: {} for name in self._loaded}
            for name in self._loaded.keys() - self._wanted.keys():
                session.unload_conn({"name": name})
                with suppress(vici.exception.CommandException):  # there was none
                    list(session.terminate({"ike": name, "force": "yes", "timeout": "-1"}))
                del self._loaded[name]
            for name, connection in self._wanted.items():
                if self._loaded.get(name) != connection.config:
                    try:
                        session.load_conn({name: connection.config})
                    except vici.exception.CommandException as error:  # which does not hold back the others
                        self._flaps.setdefault(name, _Flap(time.monotonic())).error = f"strongSwan refuses it: {error}"
                    else:
                        self._loaded[name] = connection.config
            return associations(list(session.list_sas()))

    def _note(self, up: Mapping[str, Association], *, lost: bool) -> None:
        """Which tunnels came up or went down since the last pass. `lost`: the daemon that had them does not answer, or is another one now."""
        now = time.monotonic()
        for node_id in self._wanted:
            flap = self._flaps.setdefault(node_id, _Flap(now))
            if node_id in up:
                flap.since, flap.error = now, ""
            elif node_id in self._known:
                flap.at, flap.reason = time.time(), _why(self._known[node_id], lost=lost)
                flap.since = now - _STAND_IN_S if lost else now  # the other end does not know yet
        self._flaps = {node_id: flap for node_id, flap in self._flaps.items() if node_id in self._wanted}
        self._known = {node_id: found for node_id, found in up.items() if node_id in self._wanted}

    def _due(self, building: Collection[str]) -> set[str]:
        """Connections that this node begins now."""
        now = time.monotonic()
        return {
            node_id
            for node_id, connection in self._wanted.items()
            if node_id in self._loaded
            and node_id not in self._known
            and node_id not in building
            and (connection.begins or (connection.dialable and now - self._flaps[node_id].since > _STAND_IN_S))
            and now - self._flaps[node_id].tried > _AGAIN_S
        }

    async def _begin(self, daemon: Charon, node_id: str) -> None:
        flap = self._flaps[node_id]
        flap.tried = float("inf")
        try:
            flap.error = await asyncio.get_running_loop().run_in_executor(self._beginners, _initiated, daemon, node_id)
        finally:
            flap.tried = time.monotonic()


def _silence(daemon: Charon) -> str:
    """Why the daemon does not answer; empty if it does. In a thread."""
    try:
        daemon.check()
    except CharonFailed as error:
        return str(error)
    return ""


def _why(before: Association, *, lost: bool) -> str:
    """A tunnel is not there any more."""
    if lost:
        return "this node's IKE daemon ended or hung"
    return "the peer was silent for too long" if before.asks else "the peer closed it"


def _load_trust(session: vici.Session, trusted: Trust) -> None:
    session.clear_creds()
    session.flush_certs()
    for pem in trusted.anchors:
        session.load_cert({"type": "X509", "flag": "CA", "data": pem})
    for pem in trusted.lists:
        session.load_cert({"type": "X509_CRL", "flag": "NONE", "data": pem})
    if trusted.private_key_pem:
        session.load_key({"type": "any", "data": trusted.private_key_pem})


def _initiated(daemon: Charon, node_id: str) -> str:
    """Why the tunnel did not come up; empty if it did. In a thread."""
    said: list[str] = []
    try:
        with daemon.session(_BEGIN_S + 2) as session:
            asked = {"ike": node_id, "child": CHILD, "timeout": str(int(_BEGIN_S * 1000)), "loglevel": "1"}
            said.extend(line["msg"].decode(errors="replace") for line in session.initiate(asked))
    except CharonFailed as error:
        telling = [line for line in said if line.startswith(_TELLING) and "cert request" not in line]
        return (telling[-1] if telling else str(error))[:200]
    return ""
