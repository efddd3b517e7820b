"""What sites tell each other without the control plane: which exports are healthy, asked for over every path in use.

`PeerServer` answers what comes in through this node's gateway, `Probe` asks the peers through this node's tunnels.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import uniform
from typing import Literal

import h11
import httpx
from pydantic import ValidationError

from agent.envoy.inputs import AgentSnapshot, NodeIdentity, PeerView, body
from agent.protocol.items import Export, ItemKind
from agent.protocol.peering import PEER_DOCUMENT_PATH, PEER_HEALTH_PATH, ExportState, PeerDocument
from agent.protocol.report import PeerHealth

ASKER_HEADER = b"x-isthmus-peer"
"""Set by the gateway: the URI of the asking peer's certificate, `spiffe://<trust domain>/tenant/<id>/site/<id>/node/<id>`."""
PROBE_EVERY_S = 1.0
PROBES_PER_S = 100
"""Of all peers together; with more of them, each is asked less often."""
_PROBE_TIMEOUT_S = 1.5
_FAILURES_UNTIL_DOWN = 2
_READ_BYTES = 64 << 10
_ERROR_LENGTH = 200
_LOWER_FACTOR = 0.75


def bucketed(healthy: int, before: int) -> int:
    """`healthy` rounded down to a power of two, which is left downwards only at three quarters of it.

    So pods that come and go in one cluster seldom change the config of another. 0 is exact.
    """
    bucket = 1 << (healthy.bit_length() - 1) if healthy else 0
    stays = bucket < before and healthy >= before * _LOWER_FACTOR
    return before if stays else bucket


@dataclass
class Exports:
    """What this node tells peers about its exports. `snapshot` is what Envoy has, `healthy` counts a pool's usable endpoints here."""

    node: NodeIdentity
    snapshot: Callable[[], AgentSnapshot]
    manifest_hash: Callable[[], str | None]
    healthy: Callable[[str], int]
    _buckets: Mapping[str, int] = field(default_factory=dict, init=False)

    def document(self, asker: str) -> PeerDocument:
        """For the site `asker`: only exports that it may use."""
        exports = {item.id.key: body(item, Export) for item in self.snapshot().by_kind[ItemKind.EXPORT]}
        self._buckets = {pool: bucketed(self.healthy(pool), self._buckets.get(pool, 0)) for pool in exports}
        open_ = [pool for pool, export in exports.items() if any(asker in use.peers for use in export.uses)]
        return PeerDocument(
            site_id=self.node.site_id,
            node_id=self.node.node_id,
            now=time.time(),
            manifest_hash=self.manifest_hash(),
            exports=tuple(ExportState(pool=pool, healthy=self._buckets[pool]) for pool in open_),
        )


class PeerServer:
    """The document over HTTP/1.1 on a Unix socket; `document` makes the one for an asking site."""

    def __init__(self, socket: Path, document: Callable[[str], PeerDocument]) -> None:
        self._socket = socket
        self._document = document
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._socket)
        self._socket.chmod(0o600)

    async def stop(self) -> None:
        """Connections end as if the other side had ended them."""
        if self._server is None:
            return
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._idle.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        self._writers.add(writer)
        self._idle.clear()
        try:
            while (request := await _next_request(connection, reader)) is not None:
                writer.write(self._respond(connection, request))
                await writer.drain()
                if connection.our_state is not h11.DONE:
                    break
                connection.start_next_cycle()
        except (h11.RemoteProtocolError, ConnectionError):
            pass  # whoever speaks like this gets a closed connection
        finally:
            writer.close()
            self._writers.discard(writer)
            if not self._writers:
                self._idle.set()

    def _respond(self, connection: h11.Connection, request: h11.Request) -> bytes:
        status, body = self._answer(request)
        head = h11.Response(
            status_code=status, headers=[("content-type", "application/json"), ("content-length", str(len(body)))], reason=b""
        )
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        return b"".join(data for event in events if (data := connection.send(event)))

    def _answer(self, request: h11.Request) -> tuple[int, bytes]:
        path = request.target.partition(b"?")[0].decode("ascii")
        if path == PEER_HEALTH_PATH:
            return 200, b"{}"
        asker = dict(request.headers).get(ASKER_HEADER)
        if path != PEER_DOCUMENT_PATH or asker is None:
            return 404, b"{}"
        return 200, self._document(_site_of(asker.decode("latin-1"))).model_dump_json().encode()


def _site_of(uri: str) -> str:
    return uri.partition("/site/")[2].partition("/")[0]


async def _next_request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The next whole request; its body is of no interest. None when the other side is done."""
    request: h11.Request | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif not isinstance(event, h11.Data):
            return None


class _Silent(Exception):
    """The peer, or an Envoy on the way, answers with an error."""


@dataclass(frozen=True)
class _Path:
    """What is known of one peer."""

    since: float
    view: PeerView = field(default_factory=PeerView)
    last_evidence: float | None = None
    rtt_ms: float | None = None
    error: str = ""
    failures: int = 0

    def succeeded(self, document: PeerDocument, rtt_ms: float, now: float) -> "_Path":
        view = PeerView(reachable=True, exports={export.pool: export.healthy for export in document.exports})
        return _Path(self._since(view, now), view, now, rtt_ms)

    def without_document(self, error: str, now: float) -> "_Path":
        """The peer's agent is away: its Envoy serves on, and what it exported last stands."""
        view = replace(self.view, reachable=True)
        return _Path(self._since(view, now), view, now, self.rtt_ms, error)

    def failed(self, error: str, now: float) -> "_Path":
        failures = self.failures + 1
        view = replace(self.view, reachable=False) if failures >= _FAILURES_UNTIL_DOWN else self.view
        return replace(self, since=self._since(view, now), view=view, error=error, failures=failures)

    def _since(self, view: PeerView, now: float) -> float:
        return self.since if view.reachable == self.view.reachable else now

    @property
    def state(self) -> Literal["UP", "DOWN", "UNKNOWN"]:
        match self.view.reachable:
            case True:
                return "UP"
            case False:
                return "DOWN"
            case _:
                return "UNKNOWN"


class Probe:
    """Asks every watched peer for its document about every second; `changed` is called when a view is different."""

    def __init__(self, socket: Path, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._paths: dict[str, _Path] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        transport = httpx.AsyncHTTPTransport(uds=str(socket), verify=False)
        self._http = httpx.AsyncClient(transport=transport, timeout=_PROBE_TIMEOUT_S, trust_env=False)

    def watch(self, sites: Iterable[str]) -> None:
        """Probe exactly these from now on."""
        wanted = set(sites)
        for site in self._tasks.keys() - wanted:
            self._tasks.pop(site).cancel()
            self._paths.pop(site, None)
        for site in wanted - self._tasks.keys():
            self._paths[site] = _Path(since=time.time())
            self._tasks[site] = asyncio.create_task(self._follow(site), name=f"probe {site}")

    @property
    def views(self) -> Mapping[str, PeerView]:
        return {site: path.view for site, path in sorted(self._paths.items())}

    @property
    def health(self) -> tuple[PeerHealth, ...]:
        return tuple(
            PeerHealth(
                site_id=site, state=path.state, since=path.since, last_evidence=path.last_evidence, rtt_ms=path.rtt_ms, error=path.error
            )
            for site, path in sorted(self._paths.items())
        )

    async def close(self) -> None:
        self.watch(())
        await self._http.aclose()

    async def _follow(self, site: str) -> None:
        while True:
            before = self._paths[site]
            after = self._paths[site] = await self._ask(site, before)
            if after.view != before.view:
                self._changed()
            every_s = max(PROBE_EVERY_S, len(self._tasks) / PROBES_PER_S)
            await asyncio.sleep(uniform(0.9, 1.1) * every_s)

    async def _ask(self, site: str, path: _Path) -> _Path:
        try:
            document, rtt_ms = await self._document(site)
        except httpx.ConnectError:
            return path  # that is our own Envoy, which says nothing about the peer
        except (_Silent, httpx.HTTPError, ValidationError) as error:
            reason = str(error) or type(error).__name__
            if await self._gateway_answers(site):
                return path.without_document(reason, time.time())
            return path.failed(reason, time.time())
        if document.site_id != site:
            return path.failed(f"answered by site {document.site_id}", time.time())
        return path.succeeded(document, rtt_ms, time.time())

    async def _document(self, site: str) -> tuple[PeerDocument, float]:
        """With the time that it took, in milliseconds."""
        clock = asyncio.get_running_loop().time
        began = clock()
        response = await self._http.get(f"http://{site}{PEER_DOCUMENT_PATH}")
        if not response.is_success:
            raise _Silent(f"{response.status_code} {response.text[:_ERROR_LENGTH]}")
        return PeerDocument.model_validate_json(response.content), (clock() - began) * 1000

    async def _gateway_answers(self, site: str) -> bool:
        """Whether the peer's Envoy serves, although its agent does not."""
        try:
            return (await self._http.get(f"http://{site}{PEER_HEALTH_PATH}")).is_success
        except httpx.HTTPError:
            return False
