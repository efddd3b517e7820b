"""A pod that speaks gRPC: `/test.Echo/Once` gives bytes back behind the pod's name, `/test.Echo/Each` does so for every message of a stream."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import typer


def main(listen: str = typer.Option(...), pod: str = typer.Option(...)) -> None:
    asyncio.run(_serve(listen, pod.encode()))


async def _serve(listen: str, pod: bytes) -> None:
    async def once(request: bytes, _: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        return pod + b":" + request

    async def each(requests: AsyncIterator[bytes], _: "grpc.aio.ServicerContext[bytes, bytes]") -> AsyncIterator[bytes]:
        async for request in requests:
            yield pod + b":" + request

    methods = {"Once": grpc.unary_unary_rpc_method_handler(once), "Each": grpc.stream_stream_rpc_method_handler(each)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    server.add_insecure_port(listen)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    typer.run(main)
