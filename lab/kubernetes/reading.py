"""Lists, page by page, and watches."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from lab.kubernetes import selector
from lab.kubernetes.refusal import Refusal, bad_request, invalid
from lab.kubernetes.resource import ENDPOINT_SLICE, Resource
from lab.kubernetes.selector import Body, Predicate
from lab.kubernetes.store import Change, Key, Object, Store

_WATCH_S = 1800
"""How long a watch lasts that does not say so itself."""


@dataclass(frozen=True)
class Page:
    """Part of a list. All parts show the same version, as long as it is known."""

    version: int
    after: Key
    limit: int

    @classmethod
    def of(cls, request: web.Request, store: Store) -> "Page":
        limit = int(request.query.get("limit") or 0)
        token = request.query.get("continue")
        if not token:
            return cls(store.version, Key("", ""), limit)
        try:
            version, namespace, name = json.loads(base64.urlsafe_b64decode(token))
        except ValueError:
            raise bad_request("continue key is not valid") from None
        return cls(version, Key(namespace, name), limit)

    def answer(self, resource: Resource, store: Store, wanted: Predicate) -> web.Response:
        objects = sorted(store.collections[resource].at(self.version).items())
        found = [(key, object) for key, object in objects if key > self.after and wanted(object.body)]
        shown = found[: self.limit] if self.limit else found
        metadata = {"resourceVersion": str(self.version)}
        if len(shown) < len(found):
            metadata["continue"] = self._next(shown[-1][0])
        head = json.dumps({"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata})
        items = b",".join(object.encoded for _, object in shown)
        return web.Response(body=head[:-1].encode() + b',"items":[' + items + b"]}", content_type="application/json")

    def _next(self, last: Key) -> str:
        return base64.urlsafe_b64encode(json.dumps([self.version, *last]).encode()).decode()


@dataclass
class Watch:
    """One watch. It holds no queue, only the version up to which it has shown everything."""

    resource: Resource
    store: Store
    wanted: Predicate
    shown: int
    start_with_everything: bool
    tells_end: bool
    """A bookmark follows everything."""
    bookmark_s: float
    """0: none were asked for."""
    ends: float

    @classmethod
    def of(cls, request: web.Request, resource: Resource, store: Store, bookmark_s: float, *, streams: bool) -> "Watch":
        """Raise `Refusal`. `streams`: whether a watch may begin with everything and say where that ends, as the feature gate WatchList has it."""
        streamed = is_true(request, "sendInitialEvents")
        if "sendInitialEvents" in request.query:
            _check_streaming(request, offered=streams)
        version = 0 if streamed else int(request.query.get("resourceVersion") or 0)
        return cls(
            resource,
            store,
            wanted(request),
            shown=version or store.version,
            start_with_everything=version == 0,
            tells_end=streamed,
            bookmark_s=bookmark_s if is_true(request, "allowWatchBookmarks") else 0,
            ends=time.monotonic() + float(request.query.get("timeoutSeconds") or _WATCH_S),
        )

    async def lines(self) -> AsyncIterator[bytes]:
        """Events until the time is up, or until what comes next is no longer known: then the last one says 410."""
        for line in self._everything() if self.start_with_everything else ():
            yield line
        bookmark = self._next_bookmark()
        while time.monotonic() < self.ends:
            try:
                changes = list(self.store.collections[self.resource].since(self.shown))
            except Refusal as refusal:
                yield _line("ERROR", Object(refusal.status))
                return
            self.shown = max(self.shown, self.store.version)
            for change in changes:
                if line := self._shown_as(change):
                    yield line
            if time.monotonic() >= bookmark:
                yield self._bookmark()
                bookmark = self._next_bookmark()
            await self._news(min(self.ends, bookmark))
        if self.bookmark_s:
            yield self._bookmark()

    def _everything(self) -> Iterator[bytes]:
        for _, object in sorted(self.store.collections[self.resource].at(self.shown).items()):
            if self.wanted(object.body):
                yield _line("ADDED", object)
        if self.tells_end:
            yield self._bookmark(annotations={"k8s.io/initial-events-end": "true"})

    async def _news(self, until: float) -> None:
        if self.shown >= self.store.version:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.store.changed(), max(0.0, until - time.monotonic()))

    def _shown_as(self, change: Change) -> bytes:
        """An object that begins to match the selectors is added, one that ceases to is deleted."""
        was = change.previous is not None and self.wanted(change.previous.body)
        now = change.type != "DELETED" and self.wanted(change.object.body)
        if not (was or now):
            return b""
        return _line("MODIFIED" if was and now else "ADDED" if now else "DELETED", change.object)

    def _next_bookmark(self) -> float:
        return time.monotonic() + self.bookmark_s if self.bookmark_s else self.ends

    def _bookmark(self, **more: Body) -> bytes:
        metadata = {"resourceVersion": str(self.shown), **more}
        body: Body = {"kind": self.resource.kind, "apiVersion": self.resource.api_version, "metadata": metadata}
        if self.resource is ENDPOINT_SLICE:
            body |= {"addressType": "", "endpoints": None, "ports": None}
        return _line("BOOKMARK", Object(body))


def _check_streaming(request: web.Request, *, offered: bool) -> None:
    """As API servers check it; raises `Refusal` (422)."""
    problem = ""
    if not offered:
        problem = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
    elif request.query.get("resourceVersionMatch") != "NotOlderThan":
        problem = "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
    elif not is_true(request, "allowWatchBookmarks"):
        problem = "sendInitialEvents: Forbidden: sendInitialEvents requires allowWatchBookmarks"
    if problem:
        raise invalid("ListOptions.meta.k8s.io", "", problem)


def wanted(request: web.Request) -> Predicate:
    """Whether an object is in the namespace and matches the selectors of the request."""
    by_label = selector.labels(request.query.get("labelSelector", ""))
    by_field = selector.fields(request.query.get("fieldSelector", ""))
    namespace = request.match_info.get("namespace")
    return lambda body: (not namespace or body["metadata"].get("namespace") == namespace) and by_label(body) and by_field(body)


def is_true(request: web.Request, parameter: str) -> bool:
    return request.query.get(parameter) in {"1", "true"}


def _line(type: str, object: Object) -> bytes:
    return b'{"type":"' + type.encode() + b'","object":' + object.encoded + b"}\n"
