"""A pod for TCP's harder moments. A client's first line says what becomes of its connection.

send N      N bytes, and the server closes
reset       one byte, and the server resets
echo        everything back, until the client has finished
count       how many connections are open, this one aside
"""

import asyncio
import socket
import struct

import typer

_AT_ONCE = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing resets."""
_CHUNK = b"x" * (1 << 16)


def main(listen: str = typer.Option(...), pod: str = typer.Option(...)) -> None:  # every pod is told its name
    asyncio.run(_serve(listen))


async def _serve(listen: str) -> None:
    open_: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_.add(writer)
        try:
            await _talk(reader, writer, len(open_) - 1)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left
        finally:
            open_.discard(writer)
            writer.close()

    host, port = listen.rsplit(":", 1)
    async with await asyncio.start_server(connected, host, int(port), backlog=4096) as server:
        await server.serve_forever()


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, others: int) -> None:
    match (await reader.readline()).decode().split():
        case ["send", length]:
            await _send(writer, int(length))
        case ["reset"]:
            writer.write(b"!")
            await writer.drain()
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            writer.transport.abort()
        case ["count"]:
            writer.write(f"{others}\n".encode())
        case ["echo"]:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.write_eof()


async def _send(writer: asyncio.StreamWriter, length: int) -> None:
    while length:
        part = _CHUNK[:length]
        writer.write(part)
        await writer.drain()
        length -= len(part)


if __name__ == "__main__":
    typer.run(main)
