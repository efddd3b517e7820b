"""The lab itself: its networks are apart, its faults are real, and it leaves nothing behind."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lab import faults
from lab.capture import capture
from lab.forwarder import CHUNK, Forwarder
from lab.network import NAMESPACES, Network, Place, build, can_use_namespaces
from lab.process import Process, end_marked, end_orphans
from lab.site import GATEWAY_PORT
from lab.wait import until

ABANDONED = """
import asyncio, os, signal, sys
from pathlib import Path
from lab.network import build
from lab.process import Process

async def main() -> None:
    with build(("left",)) as network:
        process = Process("sleeper", ["sleep", "600"], network.sites["left"], Path(sys.argv[1]), f"{os.getpid()}.1")
        await process.start()
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with build(("a", "b")) as network:
        yield network


@asynccontextmanager
async def echo(place: Place, host: str, port: int = 0) -> AsyncIterator[tuple[str, int]]:
    """A server that sends back what it gets, and half-closes when its client does."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1024):
                writer.write(data)
            writer.write_eof()
        finally:
            writer.close()

    listener = place.listen(host, port)
    async with await asyncio.start_server(connected, sock=listener):
        yield listener.getsockname()


@asynccontextmanager
async def forwarder(network: Network) -> AsyncIterator[Forwarder]:
    b = network.sites["b"]
    async with echo(b, b.inside) as target:
        forwarder = Forwarder(network.home.listen("127.0.0.1"), b, target)
        await forwarder.start()
        yield forwarder
        await forwarder.stop()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes, within_s: float = 5) -> bytes:
    writer.write(text)
    return await asyncio.wait_for(reader.readexactly(len(text)), within_s)


needs_namespaces = pytest.mark.skipif(not can_use_namespaces(), reason="needs root, iproute2 and the right to make network namespaces")
needs_filters = pytest.mark.skipif(
    not can_use_namespaces() or not shutil.which("nft"), reason="needs root, nftables and the right to make network namespaces"
)


@pytest.mark.root
@needs_namespaces
async def test_sites_have_the_same_pod_addresses_and_do_not_see_each_others(network: Network) -> None:
    a, b = network.sites["a"], network.sites["b"]
    assert (a.pods, a.inside) == (b.pods, b.inside)
    async with echo(b, f"{b.pods}1") as target:
        reader, writer = await asyncio.open_connection(sock=await b.dial(target))
        assert await ask(reader, writer, b"same site") == b"same site"
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await a.dial(target)


@pytest.mark.root
@needs_namespaces
async def test_a_site_of_several_nodes_has_pods_that_all_of_them_reach() -> None:
    with build(("a", "b"), {"b": 2}) as network:
        first, second = network.nodes["b"]
        assert network.nodes["a"] == (network.sites["a"],)
        async with echo(network.sites["b"], f"{first.pods}1") as target:
            for node in (first, second):
                reader, writer = await asyncio.open_connection(sock=await node.dial(target))
                assert await ask(reader, writer, b"same pods") == b"same pods"
                writer.close()


@pytest.mark.root
@needs_filters
@pytest.mark.parametrize(
    ("fault", "breaks", "refuses"),
    [(faults.reset, True, True), (faults.silent, True, False), (faults.dropped, True, False), (faults.undiallable, False, False)],
)
async def test_a_link_fails_in_the_way_that_was_asked_for(network: Network, fault: faults.Link, *, breaks: bool, refuses: bool) -> None:
    """`breaks`: what is connected hears no more; `refuses`: whoever dials is told so."""
    a, b = network.sites["a"], network.sites["b"]
    async with echo(b, b.underlay) as target, echo(b, b.underlay, GATEWAY_PORT) as gateway:
        reader, writer = await asyncio.open_connection(sock=await a.dial(target))
        assert await ask(reader, writer, b"before") == b"before"
        with fault([a], [b]):
            if breaks:
                with pytest.raises((TimeoutError, ConnectionResetError)):
                    await ask(reader, writer, b"during", within_s=0.5)
            with pytest.raises(ConnectionRefusedError if refuses else TimeoutError):
                await asyncio.wait_for(a.dial(gateway), 0.5)
        writer.transport.abort()
        reader, writer = await asyncio.open_connection(sock=await a.dial(gateway))
        assert await ask(reader, writer, b"after") == b"after"
        writer.close()


@pytest.mark.root
@needs_filters
async def test_a_place_may_dial_out_and_not_be_dialled(network: Network) -> None:
    a, b = network.sites["a"], network.sites["b"]
    async with echo(a, a.underlay) as out, echo(b, b.underlay) as into:
        with faults.outbound_only([b]):
            reader, writer = await asyncio.open_connection(sock=await b.dial(out))
            assert await ask(reader, writer, b"out") == b"out"
            writer.close()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(a.dial(into), 0.5)


@pytest.mark.root
@needs_namespaces
async def test_everything_that_crosses_the_wire_is_seen(network: Network) -> None:
    a, b = network.sites["a"], network.sites["b"]
    async with echo(b, b.underlay) as target:
        with capture(network) as seen:
            reader, writer = await asyncio.open_connection(sock=await a.dial(target))
            await ask(reader, writer, b"plain to see")

            async def crossed() -> bool:
                return seen.holds(b"plain to see")

            await until(crossed, "the frame to be seen")
            assert any(b"plain to see" in frame for frame in seen.payloads(a.underlay, b.underlay))
            assert not seen.holds(b"never said")
            writer.close()


async def test_a_forwarder_carries_half_closed_connections_and_records_them(network: Network) -> None:
    async with forwarder(network) as path:
        seen = path.record()
        reader, writer = await asyncio.open_connection(*path.address)
        writer.write(b"hello")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(-1), 5) == b"hello"
        assert bytes(seen) == b"hellohello"
        writer.close()


async def test_a_cut_path_resets_and_refuses_until_it_is_mended(network: Network) -> None:
    async with forwarder(network) as path:
        reader, writer = await asyncio.open_connection(*path.address)
        await ask(reader, writer, b"before")
        await path.cut()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await ask(reader, writer, b"during")
        writer.close()
        path.mend()
        reader, writer = await asyncio.open_connection(*path.address)
        assert await ask(reader, writer, b"after") == b"after"
        writer.close()


async def test_a_frozen_path_loses_nothing(network: Network) -> None:
    async with forwarder(network) as path:
        reader, writer = await asyncio.open_connection(*path.address)
        await ask(reader, writer, b"before")
        path.freeze()
        asked = asyncio.create_task(ask(reader, writer, b"during"))
        done, _ = await asyncio.wait({asked}, timeout=0.3)
        assert not done
        path.mend()
        assert await asked == b"during"
        writer.close()


async def test_a_delay_is_added_in_both_directions(network: Network) -> None:
    async with forwarder(network) as path:
        reader, writer = await asyncio.open_connection(*path.address)
        await ask(reader, writer, b"before")
        path.delay_s = 0.1
        loop = asyncio.get_running_loop()
        start = loop.time()
        await ask(reader, writer, b"late")
        assert 0.2 <= loop.time() - start < 1
        writer.close()


async def test_a_window_lets_no_more_be_under_way_until_that_has_come_and_was_acknowledged(network: Network) -> None:
    async with forwarder(network) as path:
        reader, writer = await asyncio.open_connection(*path.address)
        await ask(reader, writer, b"before")
        path.delay_s, path.window = 0.02, CHUNK
        loop = asyncio.get_running_loop()
        start = loop.time()
        writer.write(bytes(4 * CHUNK))
        await reader.readexactly(4 * CHUNK)
        assert loop.time() - start >= 3 * 2 * path.delay_s
        writer.close()


async def test_a_program_that_ends_too_early_is_reported_with_its_last_words(network: Network, tmp_path: Path) -> None:
    process = Process("talker", [sys.executable, "-c", "print('the disk is on fire'); raise SystemExit(3)"], network.home, tmp_path, "0.0")
    await process.start()
    assert await process.ended() == 3
    with pytest.raises(Exception, match=r"(?s)status 3.*the disk is on fire"):
        process.check()


async def test_what_a_program_started_is_found_by_its_mark(network: Network, tmp_path: Path) -> None:
    script = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    process = Process("parent", [sys.executable, "-c", script], network.home, tmp_path, "0.42")
    await process.start()
    await process.ended()
    child = Path("/proc", process.log.read_text().strip())
    assert child.exists()
    end_marked("0.42")

    async def is_gone() -> bool:
        return not (child / "environ").exists() or (child / "stat").read_text().split()[2] == "Z"

    await until(is_gone, "the grandchild to end")


async def test_a_lab_that_was_killed_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    killed = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", ABANDONED, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    left = Path("/proc", killed.stdout.strip())
    with build(("next",)):
        end_orphans()

        async def is_gone() -> bool:
            return not left.exists() or (left / "stat").read_text().split()[2] == "Z"

        await until(is_gone, "the abandoned process to end")
        assert not list(NAMESPACES.glob("isthmus-*-left"))
