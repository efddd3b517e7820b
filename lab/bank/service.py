"""What the bank's HTTP services share: a threaded server of the standard library that leaves as a good pod does."""

import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import psycopg
import typer
from psycopg.rows import dict_row

GRACE_S = 1.5
"""Between the request to leave and leaving: callers learn of it meanwhile, and connections are closed after their next answer."""


@dataclass(frozen=True)
class Answer:
    body: Any
    """HTML as text; anything else becomes JSON."""
    status: int = 200


Routes = Mapping[str, Callable[[Any], Answer]]
"""`METHOD /path` to what answers it; the argument is the decoded JSON of the request, None without a body."""


def serve(routes: Routes) -> None:
    """The command line of a service: `--listen ADDRESS:PORT --pod NAME`."""

    def command(listen: str = typer.Option(...), pod: str = typer.Option(...)) -> None:
        host, port = listen.rsplit(":", 1)
        _Request.routes, _Request.pod = {**routes, "GET /health": lambda _: Answer({"pod": pod})}, pod
        server = _Server((host, int(port)), _Request)
        signal.signal(signal.SIGTERM, lambda *_: _leave(server))
        server.serve_forever(poll_interval=0.1)

    typer.run(command)


def query(sql: str, *values: object) -> list[dict[str, Any]]:
    """Rows from the ledger, each call over a connection of its own; `LEDGER` says `host:port`."""
    host, port = os.environ["LEDGER"].rsplit(":", 1)
    with psycopg.connect(host=host, port=int(port), user="postgres", dbname="postgres", row_factory=dict_row, connect_timeout=5) as ledger:
        cursor = ledger.execute(sql, values)
        return cursor.fetchall() if cursor.description else []


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


class _Request(BaseHTTPRequestHandler):
    routes: ClassVar[Routes] = {}
    pod: ClassVar[str] = ""
    leaving: ClassVar[bool] = False
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        action = self.routes.get(f"{self.command} {self.path.partition('?')[0]}")
        if action is None:
            return self._send(Answer({"message": "no such page"}, 404))
        try:
            answer = action(json.loads(body) if body else None)
        except (KeyError, TypeError, ValueError) as error:
            answer = Answer({"message": f"{type(error).__name__}: {error}"}, 400)
        except (psycopg.Error, OSError) as error:
            answer = Answer({"message": str(error)}, 503)
        return self._send(answer)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing about requests that were answered."""

    def _send(self, answer: Answer) -> None:
        page = isinstance(answer.body, str)
        body = answer.body.encode() if page else json.dumps(answer.body, default=str).encode() + b"\n"
        self.send_response(answer.status)
        self.send_header("content-type", "text/html; charset=utf-8" if page else "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("x-pod", self.pod)
        if self.leaving:
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _leave(server: _Server) -> None:
    _Request.leaving = True
    threading.Timer(GRACE_S, server.shutdown).start()
