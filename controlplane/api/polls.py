"""The shortest way to the long poll. Thousands wait in it, and whatever lies between the server and `agent.manifest` would wait with each of them."""

import re

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.protocol.manifest import MANIFEST_PATH
from controlplane.api import errors
from controlplane.api.agent import manifest
from controlplane.api.deps import Services, clock, recognised

_WAITING = re.compile(rb"hash=([0-9a-f]{1,64})&wait=([0-9]{1,2})")
"""What agents send as soon as they have a manifest. Everything else takes the usual way, to the same function."""


class Polls:
    """Calls `agent.manifest` as FastAPI would, with nothing in between."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting = _WAITING.fullmatch(scope["query_string"]) if _is_poll(scope) else None
        if waiting is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            services: Services = request.app.state.services
            response = await manifest(await recognised(request, services, clock()), services, waiting[1].decode(), float(waiting[2]))
        except Exception as error:  # noqa: BLE001 - as Starlette does; what is not expected is raised again
            response = await errors.refused(request, error)
        await response(scope, receive, send)


def _is_poll(scope: Scope) -> bool:
    return (scope["type"], scope.get("path"), scope.get("method")) == ("http", MANIFEST_PATH, "GET")
