"""Where things live: with root a network namespace for each site, otherwise a range of loopback addresses for each.

In namespaces all sites have the *same* pod and service ranges, and reach each other only over the underlay, a bridge in a namespace of its own:

    root namespace            wan: bridge 172.31.0.1/16, taps at 172.31.1.x
      control plane                 │              │
      operator's curl           eth0 172.31.0.11  eth0 172.31.0.12
                                site a             site b            10.42/16 pods, 10.43/16 nodes and services, both local to each

A site of one node is one place with everything in it. With more, its cluster has the site's place and each node one of its own,
from which a route leads to the pods. Nothing is routed between the root namespace and the others; single ports are carried over by `lab.forwarder`.
"""

import asyncio
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")
PREFIX = "isthmus-"


@dataclass(frozen=True)
class Place:
    """One network that processes and sockets can be put into."""

    name: str
    namespace: str | None
    """None: the namespace that the lab itself runs in."""
    underlay: str
    """The address at which other sites dial this one; also its outside network."""
    inside: str
    service: str
    pods: str
    """Prefix of the pods' addresses, such as `10.42.1.`."""
    cluster: str
    """Where the Kubernetes API of this site listens."""
    thread: ThreadPoolExecutor
    """Its only thread has entered the namespace: a socket belongs to the namespace of the thread that made it."""
    link: str = ""
    """Its port at the bridge, where it has a namespace."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """The same command, run in this place."""
        return [*(["nsenter", f"--net={NAMESPACES / self.namespace}", "--"] if self.namespace else []), *argv]

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns when it runs in this place."""
        return self.thread.submit(work).result()

    def listen(self, host: str, port: int = 0) -> socket.socket:
        """A listening socket; port 0 takes any that is free."""
        return _prompt(self.call(lambda: socket.create_server((host, port), backlog=512)))

    async def dial(self, target: tuple[str, int]) -> socket.socket:
        """A TCP connection from here."""
        dialled = self.socket()
        try:
            await asyncio.get_running_loop().sock_connect(dialled, target)
        except BaseException:
            dialled.close()
            raise
        return dialled

    def socket(self) -> socket.socket:
        """A TCP socket that dials from here, non-blocking."""
        made = _prompt(self.call(socket.socket))
        made.setblocking(False)
        return made


def _prompt(made: socket.socket) -> socket.socket:
    """Without Nagle's delay, which asyncio does not switch off for sockets that it did not make. Accepted sockets inherit it."""
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


@dataclass(frozen=True)
class Network:
    """`home` is where the lab and the control plane run, `wan` where taps between sites live."""

    home: Place
    wan: Place
    sites: dict[str, Place]
    """Of the site's cluster; of everything, where it has one node. Regional edges are among them."""
    nodes: dict[str, tuple[Place, ...]]
    """By site."""

    @property
    def namespaced(self) -> bool:
        return self.wan.namespace is not None


@contextmanager
def build(names: Sequence[str], nodes: Mapping[str, int] | None = None) -> Iterator[Network]:
    """Networks for these sites, with one node each unless `nodes` says otherwise; removed at the end, whatever happens."""
    counts = {name: (nodes or {}).get(name, 1) for name in names}
    with ExitStack() as stack:
        home = _place(stack, "home", None, ["127.0.0.1"] * 3)
        if can_use_namespaces():
            sweep()
            yield _namespaces(stack, home, counts)
        else:
            yield _loopback(stack, home, counts)


def can_use_namespaces() -> bool:
    """Root with iproute2, and allowed to make namespaces (in many containers root is not)."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"):
        return False
    probe = f"{PREFIX}{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True).returncode == 0
    if made:
        _ip(f"netns del {probe}")
    return made


def sweep() -> None:
    """Remove namespaces of labs that died without cleaning up, and what still runs in them."""
    for path in sorted(NAMESPACES.glob(f"{PREFIX}*")):
        owner = path.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove(path.name)


def _namespaces(stack: ExitStack, home: Place, counts: Mapping[str, int]) -> Network:
    run = f"{PREFIX}{os.getpid()}-{os.urandom(2).hex()}"
    wan = f"{run}-wan"
    _ip(f"netns add {wan}")
    stack.callback(_remove, wan)
    _ip(f"-n {wan} link set lo up", f"-n {wan} link add wan type bridge", f"-n {wan} link set wan up")
    _ip(f"-n {wan} addr add 172.31.0.1/16 dev wan", f"-n {wan} route add local 172.31.1.0/24 dev wan")
    numbers = itertools.count(1)

    def place(name: str, pods_via: str | None = None) -> Place:
        number = next(numbers)
        namespace, underlay, link = f"{run}-{name}", f"172.31.0.{10 + number}", f"site{number}"
        _ip(f"netns add {namespace}")
        stack.callback(_remove, namespace)
        _ip(
            f"-n {namespace} link add eth0 type veth peer name {link} netns {wan}",
            f"-n {wan} link set {link} master wan up",
            f"-n {namespace} link set lo up",
            f"-n {namespace} link set eth0 up",
            f"-n {namespace} addr add {underlay}/16 dev eth0",
            f"-n {namespace} route add {f'10.42.0.0/16 via {pods_via}' if pods_via else 'local 10.42.0.0/16 dev lo'}",
            f"-n {namespace} route add local 10.43.0.0/16 dev lo",
        )
        return _place(stack, name, namespace, [underlay, "10.43.0.1", "10.43.1.1", "10.42.1.", "10.42.0.1"], link)

    sites = {name: place(name) for name in counts}
    nodes = {name: tuple(place(f"{name}-{n}", sites[name].underlay) for n in _numbers(count)) for name, count in counts.items()}
    return _network(home, _place(stack, "wan", wan, ["172.31.1."]), sites, nodes)


def _loopback(stack: ExitStack, home: Place, counts: Mapping[str, int]) -> Network:
    wan = stack.enter_context(_second_octet())

    def place(name: str) -> Place:
        net = f"127.{stack.enter_context(_second_octet())}"
        return _place(stack, name, None, [f"{net}.0.1", f"{net}.0.2", f"{net}.0.3", f"{net}.1.", f"{net}.0.4"])

    sites = {name: place(name) for name in counts}
    nodes = {name: tuple(place(f"{name}-{n}") for n in _numbers(count)) for name, count in counts.items()}
    return _network(home, _place(stack, "wan", None, [f"127.{wan}.1."]), sites, nodes)


def _numbers(count: int) -> range:
    """Of the nodes that need a place of their own."""
    return range(1, count + 1) if count > 1 else range(0)


def _network(home: Place, wan: Place, sites: dict[str, Place], nodes: dict[str, tuple[Place, ...]]) -> Network:
    return Network(home, wan, sites, {name: nodes[name] or (place,) for name, place in sites.items()})


@contextmanager
def _second_octet() -> Iterator[int]:
    """A number that no other lab on this machine has for its 127.N.0.0/16: an abstract Unix socket holds it, and goes with the process."""
    for octet in range(64, 255):
        with socket.socket(socket.AF_UNIX) as lock:
            try:
                lock.bind(f"\0isthmus-lab-{octet}")
            except OSError:
                continue
            yield octet
            return
    raise RuntimeError("all ranges of loopback addresses are taken by other labs")


def _place(stack: ExitStack, name: str, namespace: str | None, addresses: Sequence[str], link: str = "") -> Place:
    """`addresses` in the order in which `Place` has them; those that are left out are empty."""
    underlay, inside, service, pods, cluster = [*addresses, *[""] * (5 - len(addresses))]
    initializer = (lambda: _enter(namespace)) if namespace else None
    thread = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=initializer))
    return Place(name, namespace, underlay, inside, service, pods, cluster, thread, link)


def _enter(namespace: str) -> None:
    with (NAMESPACES / namespace).open() as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _remove(namespace: str) -> None:
    pids = subprocess.run(["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True).stdout
    for pid in pids.split():
        if int(pid) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def _ip(*lines: str) -> None:
    for line in lines:
        done = subprocess.run(["ip", *line.split()], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ip {line}: {done.stderr.strip()}")
