"""Delta ADS over a Unix socket: Envoy gets differences, and its verdict on them comes back.

`XdsServer.apply` sends what is new type by type in `DELIVERY_ORDER`, each only after Envoy accepted the one before, and
then removes what is gone in the reverse order. So nothing is referred to before it is there, and nothing goes while it is in
use: clusters stay for a while, because a request that waits to be retried knows its cluster by the route that it once took.
Only listeners and clusters are ever removed: of the other types Envoy lets go by itself.

What Envoy holds is known by the versions it acknowledged on its stream, or said at the stream's start: a restarted agent
sends a running Envoy nothing that it has. After a NACK Envoy may have taken a part of the response, so all of it counts as unknown.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from agent.envoy.inputs import ItemId
from agent.envoy.resources import CLUSTER, DELIVERY_ORDER, ENDPOINTS, EXTENSION, LISTENER, ROUTES, SECRET, Resource, Resources
from agent.protocol.items import ItemKind

CHUNK_BYTES = 1 << 20
"""Of one response; a single resource may exceed it."""
_MESSAGE_LIMIT_BYTES = 64 << 20
_CLAIM_S = 0.3
"""Envoy asks for the endpoints of a new cluster as soon as it has it; a resource that nobody asked for by then is in no one's way."""

_CLAIMED_AFTER = {
    CLUSTER: (ENDPOINTS,),
    ENDPOINTS: (ENDPOINTS,),
    LISTENER: (ROUTES, EXTENSION),
    ROUTES: (ROUTES, EXTENSION, SECRET),
}
"""Types whose subscriptions follow from having accepted a type."""
_WILDCARD = (LISTENER, CLUSTER)
"""Envoy subscribes to these as a whole."""
LINGER_S = 10.0
"""How long a cluster stays after the last route left it: longer than any usual pause between two attempts of a request."""
_UNKNOWN: Final = ""
"""The version of what Envoy holds after a NACK; equals no real version."""

Named = Mapping[str, Resource]


@dataclass(frozen=True)
class Nack:
    type_url: str
    names: tuple[str, ...]
    """Everything in the refused response; Envoy does not say which."""
    message: str


@dataclass(frozen=True)
class Outcome:
    """`nacks` empty and `complete`: Envoy accepted everything. Not `complete`: it said nothing in time, or is not there."""

    complete: bool
    nacks: tuple[Nack, ...] = ()

    @property
    def accepted(self) -> bool:
        return self.complete and not self.nacks


@dataclass
class _Type:
    """What one stream knows of one type of resource."""

    type_url: str
    wildcard: bool = False
    greeted: bool = False
    """Whether the subscription as a whole was answered, if only with nothing: Envoy waits for that before it serves."""
    names: set[str] = field(default_factory=set)
    held: dict[str, str] = field(default_factory=dict)
    """Name → version that Envoy has, or will have when it accepts what is on its way."""
    pending: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Nonce → names of responses that Envoy has not answered."""
    refused: dict[str, tuple[Resource, str]] = field(default_factory=dict)
    """Of secrets, with the reason. Envoy acknowledges a secret that it refused when it comes a second time, and still does not use it;
    so it comes once, until another one is accepted that may belong with it: Envoy blames the last of those that do not go together."""

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names

    def outdated(self, target: Named) -> list[Resource]:
        return [
            resource
            for name, resource in target.items()
            if self.held.get(name) != resource.version and self.wants(name) and not self.refuses(resource)
        ]

    def refuses(self, resource: Resource) -> bool:
        return resource.name in self.refused and self.refused[resource.name][0] == resource

    def refused_in(self, target: Named) -> list[str]:
        return [name for name in self.refused if name in target and self.refuses(target[name])]

    def forgive(self, accepted: Iterable[Resource]) -> None:
        """Forget refusals of what belongs to the same owners."""
        owners = {_owners(resource) for resource in accepted}
        self.refused = {name: known for name, known in self.refused.items() if _owners(known[0]) not in owners}

    def surplus(self, target: Named) -> list[str]:
        return [name for name in self.held if name not in target]


def _owners(resource: Resource) -> frozenset[ItemId]:
    """Items that it was made from; none for what belongs to the node, of which the site's own item is a part."""
    return frozenset(source for source in resource.sources if source.kind is not ItemKind.SITE)


class _Stream:
    """One Envoy's stream. Not thread-safe: everything runs in the event loop."""

    def __init__(self, target: Mapping[str, Named] | None, linger_s: float) -> None:
        self.target = target
        self._linger_s = linger_s
        self.types: dict[str, _Type] = {}
        self.outbox: asyncio.Queue[discovery_pb2.DeltaDiscoveryResponse] = asyncio.Queue()
        self.changed = asyncio.Event()
        self.nacks: list[Nack] = []
        self.closed = False
        self._rewarmed: set[str] = set()
        """Clusters that were changed before Envoy asked for endpoints on this stream."""
        self._leaving: dict[str, float] = {}
        """Clusters that nothing uses any more, with the time from which they may go."""
        self._expiry: asyncio.TimerHandle | None = None
        self._nonces = count(1)

    def receive(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        state = self.types.get(request.type_url)
        first = state is None
        if state is None:
            state = self.types[request.type_url] = _Type(request.type_url)
            state.held.update(request.initial_resource_versions)
            if request.type_url == ENDPOINTS:
                self._forget(state, self._rewarmed)
            state.wildcard = not request.resource_names_subscribe
        if request.response_nonce:
            self._judge(state, request)
        asked = self._subscribe(state, request, first=first)
        if self.target is not None and (first or asked):
            self._answer(state, asked)
        self.changed.set()

    def _judge(self, state: _Type, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        names = state.pending.pop(request.response_nonce, None)
        if names is None:
            return
        target = self._target(state.type_url)
        sent = [target[name] for name in names if name in target]
        if request.HasField("error_detail"):
            self._refused(state, names, sent, request.error_detail.message)
        elif state.refused:
            state.forgive(sent)
            self._send(state, state.outdated(target), [])

    def _refused(self, state: _Type, names: tuple[str, ...], sent: Iterable[Resource], message: str) -> None:
        if state.type_url == SECRET:
            state.refused.update((resource.name, (resource, message)) for resource in sent)
        state.held.update(dict.fromkeys(names, _UNKNOWN))
        self.nacks.append(Nack(state.type_url, names, message))

    def _subscribe(self, state: _Type, request: discovery_pb2.DeltaDiscoveryRequest, *, first: bool) -> set[str]:
        """Names that Envoy asked for in this request and that must be answered."""
        asked = set(request.resource_names_subscribe)
        if "*" in asked:
            asked.discard("*")
            state.wildcard = True
        state.names |= asked
        for name in request.resource_names_unsubscribe:
            state.names.discard(name)
            state.refused.pop(name, None)
            if not state.wildcard:
                state.held.pop(name, None)
        if not first:
            for name in asked:
                state.held.pop(name, None)
                state.refused.pop(name, None)
        return asked

    def _answer(self, state: _Type, asked: set[str]) -> None:
        """What a subscription gets at once, and that names which do not exist (yet) do not."""
        target = self._target(state.type_url)
        missing = sorted(name for name in asked if name not in target and name not in state.held)
        self._send(state, state.outdated(target), missing)

    def retarget(self, target: Mapping[str, Named]) -> None:
        waited, self.target = self.target is None, target
        self._leaving = {name: at for name, at in self._leaving.items() if name not in self._target(CLUSTER)}
        if waited:
            for state in self.types.values():
                self._answer(state, state.names)

    def _target(self, type_url: str) -> Named:
        return (self.target or {}).get(type_url, {})

    def add(self, type_url: str) -> None:
        """Send what Envoy lacks of one type; what it refused before, and nothing new goes with, counts as refused again."""
        if (state := self.types.get(type_url)) is not None:
            outdated = state.outdated(self._target(type_url))
            state.forgive(outdated)
            known = state.refused_in(self._target(type_url))
            self.nacks += [Nack(type_url, (name,), state.refused[name][1]) for name in known]
            self._send(state, state.outdated(self._target(type_url)), [])

    def remove(self, type_url: str) -> None:
        """Take back what Envoy has too much of one type."""
        if (state := self.types.get(type_url)) is not None:
            self._send(state, [], state.surplus(self._target(type_url)))

    def dismiss(self) -> None:
        """Envoy has the whole target: clusters that are not in it go when they have lingered."""
        if (state := self.types.get(CLUSTER)) is not None:
            leaves_at = asyncio.get_running_loop().time() + self._linger_s
            self._leaving = {name: self._leaving.get(name, leaves_at) for name in state.surplus(self._target(CLUSTER))}
            self._expire()

    def _expire(self) -> None:
        """Take back the clusters whose time has come, and look again when that of the next one does."""
        loop = asyncio.get_running_loop()
        gone = [name for name, at in self._leaving.items() if at <= loop.time()]
        self._leaving = {name: at for name, at in self._leaving.items() if name not in gone}
        if gone:
            self._send(self.types[CLUSTER], [], gone)
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = loop.call_at(min(self._leaving.values()), self._expire) if self._leaving else None

    def close(self) -> None:
        self.closed = True
        self._leaving = {}
        if self._expiry is not None:
            self._expiry.cancel()
        self.changed.set()

    def _send(self, state: _Type, resources: Sequence[Resource], removed: Sequence[str]) -> None:
        self._forget(state, removed)
        changed = [resource.name for resource in resources if resource.name in state.held]
        state.held.update((resource.name, resource.version) for resource in resources)
        for chunk in _chunks(resources, 1 if state.type_url == SECRET else CHUNK_BYTES):
            self._respond(state, chunk, ())
        if removed or (state.wildcard and not state.greeted):
            self._respond(state, (), removed)
        if state.type_url == CLUSTER:
            self._warm(changed)

    def _warm(self, clusters: Iterable[str]) -> None:
        """Endpoints of changed clusters go out again: Envoy does not ask, but takes neither them nor the cluster over without, for 15 s."""
        state = self.types.get(ENDPOINTS)
        if state is None:
            self._rewarmed.update(clusters)
            return
        self._forget(state, clusters)
        self._send(state, state.outdated(self._target(ENDPOINTS)), [])

    def _forget(self, state: _Type, names: Iterable[str]) -> None:
        for name in names:
            state.held.pop(name, None)

    def _respond(self, state: _Type, resources: Sequence[Resource], removed: Sequence[str]) -> None:
        state.greeted = True
        nonce = str(next(self._nonces))
        response = discovery_pb2.DeltaDiscoveryResponse(type_url=state.type_url, nonce=nonce, removed_resources=removed)
        for resource in resources:
            sent = response.resources.add(name=resource.name, version=resource.version)
            sent.resource.type_url = resource.type_url
            sent.resource.value = resource.value
        state.pending[nonce] = (*(resource.name for resource in resources), *removed)
        self.outbox.put_nowait(response)

    def answered(self) -> bool:
        return all(not state.pending for state in self.types.values())

    def unclaimed(self, type_urls: Iterable[str]) -> set[tuple[str, str]]:
        """Resources that exist and that Envoy has not asked for."""
        return {
            (type_url, name)
            for type_url in type_urls
            for state in (self.types.get(type_url, _Type(type_url)),)
            for name in self._target(type_url)
            if not state.wants(name)
        }


def _chunks(resources: Sequence[Resource], limit: int) -> list[list[Resource]]:
    """Of at most so many bytes, or of one resource."""
    chunks: list[list[Resource]] = []
    room = 0
    for resource in resources:
        if len(resource.value) > room or not chunks:
            chunks.append([])
            room = limit
        chunks[-1].append(resource)
        room -= len(resource.value)
    return chunks


class XdsServer(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]  # generated without types
    """Serves the one Envoy of this node. Until the first `apply` it answers nothing, so an Envoy that runs keeps what it has."""

    def __init__(self, socket: Path, on_connected: Callable[[], None], linger_s: float = LINGER_S) -> None:
        self._socket = socket
        self._on_connected = on_connected
        self._linger_s = linger_s
        self._server: grpc.aio.Server | None = None
        self._stream: _Stream | None = None
        self._target: Mapping[str, Named] | None = None
        self._ignored: set[tuple[str, str]] = set()
        self._applying = asyncio.Lock()

    async def start(self) -> None:
        limits = [("grpc.max_send_message_length", _MESSAGE_LIMIT_BYTES), ("grpc.max_receive_message_length", _MESSAGE_LIMIT_BYTES)]
        self._socket.unlink(missing_ok=True)
        self._server = grpc.aio.server(options=limits)
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        self._socket.chmod(0o600)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)

    async def DeltaAggregatedResources(  # noqa: N802  # the service's own name
        self,
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        context: "grpc.aio.ServicerContext[discovery_pb2.DeltaDiscoveryRequest, discovery_pb2.DeltaDiscoveryResponse]",
    ) -> None:
        stream = _Stream(self._target, self._linger_s)
        if self._stream is not None:
            self._close(self._stream)
        self._stream = stream
        self._ignored = set()
        self._on_connected()
        sender = asyncio.create_task(_forward(stream, context))
        try:
            async for request in requests:
                stream.receive(request)
        finally:
            sender.cancel()
            self._close(stream)

    def _close(self, stream: _Stream) -> None:
        stream.close()
        if self._stream is stream:
            self._stream = None

    async def apply(self, resources: Resources, timeout_s: float = 30.0) -> Outcome:
        """Make Envoy hold exactly these. Ends at the first refused response; what Envoy has then is a mix until the next call.

        Without an Envoy the answer is `complete=False` at once; the one that connects next gets these.
        """
        async with self._applying:
            self._target = resources.by_type
            if self._stream is None:
                return Outcome(complete=False)
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._deliver(self._stream, resources.by_type)
            except TimeoutError:
                return Outcome(complete=False)

    async def _deliver(self, stream: _Stream, target: Mapping[str, Named]) -> Outcome:
        stream.nacks.clear()
        stream.retarget(target)
        for type_url in DELIVERY_ORDER:
            stream.add(type_url)
            if not await self._settled(stream, type_url):
                return Outcome(complete=not stream.closed, nacks=tuple(stream.nacks))
        stream.remove(LISTENER)
        await self._settled(stream, LISTENER)
        stream.dismiss()
        await self._settled(stream, CLUSTER)
        return Outcome(complete=not stream.closed, nacks=tuple(stream.nacks))

    async def _settled(self, stream: _Stream, type_url: str) -> bool:
        """Wait until Envoy answered everything and asked for what the answers made it need; False on a NACK or a lost stream."""
        clock = asyncio.get_running_loop().time
        quiet_at = clock() + _CLAIM_S
        while not stream.closed:
            ready = stream.answered() and (type_url not in _WILDCARD or type_url in stream.types)
            if ready and stream.nacks:
                return False
            expected = stream.unclaimed(_CLAIMED_AFTER.get(type_url, ())) - self._ignored
            if ready and (not expected or clock() >= quiet_at):
                self._ignored |= expected
                return True
            stream.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(quiet_at if ready else None):
                    await stream.changed.wait()
        return False


async def _forward(
    stream: _Stream, context: "grpc.aio.ServicerContext[discovery_pb2.DeltaDiscoveryRequest, discovery_pb2.DeltaDiscoveryResponse]"
) -> None:
    while True:
        await context.write(await stream.outbox.get())
