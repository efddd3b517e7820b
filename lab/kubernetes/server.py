"""The HTTP side of the emulator.

kmock serves the documents about the API itself (`/version`, `/apis` …). It does not serve objects: it remembers every request and
searches all of them for each new one (4 ms per request after 50 of them, 110 ms after 1,600), has no PUT and no versions, and a watch
cannot start from one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import kmock
import yaml  # type: ignore[import-untyped]  # ships no types
from aiohttp import web

from lab.kubernetes import schema
from lab.kubernetes.access import Access, rule
from lab.kubernetes.rbac import Account
from lab.kubernetes.rbac import Request as Asked
from lab.kubernetes.reading import Page, Watch, is_true, wanted
from lab.kubernetes.refusal import Refusal, bad_request, not_served
from lab.kubernetes.resource import DEFINITION, NAMESPACE, RESOURCES, SERVICE_ACCOUNT, Resource
from lab.kubernetes.selector import Body
from lab.kubernetes.store import Key, Object
from lab.kubernetes.writing import Writer, merged

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ACCOUNT: web.RequestKey[Account | None] = web.RequestKey("account")


@dataclass
class ApiServer:
    writer: Writer
    access: Access = field(default_factory=Access)
    bookmark_s: float = 5.0
    """How often watches that asked for bookmarks get one; a real API server sends them about once a minute."""
    streams: bool = True
    """Whether watches may begin with everything (`sendInitialEvents`)."""
    watches: set[asyncio.Transport] = field(default_factory=set)

    def application(self) -> web.Application:
        for name in ("default", "kube-system"):
            if Key("", name) not in self.writer.store.collections[NAMESPACE].objects:
                self.writer.create(NAMESPACE, "", {"metadata": {"name": name}})
        app = web.Application(middlewares=[self._guard], client_max_size=4 << 20)
        for resource in RESOURCES:
            _Calls(self, resource).route(app)
        for fault in (self.disconnect, self.compact, self.pause, self.resume, self.rules):
            app.router.add_post(f"/lab/{fault.__name__}", fault)
        app.router.add_get("/api/v1", self.describe_core)
        app.router.add_get("/openapi/v3", self.describe)
        app.router.add_get("/openapi/v3/{path:.+}", self.describe)
        app.router.add_post(f"{SERVICE_ACCOUNT.base}/namespaces/{{namespace}}/{SERVICE_ACCOUNT.plural}/{{name}}/token", self.issue)
        app.cleanup_ctx.append(self._about_itself)
        return app

    async def _about_itself(self, app: web.Application) -> AsyncIterator[None]:
        async with kmock.KubernetesScaffold() as scaffold:
            for resource in RESOURCES:
                scaffold.resources[f"{resource.api_version}/{resource.plural}"] = kmock.ResourceInfo(
                    kind=resource.kind, singular=resource.kind.lower(), namespaced=resource.namespaced, verbs=set(schema.VERBS)
                )
            self._scaffold = scaffold
            yield

    @web.middleware
    async def _guard(self, request: web.Request, handler: Respond) -> web.StreamResponse:
        """Hold while paused, authenticate, and turn refusals into answers."""
        try:
            if not request.path.startswith("/lab/"):
                await self.access.running.wait()
                certified = bool(request.get_extra_info("peercert"))
                request[_ACCOUNT] = self.access.authenticate(request.headers.get("Authorization", ""), certified=certified)
            return await handler(request)
        except web.HTTPNotFound:
            return await self._scaffold(request)
        except Refusal as refusal:
            return web.json_response(refusal.status, status=refusal.code)

    async def describe_core(self, _: web.Request) -> web.Response:
        """The library calls this group `/v1`, which kubectl does not take."""
        return web.json_response(schema.core())

    async def describe(self, request: web.Request) -> web.Response:
        return web.json_response(schema.documents(request.match_info.get("path", "")))

    async def issue(self, request: web.Request) -> web.Response:
        """A token for a service account, as `kubectl create token` asks for it. It does not expire."""
        account = Account(request.match_info["namespace"], request.match_info["name"])
        self.access.authorise(self.writer.store, request[_ACCOUNT], Asked("create", SERVICE_ACCOUNT, *account, subresource="token"))
        self.writer.store.get(SERVICE_ACCOUNT, Key(*account))
        status = {"token": self.access.issue(account), "expirationTimestamp": "2100-01-01T00:00:00Z"}
        return web.json_response(
            {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {}, "status": status}, status=201
        )

    async def disconnect(self, _: web.Request) -> web.Response:
        """Cut the connections of all watches, as a broken network does."""
        cut = list(self.watches)
        for transport in cut:
            transport.abort()
        return web.json_response({"disconnected": len(cut)})

    async def compact(self, _: web.Request) -> web.Response:
        """Forget the history: all watches are told 410, and those from versions before now."""
        self.writer.store.compact()
        return web.json_response({})

    async def pause(self, _: web.Request) -> web.Response:
        """Answer nothing until resumed."""
        self.access.running.clear()
        return web.json_response({})

    async def resume(self, _: web.Request) -> web.Response:
        self.access.running.set()
        return web.json_response({})

    async def rules(self, request: web.Request) -> web.Response:
        """Replace what is given: `{"tokens": […], "forbidden": ["services@shop", …]}`."""
        body = await request.json()
        self.access.tokens = set(body.get("tokens", self.access.tokens))
        if "forbidden" in body:
            self.access.forbidden = {rule(text) for text in body["forbidden"]}
        return web.json_response({})


@dataclass(frozen=True)
class _Calls:
    """The verbs for one kind."""

    server: ApiServer
    resource: Resource

    def route(self, app: web.Application) -> None:
        everywhere = f"{self.resource.base}/{self.resource.plural}"
        collection = f"{self.resource.base}/namespaces/{{namespace}}/{self.resource.plural}" if self.resource.namespaced else everywhere
        for path in {everywhere, collection}:
            app.router.add_get(path, self.read_many)
        app.router.add_post(collection, self.create)
        app.router.add_get(f"{collection}/{{name}}", self.read)
        app.router.add_put(f"{collection}/{{name}}", self.replace)
        app.router.add_patch(f"{collection}/{{name}}", self.patch)
        app.router.add_delete(f"{collection}/{{name}}", self.delete)
        if self.resource.has_status:
            app.router.add_put(f"{collection}/{{name}}/status", self.replace)
            app.router.add_patch(f"{collection}/{{name}}/status", self.patch)

    async def read_many(self, request: web.Request) -> web.StreamResponse:
        watching = is_true(request, "watch")
        self._authorise(request, "watch" if watching else "list")
        store = self.server.writer.store
        if not watching:
            return Page.of(request, store).answer(self.resource, store, wanted(request))
        watch = Watch.of(request, self.resource, store, self.server.bookmark_s, streams=self.server.streams)
        return await self._stream(request, watch)

    async def create(self, request: web.Request) -> web.Response:
        namespace = self._authorise(request, "create")
        return _answer(self.server.writer.create(self.resource, namespace, await self._body(request)), 201)

    async def read(self, request: web.Request) -> web.Response:
        return _answer(self.server.writer.store.get(self.resource, self._key(request, "get")))

    async def replace(self, request: web.Request) -> web.Response:
        key, body = self._key(request, "update"), await self._body(request)
        write = self.server.writer.replace_status if _of_status(request) else self.server.writer.replace
        return _answer(write(self.resource, key, body))

    async def patch(self, request: web.Request) -> web.Response:
        if request.content_type == "application/apply-patch+yaml":
            return await self._apply(request)
        key, patch = self._key(request, "patch"), await _json(request)
        if request.content_type != "application/merge-patch+json" and not _is_strategic(request, patch):
            raise Refusal(415, "UnsupportedMediaType", "the emulator merges JSON, strategically without lists, and applies server-side")
        write = self.server.writer.patch_status if _of_status(request) else self.server.writer.patch
        return _answer(write(self.resource, key, patch))

    async def _apply(self, request: web.Request) -> web.Response:
        """Server-side: create, or merge into what is there. Lists are replaced, and nobody's fields are told from another's."""
        key, applied, writer = self._key(request, "patch"), yaml.safe_load(await request.read()), self.server.writer
        there = writer.store.collections[self.resource].objects.get(key)
        if there is None:
            return _answer(writer.create(self.resource, key.namespace, self._checked(request, applied)), 201)
        self._checked(request, merged(there.body, applied))
        return _answer(writer.patch(self.resource, key, applied))

    async def delete(self, request: web.Request) -> web.Response:
        key = self._key(request, "delete")
        options = await _json(request) if request.can_read_body else {}
        self.server.writer.delete(self.resource, key, options.get("preconditions") or {})
        return web.json_response({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    async def _stream(self, request: web.Request, watch: Watch) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        transport = request.transport
        assert transport is not None
        self.server.watches.add(transport)
        try:
            async for line in watch.lines():
                await self.server.access.running.wait()
                await response.write(line)
            await response.write_eof()
        except ConnectionError:
            pass  # the client went away, or a fault cut it off
        finally:
            self.server.watches.discard(transport)
        return response

    def _authorise(self, request: web.Request, verb: str) -> str:
        """The namespace of the request, which may be empty."""
        if self.resource.is_custom and Key("", self.resource.definition) not in self.server.writer.store.collections[DEFINITION].objects:
            raise not_served()
        namespace = request.match_info.get("namespace", "")
        name = request.match_info.get("name") or request.query.get("fieldSelector", "").removeprefix("metadata.name=")
        asked = Asked(verb, self.resource, namespace, name, "status" if _of_status(request) else "")
        self.server.access.authorise(self.server.writer.store, request[_ACCOUNT], asked)
        return namespace

    def _key(self, request: web.Request, verb: str) -> Key:
        return Key(self._authorise(request, verb), request.match_info["name"])

    async def _body(self, request: web.Request) -> Body:
        return self._checked(request, await _json(request))

    def _checked(self, request: web.Request, body: Body) -> Body:
        if body.get("kind", self.resource.kind) != self.resource.kind or not isinstance(body.get("metadata"), dict):
            raise bad_request(f"the object provided is not a {self.resource.kind} with metadata")
        if request.query.get("fieldValidation") == "Strict":
            schema.check_fields(body)
        return body


def _of_status(request: web.Request) -> bool:
    return request.path.endswith("/status")


def _is_strategic(request: web.Request, patch: Body) -> bool:
    """A strategic merge patch, and one that means the same as a merge patch: how lists are merged differs from field to field."""

    def is_plain(value: object) -> bool:
        if isinstance(value, dict):
            return not any(name.startswith("$") or not is_plain(inner) for name, inner in value.items())
        return not isinstance(value, list)

    return request.content_type == "application/strategic-merge-patch+json" and is_plain(patch)


def _answer(object: Object, status: int = 200) -> web.Response:
    return web.Response(body=object.encoded, status=status, content_type="application/json")


async def _json(request: web.Request) -> Body:
    try:
        body = await request.json()
    except ValueError:
        raise bad_request("the body is not JSON") from None
    if not isinstance(body, dict):
        raise bad_request("the body is not an object")
    return body
