"""`python -m lab.kubernetes --listen 127.0.0.1:6443`: run the emulator until it is told to end."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from aiohttp import web

from lab.kubernetes.access import Access, rule
from lab.kubernetes.admission import Admission
from lab.kubernetes.kubeconfig import kubeconfig
from lab.kubernetes.server import ApiServer
from lab.kubernetes.store import Store
from lab.kubernetes.tls import Authority
from lab.kubernetes.writing import Writer


def main(
    *,
    listen: Annotated[str, typer.Option(help="IP address and port; port 0 takes a free one.")] = "127.0.0.1:6443",
    kubeconfig_out: Annotated[Path | None, typer.Option(help="Write a kubeconfig there, once connections are accepted.")] = None,
    tls: Annotated[bool, typer.Option(help="HTTPS with a certificate authority of its own.")] = False,
    client_certificate: Annotated[bool, typer.Option(help="With --tls: the kubeconfig holds a client certificate, not the token.")] = False,
    token: Annotated[list[str] | None, typer.Option(help="A bearer token that is accepted; none: everybody is.")] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="PLURAL@NAMESPACE that may not be read or written; `*` for every kind.")] = None,
    allow_loopback: Annotated[
        bool, typer.Option(help="Accept loopback addresses in EndpointSlices, as a real API server does not.")
    ] = True,
    bookmark_interval: Annotated[float, typer.Option(help="Seconds between bookmarks of a watch.")] = 5.0,
    state: Annotated[Path | None, typer.Option(help="Keep objects and versions in this file over restarts.")] = None,
) -> None:
    """A Kubernetes API emulator. Faults: POST /lab/{disconnect,compact,pause,resume,rules}."""
    tokens = set(token or ())
    host, _, port = listen.rpartition(":")
    authority = Authority() if tls else None
    server = ApiServer(
        Writer(Store(state), Admission(allow_loopback=allow_loopback)),
        Access(tokens, {rule(text) for text in forbid or ()}),
        bookmark_s=bookmark_interval,
    )

    def ready(bound: int) -> None:
        url = f"{'https' if authority else 'http'}://{host}:{bound}"
        if kubeconfig_out:
            _replace(kubeconfig_out, kubeconfig(url, token=min(tokens, default=""), authority=authority, certificate=client_certificate))
        print(f"serving {url}", flush=True)

    asyncio.run(_serve(server, host.strip("[]"), int(port), authority, ready))


async def _serve(server: ApiServer, host: str, port: int, authority: Authority | None, ready: Callable[[int], None]) -> None:
    runner = web.AppRunner(server.application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port, ssl_context=authority.context(host) if authority else None, reuse_address=True).start()
    ready(runner.addresses[0][1])
    await asyncio.Event().wait()


def _replace(file: Path, text: str) -> None:
    """At once, and for this user only: whoever sees the file may read it whole."""
    partial = file.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(file)


if __name__ == "__main__":
    typer.run(main)
