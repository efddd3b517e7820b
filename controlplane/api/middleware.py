"""Around every request: headers, a count, and one line in the log."""

import time

import structlog
from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.protocol.manifest import MANIFEST_PATH

log = structlog.get_logger()

REQUESTS = Counter("isthmus_http_requests_total", "Requests answered.", ("method", "route", "status"))
IN_PROGRESS = Gauge("isthmus_http_requests_in_progress", "Requests being answered, waiting ones included.")
SECONDS = Histogram("isthmus_http_request_seconds", "Time to the start of the answer; long polls aside.", ("method", "route"))

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Strict-Transport-Security": "max-age=31536000",
}
STRICT_CSP = "default-src 'none'; frame-ancestors 'none'"
PAGES = ("/docs", "/redoc")
"""Need scripts."""
QUIET = ("/api/agent/", "/healthz", "/readyz", "/metrics")
"""What comes all the time is logged at level debug."""


class Observe:
    """Outermost but for Starlette's own handler of bugs, which answers 500 for what comes through here as an exception."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                _secure(message, scope["path"])
                _note(scope, message["status"], time.perf_counter() - started_at)
            await send(message)

        try:
            with IN_PROGRESS.track_inprogress():
                await self._app(scope, receive, observed)
        except Exception:
            _note(scope, 500, time.perf_counter() - started_at)
            raise


def _secure(message: Message, path: str) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if not path.startswith(PAGES):
        headers.setdefault("Content-Security-Policy", STRICT_CSP)


def _note(scope: Scope, status: int, seconds: float) -> None:
    route = MANIFEST_PATH if scope["path"] == MANIFEST_PATH else getattr(scope.get("route"), "path", "unknown")
    REQUESTS.labels(scope["method"], route, status).inc()
    if route != MANIFEST_PATH:
        SECONDS.labels(scope["method"], route).observe(seconds)
    say = log.debug if scope["path"].startswith(QUIET) else log.info
    client = scope["client"][0] if scope.get("client") else ""
    say("request", method=scope["method"], path=scope["path"], status=status, ms=round(1000 * seconds, 1), client=client)
