"""What this node says to its peers without the control plane, through its gateway: which exports are healthy, and whether it reaches them."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import h11

from agent.envoy.inputs import AgentSnapshot, NodeIdentity, body
from agent.protocol.items import EDGES, Export, ExportUse, ItemKind
from agent.protocol.peering import PEER_DOCUMENT_PATH, PEER_HEALTH_PATH, ExportState, PeerDocument

ASKER_HEADER = b"x-isthmus-peer"
"""Set by the gateway: the URI of the asking peer's certificate."""
_READ_BYTES = 64 << 10
_LOWER_FACTOR = 0.75


def bucketed(healthy: int, before: int) -> int:
    """`healthy` rounded down to a power of two, which is left downwards only at three quarters of it.

    So pods that come and go in one cluster seldom change the config of another. 0 is exact.
    """
    bucket = 1 << (healthy.bit_length() - 1) if healthy else 0
    stays = bucket < before and healthy >= before * _LOWER_FACTOR
    return before if stays else bucket


class Asker(NamedTuple):
    """Whose node asks, by its certificate."""

    tenant_id: str
    site_id: str

    @classmethod
    def of(cls, uri: str) -> "Asker":
        """`spiffe://<trust domain>/tenant/<id>/site/<id>/node/<id>`."""
        tenant, _, rest = uri.partition("/tenant/")[2].partition("/site/")
        return cls(tenant, rest.partition("/")[0])

    def may_use(self, use: ExportUse) -> bool:
        return self.site_id in (use.edges if self.tenant_id == EDGES else use.peers)


@dataclass
class Exports:
    """What this node tells peers about its exports. `snapshot` is what Envoy has, `healthy` counts a pool's usable endpoints here."""

    node: NodeIdentity
    snapshot: Callable[[], AgentSnapshot]
    healthy: Callable[[str], int]
    reaches: Callable[[str], bool | None]
    """Whether this node can dial a site."""
    draining: bool = field(default=False, init=False)
    _buckets: Mapping[str, int] = field(default_factory=dict, init=False)

    def document(self, asker: Asker) -> PeerDocument:
        """Only exports that the asking site may use."""
        exports = {item.id.key: body(item, Export) for item in self.snapshot().by_kind[ItemKind.EXPORT]}
        self._buckets = {pool: bucketed(self.healthy(pool), self._buckets.get(pool, 0)) for pool in exports}
        open_ = [pool for pool, export in exports.items() if any(asker.may_use(use) for use in export.uses)]
        return PeerDocument(
            site_id=self.node.site_id,
            node_id=self.node.node_id,
            reaches_you=self.reaches(asker.site_id),
            draining=self.draining,
            exports=tuple(ExportState(pool=pool, healthy=self._buckets[pool]) for pool in open_),
        )


class PeerServer:
    """The document over HTTP/1.1 on a Unix socket; `document` makes the one for an asking site."""

    def __init__(self, socket: Path, document: Callable[[Asker], PeerDocument]) -> None:
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
        return 200, self._document(Asker.of(asker.decode("latin-1"))).model_dump_json().encode()


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
