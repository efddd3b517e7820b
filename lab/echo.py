"""A pod that tells who it is: over HTTP with what it was sent, over TCP with every byte until the client has finished."""

import asyncio
import json
import signal

import typer

LINGER_S = 1.5
"""As a pod's preStop hook: it serves on for this long after it was asked to leave, until callers have learned of it."""


def main(listen: str = typer.Option(...), pod: str = typer.Option(...), *, tcp: bool = typer.Option(False)) -> None:
    """`--tcp`: the pod's name and a newline, then the same bytes back; half-closes after the client did."""
    asyncio.run(_serve(listen, pod, tcp))


async def _serve(listen: str, pod: str, tcp: bool) -> None:
    leaving = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.set)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await (_echo(reader, writer, pod) if tcp else _answer(reader, writer, pod, leaving))
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left
        finally:
            writer.close()

    host, port = listen.rsplit(":", 1)
    async with await asyncio.start_server(connected, host, int(port), backlog=512):
        await leaving.wait()
        await asyncio.sleep(LINGER_S)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pod: str) -> None:
    writer.write(f"{pod}\n".encode())
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    await writer.drain()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pod: str, leaving: asyncio.Event) -> None:
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        said = {"pod": pod, "method": method, "path": path, "headers": headers, "body": body.decode(errors="replace")}
        answer = json.dumps(said).encode()
        close = "connection: close\r\n" if leaving.is_set() else ""
        writer.write(
            f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(answer)}\r\nx-pod: {pod}\r\n{close}\r\n".encode()
            + answer
        )
        await writer.drain()
        if close:
            return


if __name__ == "__main__":
    typer.run(main)
