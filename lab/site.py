"""Sites and their nodes: what tests call, watch and break."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from lab.cluster import Cluster
from lab.forwarder import Forwarder
from lab.network import Place
from lab.process import BIN, Process, ProcessFailed

if TYPE_CHECKING:
    from lab.fabric import Fabric

GATEWAY_PORT = 15443


@dataclass
class Node:
    """One agent with its Envoy."""

    name: str
    place: Place
    agent: Process
    tap: Forwarder | None
    """Stands before the gateway when the fabric is tapped, or the agent installed in a cluster: what peers send to this node passes through it."""
    ways_out: list[Forwarder]
    """To the replicas of the control plane, where the node's place is not the lab's own."""
    fabric: "Fabric" = field(repr=False)

    @property
    def state(self) -> Path:
        """The agent's state directory."""
        return self.agent.directory / "state"

    async def reach(self, port: int, host: str | None = None) -> tuple[str, int]:
        """An address for the lab, and for the user's own curl, that leads to `host:port` at this node; the inside network by default."""
        return await self.fabric.reach(self.place, (host or self.place.inside, port))

    async def http(self, port: int, domain: str) -> httpx.AsyncClient:
        """A client of the load balancer that listens on this port of the inside network."""
        host, reached = await self.reach(port)
        return self.fabric.client(f"http://{host}:{reached}", {"host": domain})

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TCP connection, made from within the node's place."""
        return await asyncio.open_connection(sock=await self.place.dial((self.place.inside, port)))

    def envoy_pid(self) -> int:
        """Of the Envoy that the agent supervises now."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_envoy_of(entry, self.state):
                return int(entry.name)
        raise ProcessFailed(f"no Envoy runs at {self.name}. Last lines of its agent:\n{self.agent.tail()}")

    def charon_pid(self) -> int:
        """Of the IKE daemon that the agent supervises now."""
        return int(json.loads((self.state / "run" / "charon.json").read_text())["pid"])


@dataclass
class Edge:
    """A regional edge: nodes and nothing else."""

    name: str
    nodes: tuple[Node, ...]

    @property
    def node(self) -> Node:
        """The first, which is often the only one."""
        return self.nodes[0]

    @property
    def fabric(self) -> "Fabric":
        return self.node.fabric

    @property
    def place(self) -> Place:
        return self.node.place

    @property
    def agent(self) -> Process:
        return self.node.agent

    @property
    def tap(self) -> Forwarder | None:
        return self.node.tap

    async def reach(self, port: int, host: str | None = None) -> tuple[str, int]:
        return await self.node.reach(port, host)

    async def http(self, port: int, domain: str) -> httpx.AsyncClient:
        return await self.node.http(port, domain)

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self.node.connect(port)

    def envoy_pid(self) -> int:
        return self.node.envoy_pid()


@dataclass
class Site(Edge):
    """A customer edge: nodes and a cluster."""

    cluster: Cluster


def told(urls: Sequence[str], tap: Forwarder | None, place: Place) -> dict[str, str]:
    """Settings of an agent that any node of the lab has."""
    host, port = tap.address if tap else (place.underlay, GATEWAY_PORT)
    return {
        "AGENT_CONTROL_PLANE_URLS": ",".join(urls),
        "AGENT_GATEWAY_ADDRESS": f"{place.underlay}:{GATEWAY_PORT}",
        "AGENT_ADVERTISED_GATEWAY": f"{host}:{port}",
        "AGENT_INSIDE_ADDRESS": place.inside,
        "AGENT_OUTSIDE_ADDRESS": place.underlay,
        "AGENT_SERVICE_ADDRESS": place.service,
        "AGENT_DRAIN_S": "0.5",
        "AGENT_IPSEC": "off",
    }


def agent_of(site: str, name: str, place: Place, directory: Path, mark: str, env: Mapping[str, str]) -> Process:
    """Not started yet; `directory` holds its registration token."""
    own = {
        "AGENT_SITE": site,
        "AGENT_NODE": name,
        "AGENT_TOKEN_FILE": str(directory / "token"),
        "AGENT_STATE_DIR": str(directory / "state"),
    }
    return Process("agent", [str(BIN / "isthmus-agent"), "run"], place, directory, mark, {**own, **env})


def _is_envoy_of(process: Path, state: Path) -> bool:
    try:
        command = (process / "cmdline").read_bytes()
    except OSError:
        return False
    return b"envoy" in command.split(b"\0")[0] and str(state).encode() in command
