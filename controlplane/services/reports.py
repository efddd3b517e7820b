"""What nodes report: gateways, discovered services, health of origins and of paths to peers, metrics."""

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from ipaddress import ip_address
from operator import attrgetter
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.base import Message
from agent.protocol.items import Gateway
from agent.protocol.report import DiscoveryReport, IpsecAbility, MultiClusterServices, Report
from controlplane.auth import refused_proof
from controlplane.compile.snapshot import Snapshot
from controlplane.errors import FieldError, Invalid
from controlplane.services import served
from controlplane.services.admission import Allowance
from controlplane.services.agents import Agent, spend
from controlplane.store import nodes, observations
from controlplane.store.changes import raise_revision
from controlplane.store.observations import DiscoveryState, EdgeState, OriginState, PeerState

M = TypeVar("M", bound=Message)

MOST_GATEWAYS = 8
_DNS_NAME = re.compile(r"(?=.{1,253}$)([a-zA-Z0-9_]([-a-zA-Z0-9_]{0,61}[a-zA-Z0-9_])?\.)*[a-zA-Z0-9_]([-a-zA-Z0-9_]{0,61}[a-zA-Z0-9_])?\.?")


async def take(session: AsyncSession, agent: Agent, report: Report, on_edge: Snapshot | None, allowance: Allowance, now: datetime) -> None:
    """Every section that is there replaces what the node said before; metrics are added up, each report of them once.

    `on_edge`: what the node's site should have, if it is a regional edge. `allowance`: for changes of the tenant. Raises `TooManyRequests` beyond it,
    and takes nothing: the next report has what is true then.
    """
    await spend(session, agent)
    tenant_id, node_id = agent.tenant_id, agent.node.id
    await observations.note_boot(session, tenant_id, node_id, report.boot_id)
    if said := dict(_ends(agent, report)):
        await _take_ends(session, agent, said, allowance)
    if report.multi_cluster_services is not None:
        await _take_exports(session, agent, report.multi_cluster_services, allowance)
    if report.discoveries is not None:
        found = (_discovery(agent, discovery, now) for discovery in _by(report.discoveries, "discovery"))
        await observations.replace_discoveries(session, tenant_id, node_id, found)
    if report.origins is not None:
        origins = (OriginState(node_id, origin.pool, origin.healthy, origin.total, now) for origin in _by(report.origins, "pool"))
        await observations.replace_origins(session, tenant_id, node_id, origins)
    if report.peers is not None:
        peers = (
            PeerState(node_id, peer.site_id, peer.path, peer.model_dump(mode="json"), now) for peer in _by(report.peers, "site_id", "path")
        )
        await observations.replace_peers(session, tenant_id, node_id, peers)
    if report.edges is not None:
        edges = (EdgeState(node_id, edge.site_id, edge.model_dump(mode="json"), now) for edge in _by(report.edges, "site_id"))
        await observations.replace_edges(session, tenant_id, node_id, edges)
    if report.metrics is not None:
        await served.take(session, agent, report.boot_id, report.metrics, on_edge, now)


def _discovery(agent: Agent, report: DiscoveryReport, now: datetime) -> DiscoveryState:
    services = None if report.services is None else [service.model_dump(mode="json") for service in report.services]
    return DiscoveryState(agent.node.id, report.discovery, report.connected, report.reason, services, now)


def _by(messages: Iterable[M], *key: str) -> Iterable[M]:
    """One for each value of the key, the last."""
    return {attrgetter(*key)(message): message for message in messages}.values()


def _ends(agent: Agent, report: Report) -> Iterator[tuple[str, Any]]:
    """Columns of the node of which the report says something."""
    if report.gateways is not None:
        yield "gateways", _gateways(agent, report.gateways)
    if report.gateway_listener is not None:
        yield "gateway_listener", report.gateway_listener.model_dump(mode="json")
    if report.ipsec is not None:
        yield "ipsec", _ipsec(report.ipsec)


async def _take_ends(session: AsyncSession, agent: Agent, said: Mapping[str, Any], allowance: Allowance) -> None:
    """Where the node listens and what peers dial (columns of the node) is for whoever reads the tenant's nodes: a change of it is one of the tenant."""
    known = await nodes.get(session, agent.tenant_id, agent.node.id)
    if known is None or any(getattr(known, column) != value for column, value in said.items()):
        revision = await _next_revision(session, agent, allowance)
        await nodes.change(session, agent.tenant_id, agent.node.id, **said, revision=revision)


async def _take_exports(session: AsyncSession, agent: Agent, services: MultiClusterServices, allowance: Allowance) -> None:
    """Likewise. What is no news from this node is some if another node of its site said otherwise since."""
    said = services.model_dump(mode="json")
    own = await nodes.live(session, agent.tenant_id, [agent.node.site_id])
    last = max(own, key=attrgetter("exports_revision"), default=None)
    if any(node is None or node.exports != said for node in (last, next((node for node in own if node.id == agent.node.id), None))):
        revision = await _next_revision(session, agent, allowance)
        await nodes.change(session, agent.tenant_id, agent.node.id, exports=said, exports_revision=revision, revision=revision)


async def _next_revision(session: AsyncSession, agent: Agent, allowance: Allowance) -> int:
    """At which the node is changed. Raises `Unauthenticated` if it was revoked meanwhile."""
    allowance.spend(agent.node.id, asyncio.get_running_loop().time())
    revision = await raise_revision(session, agent.tenant_id)
    current = await nodes.get(session, agent.tenant_id, agent.node.id, lock=True)
    if current is None or current.revoked_at:
        raise refused_proof("Revoked", "this node was revoked")
    return revision


def _gateways(agent: Agent, gateways: tuple[Gateway, ...]) -> list[Any]:
    if len(gateways) > MOST_GATEWAYS:
        raise Invalid(f"a node has at most {MOST_GATEWAYS} gateways", [FieldError("gateways", f"{len(gateways)} of them")])
    for index, gateway in enumerate(gateways):
        if not _is_host(gateway.host) or not 0 < gateway.port < 65536:
            description = f"{gateway.host}:{gateway.port} is not an IP address or DNS name with a port"
            raise Invalid(description, [FieldError(f"gateways[{index}]", description)])
    own = (gateway.model_copy(update={"node_id": str(agent.node.id)}) for gateway in gateways)
    return [gateway.model_dump(mode="json") for gateway in own]


def _ipsec(ability: IpsecAbility) -> dict[str, Any]:
    if ability.host and not _is_host(ability.host):
        description = f"{ability.host} is not an IP address or DNS name"
        raise Invalid(description, [FieldError("ipsec.host", description)])
    return ability.model_dump(mode="json")


def _is_host(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return _DNS_NAME.fullmatch(host) is not None
    return True
