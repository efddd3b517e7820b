"""The whole fabric: builds it, hands out its parts, and takes it down again.

    async with Fabric(("a", "b")) as fabric:
        await fabric.site("b").cluster.deploy("echo", [sys.executable, "-m", "lab.bank.transfers"])
        await fabric.api.create("origin_pool", …)

Everything is driven as a user would: over the REST API, the Kubernetes API, and signals.
"""

import asyncio
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import httpx2

from lab.api import NAMESPACE, Api, Refused
from lab.cluster import API_PORT, Cluster
from lab.controlplane import ControlPlane, free_port, ready
from lab.faults import can_filter, outbound_only
from lab.forwarder import Forwarder
from lab.installed import NODE_PORT, POD, Kubelet, apply
from lab.kubernetes.client import Client
from lab.network import Network, Place, build
from lab.postgres import Pair, Postgres, pair, stored_in
from lab.process import BIN, Process, end_marked, end_orphans
from lab.site import GATEWAY_PORT, Edge, Node, Site, agent_of, told

LABEL = "fabric"
"""Every site carries this label with the value `lab`; virtual site `shared/all` selects it."""
MESH = {"full_mesh": {"control_and_data_plane_mesh": {}}, "virtual_site": [{"kind": "virtual_site", "namespace": "shared", "name": "all"}]}
SELECTOR = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": [f"{LABEL} in (lab)"]}}

_numbers = itertools.count(1)


class Fabric:
    """An asynchronous context manager. `sites` and `edges` are names."""

    def __init__(
        self,
        sites: Sequence[str] = ("a", "b"),
        *,
        edges: Sequence[str] = (),
        nodes: Mapping[str, int] | None = None,
        outbound: Collection[str] = (),
        installed: Collection[str] = (),
        ipsec: Collection[str] = (),
        mesh: bool = True,
        replicas: int = 1,
        tapped: bool = False,
        standby: bool = False,
        controlplane_env: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`nodes` says how many, for sites with more than one; `outbound` sites cannot be dialled; agents of `installed`
        sites run as pods of their clusters, which needs network namespaces and kubectl; those of `ipsec` have it; `mesh` puts all sites into one site mesh group;
        `replicas` of the control plane share a database; `tapped` leads every tunnel through a `Forwarder`; `standby` stores everything in a
        `Pair` of databases.
        """
        self.names, self.edge_names = tuple(sites), tuple(edges)
        self.sites: dict[str, Site] = {}
        self.edges: dict[str, Edge] = {}
        self.replicas: list[ControlPlane] = []
        self.directory = Path(tempfile.mkdtemp(prefix="isthmus-"))
        self._mark = f"{os.getpid()}.{next(_numbers)}"
        self._mesh, self._replicas, self._tapped, self._standby = mesh, replicas, tapped, standby
        self.databases: Pair | None = None
        self._counts, self._outbound, self._installed = dict(nodes or {}), frozenset(outbound), frozenset(installed)
        self.ipsec = frozenset(ipsec)
        self._env = dict(controlplane_env or {})
        self._progress = progress
        self._stack = AsyncExitStack()
        self._reached: dict[tuple[str, str, int], Forwarder] = {}
        self._taps = itertools.count(1)
        self._network: Network | None = None

    @property
    def network(self) -> Network:
        assert self._network is not None, "the fabric is not running"
        return self._network

    @property
    def api(self) -> Api:
        """Of the first replica, as the operator in tenant `default`."""
        return self.replicas[0].api

    def site(self, name: str) -> Site:
        return self.sites[name]

    def edge(self, name: str) -> Edge:
        return self.edges[name]

    def site_or_edge(self, name: str) -> Edge:
        return self.sites.get(name) or self.edges[name]

    def processes(self) -> list[Process]:
        """The programs of Isthmus that run, pods and emulators aside."""
        return [*(replica.process for replica in self.replicas), *(node.agent for node in self.nodes())]

    def nodes(self) -> list[Node]:
        return [node for site in (*self.sites.values(), *self.edges.values()) for node in site.nodes]

    async def __aenter__(self) -> Self:
        try:
            await self._build()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await asyncio.gather(*(node.agent.stop() for node in self.nodes()))
        await self._stack.aclose()
        if kind is None or not issubclass(kind, Exception):
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            print(f"The logs are kept in {self.directory}", file=sys.stderr)

    async def _build(self) -> None:
        end_orphans()
        self._network = self._stack.enter_context(build((*self.names, *self.edge_names), self._counts))
        self._stack.callback(end_marked, self._mark)
        trimming = asyncio.create_task(self._trim_logs())
        self._stack.callback(trimming.cancel)
        if self._standby:
            self.databases = await self._stack.enter_async_context(pair(self.network.home))
            self._env |= stored_in(self.databases)
        self._progress("Starting the control plane and the clusters")
        async with asyncio.TaskGroup() as group:
            for _ in range(self._replicas):
                group.create_task(self._add_replica())
            clusters = [group.create_task(self._start_cluster(name)) for name in self.names]
        self._progress("Registering the sites")
        if self._mesh:
            await self.api.create("virtual_site", "all", SELECTOR, namespace="shared")
            await self.api.create("site_mesh_group", "all", MESH)
            await self.api.create("namespace", NAMESPACE, {})
        async with asyncio.TaskGroup() as group:
            for name in self.edge_names:
                group.create_task(self._start_edge(name))
            for name, cluster in zip(self.names, clusters, strict=True):
                group.create_task(self._start_site(name, cluster.result()))

    # Parts

    async def _add_replica(self) -> None:
        """They start together, as replicas may."""
        port = free_port()
        replica = ControlPlane(
            port,
            Process(
                f"controlplane-{port}",
                [str(BIN / "isthmus-controlplane"), "serve"],
                self.network.home,
                self.directory,
                self._mark,
                {
                    "CONTROLPLANE_STATE_DIR": str(self.directory / "state"),
                    "CONTROLPLANE_HOST": "127.0.0.1",
                    "CONTROLPLANE_PORT": str(port),
                    "CONTROLPLANE_RATE_LIMIT": "1000000/minute",
                    "CONTROLPLANE_FAILURE_RATE_LIMIT": "1000000/minute",
                    **self._env,
                },
            ),
        )
        self._stack.push_async_callback(replica.stop)
        await replica.start()
        self.replicas.append(replica)

    async def _start_cluster(self, name: str) -> Cluster:
        place = self.network.sites[name]
        cluster = Cluster(place, self.directory / name, self._mark, secured=name in self._installed)
        self._stack.push_async_callback(cluster.stop)
        host, port = await self.reach(place, (place.cluster, API_PORT))
        await cluster.start(f"{host}:{port}")
        return cluster

    async def _start_site(self, name: str, cluster: Cluster) -> None:
        if name in self._installed:
            await self._install_site(name, cluster)
            return
        env = {"AGENT_LABELS": f"{LABEL}=lab", "AGENT_KUBECONFIG": str(cluster.kubeconfig)}
        if name in self._outbound:
            env["AGENT_ADVERTISED_GATEWAY"] = "none"
        if name in self.ipsec:
            env["AGENT_IPSEC"] = "userspace"
        self.sites[name] = Site(name, await self._nodes(name, env), cluster)
        if name in self._outbound and can_filter(self.network):
            self._stack.enter_context(outbound_only([node.place for node in self.sites[name].nodes]))
        await self._join(self.sites[name])

    async def _install_site(self, name: str, cluster: Cluster) -> None:
        """With one command, as its users do."""
        place = cluster.place
        await self.api.create("site", name, {}, labels={LABEL: "lab"})
        await apply(cluster, await self.api.manifest(name))
        ways_out = [way for replica in self.replicas if (way := await self.carry_replica(place, replica))]
        machine = await self.node_port(place, NODE_PORT)
        kubelet = Kubelet(place, cluster, self.directory / place.name / "agent", self._mark)
        async with httpx2.AsyncClient(**cluster.connection) as http:
            agent = await kubelet.pod(Client(http))
        self._stack.push_async_callback(agent.stop)
        self.sites[name] = Site(name, (Node(POD, place, agent, machine, ways_out, self),), cluster)
        await self._join(self.sites[name])

    async def _start_edge(self, name: str) -> None:
        await self.api.create("site", name, {"site_type": "REGIONAL_EDGE"})
        self.edges[name] = Edge(name, await self._nodes(name, {"AGENT_KUBECONFIG": "none"}))
        await self._join(self.edges[name])

    async def _join(self, site: Edge) -> None:
        await asyncio.gather(*(node.agent.start() for node in site.nodes))
        await self.online(site.name)
        self._progress(f"Site {site.name} is online")

    async def _nodes(self, name: str, env: Mapping[str, str]) -> tuple[Node, ...]:
        """Everything up to their start."""
        places = self.network.nodes[name]
        token = await self.api.create("token", name, {"type": "JWT", "site_name": name, "max_uses": len(places)})
        return tuple([await self._node(name, number, place, token["spec"]["content"], env) for number, place in enumerate(places, 1)])

    async def _node(self, site: str, number: int, place: Place, token: str, env: Mapping[str, str]) -> Node:
        directory = self.directory / place.name / "agent"
        directory.mkdir(parents=True)
        (directory / "token").write_text(token)
        tap = await self.tap(place) if self._tapped else None
        ways_out = [way for replica in self.replicas if (way := await self.carry_replica(place, replica))]
        urls = [replica.url for replica in self.replicas]
        agent = agent_of(site, f"{site}-{number}", place, directory, self._mark, {**told(urls, tap, place), **env})
        self._stack.push_async_callback(agent.stop)
        return Node(agent.env["AGENT_NODE"], place, agent, tap, ways_out, self)

    async def online(self, name: str, within_s: float = 40) -> None:
        """Until the site's nodes have registered and report."""
        nodes = self.site_or_edge(name).nodes

        async def is_online() -> bool:
            for node in nodes:
                node.agent.check()
            try:
                return bool((await self.api.get("site", name))["spec"]["site_state"] == "ONLINE")
            except Refused as refused:
                if refused.status != 404:
                    raise
                return False

        await ready(nodes[0].agent, is_online, f"site {name} to be online", within_s)

    def process(self, name: str, argv: Sequence[str], place: Place, directory: Path, env: Mapping[str, str] | None = None) -> Process:
        """A program that ends with the fabric at the latest; not started yet."""
        process = Process(name, argv, place, directory, self._mark, env or {})
        self._stack.push_async_callback(process.stop)
        return process

    @property
    def postgres(self) -> Postgres:
        """The server that the control plane has started."""
        return Postgres.embedded(self.directory / "state")

    # Ways in

    async def reach(self, place: Place, target: tuple[str, int]) -> tuple[str, int]:
        """As `Site.reach`, for any place; the same port number at loopback if it is free."""
        if place.namespace is None:
            return target
        key = (place.name, *target)
        if key not in self._reached:
            self._reached[key] = await self._forward(self.network.home, ("127.0.0.1", target[1]), place, target)
        return self._reached[key].address

    async def carry_replica(self, place: Place, replica: ControlPlane) -> Forwarder | None:
        """Make a control plane reachable in a site, at the URL that it has outside; None where it is so already."""
        if place.namespace is None:
            return None
        return await self._forward(place, ("127.0.0.1", replica.port), self.network.home, ("127.0.0.1", replica.port))

    def client(self, url: str, headers: dict[str, str]) -> httpx.AsyncClient:
        """An HTTP client that ends with the fabric."""
        client = httpx.AsyncClient(base_url=url, headers=headers, timeout=10, trust_env=False)
        self._stack.push_async_callback(client.aclose)
        return client

    async def node_port(self, place: Place, port: int) -> Forwarder:
        """What a machine of a cluster does for the gateway's Service."""
        return await self._forward(place, (place.underlay, port), place, (place.inside, GATEWAY_PORT))

    async def tap(self, place: Place) -> Forwarder:
        """Something in front of the gateway at a place, at an address of its own: a wiretap, or a load balancer."""
        number, wan = next(self._taps), self.network.wan
        return await self._forward(wan, (f"{wan.underlay}{number}", GATEWAY_PORT), wan, (place.underlay, GATEWAY_PORT))

    async def _forward(self, here: Place, listen: tuple[str, int], there: Place, target: tuple[str, int]) -> Forwarder:
        try:
            listener = here.listen(*listen)
        except OSError:
            listener = here.listen(listen[0])
        forwarder = Forwarder(listener, there, target)
        await forwarder.start()
        self._stack.push_async_callback(forwarder.stop)
        return forwarder

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(10)
            for process in self.processes():
                process.trim()
