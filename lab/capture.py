"""Records every frame that crosses the wire between places, whoever sent it; needs namespaces."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lab.network import Network

ETH_P_ALL = 3
LIMIT = 256 << 20
_BUFFER = 64 << 20


@dataclass
class Capture:
    """What was seen; `between` needs IPv4 addresses."""

    frames: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, frame: bytes) -> None:
        if self.size < LIMIT:
            self.frames.append(frame)
            self.size += len(frame)

    def payloads(self, source: str, target: str) -> list[bytes]:
        """What went from one address to the other, headers of IP and TCP included."""
        wanted = socket.inet_aton(source) + socket.inet_aton(target)
        return [frame[14:] for frame in self.frames if frame[26:34] == wanted]

    def holds(self, needle: bytes) -> bool:
        return any(needle in frame for frame in self.frames)


@contextmanager
def capture(network: Network) -> Iterator[Capture]:
    """Everything that passes the bridge, from now on."""
    seen, stopping = Capture(), threading.Event()
    tap = network.wan.call(_packet_socket)

    def read() -> None:
        while not stopping.is_set():
            try:
                seen.add(tap.recv(1 << 16))
            except TimeoutError:
                continue

    reader = threading.Thread(target=read, name="capture", daemon=True)
    reader.start()
    try:
        yield seen
    finally:
        stopping.set()
        reader.join()
        tap.close()


def _packet_socket() -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    tap.settimeout(0.1)
    return tap
