"""Follows one collection of a Kubernetes API: read everything, then watch from that version.

Everything comes as the beginning of the watch (`sendInitialEvents`), which costs the server far less than a list; from servers that do not offer
that, as a list in pages.

lightkube builds the requests, authenticates them and decodes what comes back. Its own watch is not used: it never asks for bookmarks, goes
on after a 410 without listing (what was deleted meanwhile would stay for ever), does not see a 410 that comes as HTTP status, waits
without end on a connection that is silent, and splits lines at characters that JSON may contain.
"""

import asyncio
import math
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

import httpx2
import msgspec
from lightkube.core import decoders
from lightkube.core.exceptions import ConfigError
from lightkube.core.generic_client import ALL_NS, GenericAsyncClient
from lightkube.core.resource import NamespacedResourceG, Resource

from agent.backoff import backoff
from agent.discovery.kubeconfig import ANSWER_S

V = TypeVar("V")
Difference = tuple[V | None, V | None]
"""What was, and what is."""

PAGE = 500
WATCH_S = (240, 300)
"""Watches end after a random time in between, so that they do not all come back at once."""
SILENCE_S = 90.0
"""A watch that shows not even a bookmark for so long is taken for dead. API servers send one about every minute."""
SHORTEST_WATCH_S = 1.0
"""A watch that the server ends sooner counts as a failure, so that it is not repeated without a pause."""
LONGEST_EVENT = 8 << 20
_EVERYTHING = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
_END_OF_EVERYTHING = "k8s.io/initial-events-end"


class ReadFailed(Exception):
    """The collection cannot be read now; what was read before still holds."""


class AccessRefused(ReadFailed):
    """401, or a TLS handshake that failed: the credentials are not accepted, or the server is not trusted."""


class ReadForbidden(ReadFailed):
    """403: they are, and do not suffice."""


class NotServed(ReadFailed):
    """404: the server does not know such objects."""


class Gap(ReadFailed):
    """Changes may have been missed."""


class NotOffered(ReadFailed):
    """The server does not know how to read in this way."""


def pauses() -> Iterator[float]:
    """Between attempts to read."""
    return backoff(0.1, 15.0)


@dataclass
class Reflector(Generic[V]):
    client: GenericAsyncClient
    resource: type[Resource]
    read: Callable[[Any], V | None]
    """An object as a value; None if it does not matter."""
    changed: Callable[[Sequence[Difference[V]]], None]
    """Called with what differs, after every event and every list; also without differences, when `failure` changed."""
    namespace: str = ALL_NS
    name: str = ""
    """Of the only object to follow, which takes a right to that one alone."""
    fatal: tuple[type[ReadFailed], ...] = (AccessRefused,)
    """What makes `run` give up."""
    objects: dict[tuple[str, str], V] = field(default_factory=dict)
    """By namespace and name."""
    listed: bool = False
    """Whether `objects` is, or once was, the whole truth."""
    failure: ReadFailed | None = None
    """Why it is not being followed now."""
    streams: bool = True
    """Whether everything is asked for as the beginning of a watch."""
    _read_at: float = field(default=math.inf, init=False)
    """When everything was read, this time; never, if that is yet to come."""

    @property
    def what(self) -> str:
        return _what(self.resource, self.namespace, self.name)

    async def run(self) -> NoReturn:
        """Follow for ever. What goes wrong is in `failure` and leads to reading everything again; raises what is `fatal` only.

        A watch that broke off after a while is no failure unless reading everything fails too.
        """
        loop = asyncio.get_running_loop()
        delays = pauses()
        while True:
            self._read_at = math.inf
            try:
                version = await (self._begin() if self.streams else self._list())
                while True:
                    version = await self._watch(version)
            except NotOffered as error:
                if not self.streams:
                    self._failed(error)
                self.streams = False
            except self.fatal as error:
                self._failed(error)
                raise
            except ReadFailed as error:
                if isinstance(error, Gap) and loop.time() - self._read_at > SHORTEST_WATCH_S:
                    delays = pauses()
                else:
                    self._failed(error)
            await asyncio.sleep(next(delays))

    async def _list(self) -> str:
        """Its version."""
        found: dict[tuple[str, str], V] = {}
        version, more = "", ""
        while True:
            page = {"limit": str(PAGE), "continue": more} if more else {"limit": str(PAGE)}
            more, version, items = self._page(await self._ask(watch=False, **page))
            for item in items:
                key = _key(item)
                if (value := self.read(item)) is not None:
                    found[key] = value
            if not more:
                break
        self._found(found)
        return version

    def _found(self, everything: dict[tuple[str, str], V]) -> None:
        """Mark and sweep: what is not among it is gone."""
        pairs = ((self.objects.get(key), everything.get(key)) for key in {**self.objects, **everything})
        differences = [(old, new) for old, new in pairs if old != new]
        self.objects, self.listed, self.failure = everything, True, None
        self._read_at = asyncio.get_running_loop().time()
        self.changed(differences)

    def _page(self, response: httpx2.Response) -> tuple[str, str, list[Any]]:
        try:
            more, version, items = decoders.decode_list(response.content, self.resource)
        except msgspec.MsgspecError as error:
            raise ReadFailed(f"{self.what}: the answer cannot be read: {error}") from None
        if not version:
            raise ReadFailed(f"{self.what}: the list has no version")
        return more or "", version, items

    async def _begin(self) -> str:
        """Read everything from the beginning of a watch, and follow that one as `_watch` does."""
        loop = asyncio.get_running_loop()
        started, found = loop.time(), dict[tuple[str, str], V]()
        try:
            async with asyncio.timeout(ANSWER_S) as patience, self._opened(**_EVERYTHING) as lines:
                async for line in lines:
                    patience.reschedule(loop.time() + ANSWER_S)
                    if version := self._beginning(line, found):
                        break
                else:
                    raise ReadFailed(f"{self.what}: the watch ended before it had shown everything")
                patience.reschedule(None)
                self._found(found)
                return await self._follow(lines, version, started)
        except TimeoutError:
            self.streams = False
            raise ReadFailed(f"{self.what}: the watch does not show everything") from None

    def _beginning(self, line: bytes, found: dict[tuple[str, str], V]) -> str:
        """Take in one event; the version if that was all."""
        event = self._decoded(line)
        if event.type == "BOOKMARK":
            metadata = self._bookmark(event)
            return metadata.resourceVersion if (metadata.annotations or {}).get(_END_OF_EVERYTHING) == "true" else ""
        item = self._object(event)
        key, value = _key(item), None if event.type == "DELETED" else self.read(item)
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
        return ""

    async def _watch(self, version: str) -> str:
        """Follow changes after `version` until the server ends the watch in good order, and give the version reached; nothing is missed then."""
        started = asyncio.get_running_loop().time()
        async with self._opened(resourceVersion=version) as lines:
            return await self._follow(lines, version, started)

    async def _follow(self, lines: AsyncIterator[bytes], version: str, started: float) -> str:
        async for line in lines:
            version = self._event(line)
        if asyncio.get_running_loop().time() - started < SHORTEST_WATCH_S:
            raise Gap(f"{self.what}: the server ends watches at once")
        return version

    @asynccontextmanager
    async def _opened(self, **query: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of a watch. Who may not watch may still list, which decides what is forbidden."""
        bounds = {"allowWatchBookmarks": "true", "timeoutSeconds": str(random.randint(*WATCH_S))}
        try:
            response = await self._ask(watch=True, **query, **bounds)
        except ReadForbidden as error:
            raise NotOffered(str(error)) from None
        try:
            async with aclosing(_lines(response)) as lines:
                yield lines
        except httpx2.HTTPError as error:
            raise Gap(f"{self.what}: the watch broke off: {_brief(error)}") from None
        finally:
            await response.aclose()

    def _event(self, line: bytes) -> str:
        """Take in one event; the version it brings."""
        event = self._decoded(line)
        if event.type == "BOOKMARK":
            return self._bookmark(event).resourceVersion
        item = self._object(event)
        key, value = _key(item), None if event.type == "DELETED" else self.read(item)
        before = self.objects.pop(key, None) if value is None else self.objects.get(key)
        if value is not None:
            self.objects[key] = value
        if before != value:
            self.changed([(before, value)])
        return str(item.metadata.resourceVersion)

    def _decoded(self, line: bytes) -> Any:
        """Type and object, which is still JSON."""
        try:
            event = decoders.decode_watch_event(line)
            if event.type != "ERROR":
                return event
            status = decoders.decode_status(event.object)
        except msgspec.MsgspecError as error:
            raise self._unreadable(error) from None
        raise Gap(f"{self.what}: {status.code} {status.message}")

    def _bookmark(self, event: Any) -> "_Metadata":
        try:
            return msgspec.json.decode(event.object, type=_Versioned).metadata
        except msgspec.MsgspecError as error:
            raise self._unreadable(error) from None

    def _object(self, event: Any) -> Any:
        try:
            return decoders.decode_object(event.object, self.resource)
        except msgspec.MsgspecError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> Gap:
        return Gap(f"{self.what}: an event cannot be read: {error}")

    async def _ask(self, *, watch: bool, **query: str) -> httpx2.Response:
        return await ask(self.client, self.resource, self.namespace, self.name, watch=watch, **query)

    def _failed(self, error: ReadFailed) -> None:
        self.failure = error
        self.changed([])


async def ask(
    client: GenericAsyncClient, resource: type[Resource], namespace: str, name: str = "", *, watch: bool = False, **query: str
) -> httpx2.Response:
    """A good answer to a list or watch, read to its end unless it is a watch; of one object only if it is named. Raises `ReadFailed`."""
    what = _what(resource, namespace, name)
    if name:
        query["fieldSelector"] = f"metadata.name={name}"
    place = namespace if issubclass(resource, NamespacedResourceG) else None
    request = client.build_adapter_request(client.prepare_request("list", resource, namespace=place, watch=watch, params=query))
    if watch:
        request.extensions["timeout"] = {**request.extensions["timeout"], "read": SILENCE_S}
    send: Callable[..., Awaitable[httpx2.Response]] = client.send
    try:
        response = await send(request, stream=watch)
        if response.is_error:
            await response.aread()
    except (httpx2.LocalProtocolError, ValueError):  # their messages show the header
        raise ReadFailed(f"{what}: the credentials have characters that cannot be sent") from None
    except (httpx2.HTTPError, ConfigError, OSError) as error:
        kind = AccessRefused if _is_about_trust(error) else ReadFailed
        raise kind(f"{what}: {_brief(error)}") from None
    if response.is_success:
        return response
    raise _refusal(what, response)


def _is_about_trust(error: BaseException | None) -> bool:
    """Certificates and authorities change while this runs: those of a pod are files that its kubelet replaces."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Metadata(msgspec.Struct):
    resourceVersion: str  # noqa: N815 - Kubernetes' word
    annotations: dict[str, str] | None = None


class _Versioned(msgspec.Struct):
    metadata: _Metadata


async def _lines(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """Split at line feeds only: JSON may contain what else `splitlines` takes for an end of line."""
    rest = bytearray()
    async for chunk in response.aiter_bytes():
        rest += chunk
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line:
                yield bytes(line)
        if len(rest) > LONGEST_EVENT:
            raise Gap("an event is longer than 8 MiB")


def _what(resource: type[Resource], namespace: str, name: str) -> str:
    place = "" if namespace == ALL_NS else f" in {namespace}"
    plural = f"{resource.__name__}{'es' if resource.__name__.endswith('s') else 's'}"
    return f"{resource.__name__} {name}{place}" if name else f"{plural}{place}"


def _refusal(what: str, response: httpx2.Response) -> ReadFailed:
    kind = {400: NotOffered, 401: AccessRefused, 403: ReadForbidden, 404: NotServed, 410: Gap, 422: NotOffered}.get(
        response.status_code, ReadFailed
    )
    try:
        message = str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    return kind(f"{what}: {response.status_code} {' '.join(message.split())[:200]}")


def _key(item: Any) -> tuple[str, str]:
    if item.metadata is None or not item.metadata.name:
        raise Gap("the API shows an object without a name")
    return item.metadata.namespace or "", item.metadata.name


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if str(error) else type(error).__name__
