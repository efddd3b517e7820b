"""Follows one collection of a Kubernetes API: list everything, then watch from the version of the list.

lightkube builds the requests, authenticates them and decodes what comes back. Its own watch is not used: it never asks for bookmarks, goes
on after a 410 without listing (what was deleted meanwhile would stay for ever), does not see a 410 that comes as HTTP status, waits
without end on a connection that is silent, and splits lines at characters that JSON may contain.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

import httpx2
import msgspec
from lightkube.core import decoders
from lightkube.core.exceptions import ConfigError
from lightkube.core.generic_client import ALL_NS, GenericAsyncClient
from lightkube.core.resource import NamespacedResourceG, Resource

from agent.backoff import backoff

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


class ReadFailed(Exception):
    """The collection cannot be read now; what was read before still holds."""


class AccessRefused(ReadFailed):
    """401: the credentials are not accepted."""


class ReadForbidden(ReadFailed):
    """403: they are, and do not suffice."""


class Gap(ReadFailed):
    """Changes may have been missed."""


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
    objects: dict[tuple[str, str], V] = field(default_factory=dict)
    """By namespace and name."""
    listed: bool = False
    """Whether `objects` is, or once was, the whole truth."""
    failure: ReadFailed | None = None
    """Why it is not being followed now."""

    @property
    def what(self) -> str:
        return _what(self.resource, self.namespace)

    async def run(self) -> NoReturn:
        """Follow for ever. What goes wrong is in `failure` and leads to a new list; raises `AccessRefused` only.

        A watch that broke off after a while is no failure unless the list that follows fails too.
        """
        loop = asyncio.get_running_loop()
        delays = pauses()
        while True:
            started = loop.time()
            try:
                version = await self._list()
                while True:
                    version = await self._watch(version)
            except AccessRefused as error:
                self._failed(error)
                raise
            except ReadFailed as error:
                if isinstance(error, Gap) and loop.time() - started > SHORTEST_WATCH_S:
                    delays = pauses()
                else:
                    self._failed(error)
            await asyncio.sleep(next(delays))

    async def _list(self) -> str:
        """Mark and sweep: what the list does not show is gone. Its version."""
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
        pairs = ((self.objects.get(key), found.get(key)) for key in {**self.objects, **found})
        differences = [(old, new) for old, new in pairs if old != new]
        self.objects, self.listed, self.failure = found, True, None
        self.changed(differences)
        return version

    def _page(self, response: httpx2.Response) -> tuple[str, str, list[Any]]:
        try:
            more, version, items = decoders.decode_list(response.content, self.resource)
        except msgspec.MsgspecError as error:
            raise ReadFailed(f"{self.what}: the answer cannot be read: {error}") from None
        if not version:
            raise ReadFailed(f"{self.what}: the list has no version")
        return more or "", version, items

    async def _watch(self, version: str) -> str:
        """Follow changes after `version` until the server ends the watch in good order, and give the version reached; nothing is missed then."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        query = {"resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(random.randint(*WATCH_S))}
        response = await self._ask(watch=True, **query)
        try:
            async for line in _lines(response):
                version = self._event(line)
        except httpx2.HTTPError as error:
            raise Gap(f"{self.what}: the watch broke off: {_brief(error)}") from None
        finally:
            await response.aclose()
        if loop.time() - started < SHORTEST_WATCH_S:
            raise Gap(f"{self.what}: the server ends watches at once")
        return version

    def _event(self, line: bytes) -> str:
        """Take in one event; the version it brings."""
        try:
            event = decoders.decode_watch_event(line)
            if event.type == "ERROR":
                status = decoders.decode_status(event.object)
                raise Gap(f"{self.what}: {status.code} {status.message}")
            if event.type == "BOOKMARK":
                return msgspec.json.decode(event.object, type=_Versioned).metadata.resourceVersion
            item = decoders.decode_object(event.object, self.resource)
        except msgspec.MsgspecError as error:
            raise Gap(f"{self.what}: an event cannot be read: {error}") from None
        key, value = _key(item), None if event.type == "DELETED" else self.read(item)
        before = self.objects.pop(key, None) if value is None else self.objects.get(key)
        if value is not None:
            self.objects[key] = value
        if before != value:
            self.changed([(before, value)])
        return str(item.metadata.resourceVersion)

    async def _ask(self, *, watch: bool, **query: str) -> httpx2.Response:
        return await ask(self.client, self.resource, self.namespace, watch=watch, **query)

    def _failed(self, error: ReadFailed) -> None:
        self.failure = error
        self.changed([])


async def ask(
    client: GenericAsyncClient, resource: type[Resource], namespace: str, *, watch: bool = False, **query: str
) -> httpx2.Response:
    """A good answer to a list or watch, read to its end unless it is a watch. Raises `ReadFailed`."""
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
        raise ReadFailed(f"{_what(resource, namespace)}: the credentials have characters that cannot be sent") from None
    except (httpx2.HTTPError, ConfigError, OSError) as error:
        raise ReadFailed(f"{_what(resource, namespace)}: {_brief(error)}") from None
    if response.is_success:
        return response
    raise _refusal(_what(resource, namespace), response)


class _Metadata(msgspec.Struct):
    resourceVersion: str  # noqa: N815 - Kubernetes' word


class _Versioned(msgspec.Struct):
    metadata: _Metadata


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
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


def _what(resource: type[Resource], namespace: str) -> str:
    place = "" if namespace == ALL_NS else f" in {namespace}"
    return f"{resource.__name__}s{place}"


def _refusal(what: str, response: httpx2.Response) -> ReadFailed:
    kind = {401: AccessRefused, 403: ReadForbidden, 410: Gap}.get(response.status_code, ReadFailed)
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
