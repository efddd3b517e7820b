"""What can go wrong, each with its undo: entering breaks, leaving mends.

Links are broken by packet filters in the places themselves, so that nothing in the lab stands in the way of traffic; that takes namespaces and nft.
A tapped fabric can do without: see `Forwarder.cut` and `Forwarder.freeze`.
"""

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from agent.ipsec import PORT
from lab.network import Network, Place
from lab.process import Process
from lab.site import GATEWAY_PORT, Node

Link = Callable[[Sequence[Place], Sequence[Place]], AbstractContextManager[None]]

_tables = itertools.count(1)


def can_filter(network: Network) -> bool:
    """Whether faults of links can be had."""
    return network.namespaced and shutil.which("nft") is not None


@contextmanager
def reset(here: Sequence[Place], there: Sequence[Place]) -> Iterator[None]:
    """Between these, every segment is answered with a reset, as by a firewall that forgot its connections."""
    with ExitStack() as stack:
        for at, others in ((here, there), (there, here)):
            for place in at:
                passed = f"ip saddr {_set(others)} tcp flags & rst == rst accept"
                stack.enter_context(_filter(place, passed, f"ip saddr {_set(others)} meta l4proto tcp reject with tcp reset"))
        yield


@contextmanager
def dropped(source: Sequence[Place], target: Sequence[Place]) -> Iterator[None]:
    """Packets in this direction vanish; those in the other arrive."""
    with ExitStack() as stack:
        for place in target:
            stack.enter_context(_filter(place, f"ip saddr {_set(source)} drop"))
        yield


@contextmanager
def silent(here: Sequence[Place], there: Sequence[Place]) -> Iterator[None]:
    """Packets in both directions vanish."""
    with dropped(here, there), dropped(there, here):
        yield


@contextmanager
def undiallable(source: Sequence[Place], target: Sequence[Place]) -> Iterator[None]:
    """Connections that `source` opens to gateways of `target` vanish; those that `target` opens are fine."""
    with ExitStack() as stack:
        for place in target:
            stack.enter_context(_filter(place, f"ip saddr {_set(source)} tcp dport {GATEWAY_PORT} drop"))
        yield


@contextmanager
def without_ipsec(here: Sequence[Place], there: Sequence[Place]) -> Iterator[None]:
    """Between these, IKE and ESP vanish in both directions; all else arrives."""
    with ExitStack() as stack:
        for at, others in ((here, there), (there, here)):
            for place in at:
                stack.enter_context(_filter(place, f"ip saddr {_set(others)} udp dport {PORT} drop"))
        yield


@contextmanager
def outbound_only(places: Sequence[Place]) -> Iterator[None]:
    """As behind a firewall or NAT: whoever dials these hears nothing."""
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(_filter(place, "iifname eth0 tcp flags & (syn | ack) == syn drop"))
        yield


@contextmanager
def unplugged(network: Network, nodes: Sequence[Node], *others: Place) -> Iterator[None]:
    """The places of these nodes, and others, are off the network without a word; the way to the control plane as well."""
    links = {place.link for place in (*(node.place for node in nodes), *others)}
    ways_out = [way for node in nodes for way in node.ways_out]
    for way in ways_out:
        way.freeze()
    for link in links:
        _plug(network, link, "down")
    try:
        yield
    finally:
        for link in links:
            _plug(network, link, "up")
        for way in ways_out:
            way.mend()


@contextmanager
def frozen(pids: Sequence[int]) -> Iterator[None]:
    """Stopped in their tracks: they hold their sockets and answer nothing."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def programs(nodes: Sequence[Node]) -> list[int]:
    """Process ids of agents and Envoys, agents first, so that none sees its Envoy stop."""
    return [*(node.agent.pid for node in nodes), *(node.envoy_pid() for node in nodes)]


async def kill(nodes: Sequence[Node]) -> None:
    """Agent and Envoy at once, neither being asked."""
    envoys = [node.envoy_pid() for node in nodes]
    for node in nodes:
        node.agent.signal(signal.SIGKILL)
    for pid in envoys:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for node in nodes:
        await node.agent.ended()


async def kill_pods(processes: Sequence[Process]) -> None:
    """Without a word to anyone, the Kubernetes API included."""
    for process in processes:
        await process.kill()


def _set(places: Sequence[Place]) -> str:
    return f"{{ {', '.join(place.underlay for place in places)} }}"


@contextmanager
def _filter(place: Place, *rules: str) -> Iterator[None]:
    """Each fault has a table of its own, so that they can overlap."""
    table = f"fault{next(_tables)}"
    chain = f"add chain ip {table} in {{ type filter hook input priority 0; }}"
    _nft(place, f"add table ip {table}", chain, *(f"add rule ip {table} in {rule}" for rule in rules))
    try:
        yield
    finally:
        _nft(place, f"delete table ip {table}")


def _nft(place: Place, *lines: str) -> None:
    done = subprocess.run(place.command(["nft", "-f", "-"]), input="\n".join(lines), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nft in {place.name}: {done.stderr.strip()}")


def _plug(network: Network, link: str, state: str) -> None:
    subprocess.run(["ip", "-n", str(network.wan.namespace), "link", "set", link, state], check=True, capture_output=True)
