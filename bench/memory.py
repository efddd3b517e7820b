"""Memory of the control plane per waiting agent, and how fast all of them hear of a change; memory of an agent and its Envoy."""

import asyncio
import json
import resource
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import uniform
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import psycopg
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.control import Signer
from agent.enrol import signing_request
from agent.protocol.enrolment import (
    BOOTSTRAP_PATH,
    REQUEST_CONFIG_PATH,
    BootstrapAnswer,
    BootstrapRequest,
    BootstrapSpec,
    ConfigRequest,
    Credentials,
    Infra,
    Passport,
)
from agent.protocol.manifest import MANIFEST_PATH, ManifestAnswer
from bench.propagation import Say
from bench.results import Section, quantile
from controlplane.loops.memory import EVERY_S
from lab.fabric import LABEL, Fabric
from lab.specs import INSIDE, http_loadbalancer, k8s_pool
from lab.wait import until

SITES, NODES = 50, 100
AGENTS = SITES * NODES
WAIT_S = 50
SETTLED_S = 3 * EVERY_S
"""By then the control plane has given back what connecting took."""
_BUSY = (429, 503)
"""Too many at once: an agent tries again a little later."""


@dataclass
class Simulated:
    """A node that does nothing but wait for its manifest, over one TLS connection."""

    signer: Signer
    hash: str | None = None
    revision: int = 0
    answered_at: dict[str, float] = field(default_factory=dict)
    """When each manifest was there, by its hash."""
    waiting: bool = False

    async def follow(self, url: str, trust: ssl.SSLContext) -> None:
        """Long polls, one after the other, until cancelled."""
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, ssl=trust, limit=1 << 18)
        try:
            while True:
                path = MANIFEST_PATH + (f"?hash={self.hash}&wait={WAIT_S}" if self.hash else "")
                request = httpx.Request("GET", url + path)
                proof = self.signer.authorization(request, time.time())
                writer.write(f"GET {path} HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: {proof}\r\n\r\n".encode())
                self.waiting = self.hash is not None
                status, body = await read_answer(reader)
                if status in _BUSY:
                    self.waiting = False
                    await asyncio.sleep(uniform(1, 5))
                    continue
                if status != 200:
                    raise RuntimeError(body.decode(errors="replace"))
                answer = ManifestAnswer.model_validate_json(body)
                if answer.hash != self.hash:
                    self.hash = answer.hash
                    self.answered_at[answer.hash] = asyncio.get_running_loop().time()
                self.revision = answer.revision
        finally:
            writer.transport.abort()


async def run(say: Say) -> list[Section]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3 * AGENTS:
        say(f"Skipped: {AGENTS} agents need {3 * AGENTS} open files, and {hard} are allowed")
        return []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * AGENTS), hard))
    async with Fabric((), progress=say) as fabric:
        waiting, all_within_s, median_s = await _waiting_agents(fabric, say)
    async with Fabric(("a", "b"), progress=say) as fabric:
        agent, envoy = await _site(fabric)
    notes = f"""
{AGENTS} simulated agents ({SITES} sites with {NODES} nodes each) hold a long poll over a TLS connection of their own to one control plane process; then a load balancer is
advertised at all sites. Resident memory is read from the kernel, {SETTLED_S:.0f} s after the last one began to wait; of agent and Envoy with one load balancer and one peer. Aims: ≤ 50 KB per waiting agent, all answered within 5 s, agent ≤ 90 MB.
"""
    rows = [
        ("what", "measured"),
        ("control plane, per waiting agent", f"{waiting:.0f} KB"),
        (f"the change until half of {AGENTS} agents were answered", f"{median_s:.2f} s"),
        (f"the change until all {AGENTS} agents were answered", f"{all_within_s:.2f} s"),
        ("agent", f"{agent / 1024:.0f} MB"),
        ("its Envoy", f"{envoy / 1024:.0f} MB"),
    ]
    return [Section("Memory", notes, rows)]


async def _waiting_agents(fabric: Fabric, say: Say) -> tuple[float, float, float]:
    """KB per agent, and seconds until all and until half of them were answered."""
    replica = fabric.replicas[0]
    say(f"Admitting {AGENTS} nodes")
    agents = await enrol_all(fabric, SITES, NODES)
    await fabric.api.create("origin_pool", "nobody", k8s_pool("nobody", ["site-1"]))
    before = resident_kb(replica.process.pid)
    trust = ssl.create_default_context(cafile=str(replica.ca))
    tasks = [asyncio.create_task(agent.follow(replica.url, trust)) for agent in agents]
    try:
        await until(lambda: _all(agents, tasks, lambda agent: agent.waiting), "all agents to wait", within_s=240, every_s=0.5)
        await asyncio.sleep(SETTLED_S)
        after = resident_kb(replica.process.pid)
        say(f"{AGENTS} agents wait; the control plane takes {after / 1024:.0f} MB")
        first = {agent.hash for agent in agents}
        started = asyncio.get_running_loop().time()
        await fabric.api.create("http_loadbalancer", "all", _everywhere())
        await until(
            lambda: _all(agents, tasks, lambda agent: agent.hash not in first), "all agents to be answered", within_s=60, every_s=0.2
        )
        times = [max(agent.answered_at.values()) - started for agent in agents]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return (after - before) / AGENTS, max(times), quantile(times, 0.5)


def _everywhere() -> dict[str, object]:
    spec = http_loadbalancer("all.test", ["nobody"], [])
    place = {"network": INSIDE, "virtual_site": {"namespace": "shared", "name": "all"}}
    return spec | {"advertise_custom": {"advertise_where": [{"virtual_site": place, "use_default_port": {}}]}}


async def _all(agents: Sequence[Simulated], tasks: Sequence[asyncio.Task[None]], holds: Callable[[Simulated], bool]) -> bool:
    """Raises what ended one of their tasks."""
    for task in tasks:
        if task.done():
            task.result()
    return all(holds(agent) for agent in agents)


async def enrol_all(fabric: Fabric, sites: int, nodes: int) -> list[Simulated]:
    """The first node of each site registers as any does; the others are copies of its row with names and keys of their own."""
    replica = fabric.replicas[0]
    agents = []
    async with httpx.AsyncClient(base_url=replica.url, verify=ssl.create_default_context(cafile=str(replica.ca)), timeout=60) as client:
        for number in range(1, sites + 1):
            site = f"site-{number}"
            token = await fabric.api.create("token", site, {"type": "JWT", "site_name": site})
            agents.append(await _enrol(client, token["spec"]["content"], site, "node-1"))
    address = f"host={fabric.directory / 'state' / 'postgres'} user=postgres dbname=postgres"
    async with await psycopg.AsyncConnection.connect(address) as database:
        cursor = await database.execute("UPDATE tenants SET revision = revision + 1 WHERE name = 'default' RETURNING revision")
        revised = await cursor.fetchone()
        assert revised
        copies = [(first.signer.node_id, *_copy(number, revised[0])) for first in agents for number in range(2, nodes + 1)]
        await cursor.executemany(_COPY, [(json.dumps(row), first) for first, _, row in copies])
    return [*agents, *(copy for _, copy, _ in copies)]


_COPY = "INSERT INTO nodes SELECT (jsonb_populate_record(first, %s::jsonb)).* FROM nodes first WHERE id = %s"


def _copy(number: int, revision: int) -> tuple[Simulated, dict[str, object]]:
    """A node, and what its row has of its own."""
    key, node_id = ec.generate_private_key(ec.SECP256R1()), str(uuid4())
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    return Simulated(Signer(node_id, key)), {"id": node_id, "name": f"node-{number}", "public_key_pem": pem, "revision": revision}


async def _enrol(client: httpx.AsyncClient, token: str, site: str, node: str) -> Simulated:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = signing_request(key, node)
    spec = BootstrapSpec(token=token, passport=Passport(cluster_name=site), infra=Infra(hostname=node, labels={LABEL: "lab"}), csr_pem=csr)
    registered = await _post(client, BOOTSTRAP_PATH, BootstrapRequest(spec=spec).model_dump_json())
    name = BootstrapAnswer.model_validate_json(registered).name
    admitted = await _post(client, REQUEST_CONFIG_PATH, ConfigRequest(name=name, token=token, csr_pem=csr).model_dump_json())
    return Simulated(Signer(Credentials.model_validate_json(admitted).node_id, key))


async def _post(client: httpx.AsyncClient, path: str, body: str) -> bytes:
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    if not answer.is_success:
        raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")
    return answer.content


async def _site(fabric: Fabric) -> tuple[int, int]:
    """KB of agent and Envoy at a site that calls another one."""
    a, b = fabric.site("a"), fabric.site("b")
    await b.cluster.deploy("echo", (sys.executable, "-m", "lab.echo"))
    await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
    await fabric.api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
    await fabric.api.applied("http_loadbalancer", "echo")
    return resident_kb(a.agent.pid), resident_kb(a.envoy_pid())


def resident_kb(pid: int) -> int:
    """Resident set of a process."""
    for line in Path("/proc", str(pid), "status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError(f"process {pid} has no memory")


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer, which has a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)
