"""What a kubelet learns of an agent."""

import socket

import httpx
import pytest

from agent.errors import Misconfigured
from agent.health import answering


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


async def test_a_node_is_alive_before_it_is_ready() -> None:
    serves = False
    port = _free_port()
    async with answering(("127.0.0.1", port), lambda: serves), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/healthz")).status_code == 200
        early = await client.get("/readyz")
        assert (early.status_code, early.text) == (503, "this node does not serve yet\n")
        serves = True
        assert (await client.get("/readyz?verbose")).status_code == 200
        assert (await client.get("/")).status_code == 404
        assert (await client.post("/healthz")).status_code == 404
    with socket.create_server(("127.0.0.1", port)):
        pass  # it does not listen any more


async def test_an_endless_request_ends_its_connection_alone() -> None:
    port = _free_port()
    async with answering(("127.0.0.1", port), lambda: True), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        with pytest.raises(httpx.HTTPError):
            await client.get("/healthz", headers={"x-long": "x" * 100_000})
        assert (await client.get("/healthz")).status_code == 200


async def test_an_address_that_cannot_be_had_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Misconfigured, match=f"port {port}"):
            async with answering(("127.0.0.1", port), lambda: True):
                pass
