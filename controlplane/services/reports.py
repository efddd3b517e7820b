"""What nodes report: gateways, discovered services, health of origins and of paths to peers, metrics."""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from operator import attrgetter
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.base import Message
from agent.protocol.items import Gateway
from agent.protocol.report import DiscoveryReport, EdgeMetrics, MetricsReport, Report
from controlplane.auth import refused_proof
from controlplane.errors import FieldError, Invalid
from controlplane.resources.base import Key
from controlplane.services.agents import Agent, spend
from controlplane.store import nodes, observations, telemetry
from controlplane.store.changes import raise_revision
from controlplane.store.observations import DiscoveryState, EdgeState, OriginState, PeerState
from controlplane.store.telemetry import BUCKET_S, Rollup

M = TypeVar("M", bound=Message)

MOST_GATEWAYS = 8
_DNS_NAME = re.compile(r"(?=.{1,253}$)([a-zA-Z0-9_]([-a-zA-Z0-9_]{0,61}[a-zA-Z0-9_])?\.)*[a-zA-Z0-9_]([-a-zA-Z0-9_]{0,61}[a-zA-Z0-9_])?\.?")
_COUNTED = {"http": re.compile("[1-5]xx"), "tcp": re.compile("ok|failed")}
_BOUND = re.compile(r"inf|[0-9]{1,9}(\.[0-9]{1,6})?(e\+?[0-9]{1,2})?")
_KINDS_OF_LOAD_BALANCER = {"http": "http_loadbalancer", "tcp": "tcp_loadbalancer"}


async def take(session: AsyncSession, agent: Agent, report: Report, now: datetime) -> None:
    """Every section that is there replaces what the node said before; metrics are added up, each report of them once."""
    await spend(session, agent)
    tenant_id, node_id = agent.tenant_id, agent.node.id
    await observations.note_boot(session, tenant_id, node_id, report.boot_id)
    if report.gateways is not None:
        await _take_gateways(session, agent, report.gateways)
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
        await _take_metrics(session, agent, report.boot_id, report.metrics, now)


def _discovery(agent: Agent, report: DiscoveryReport, now: datetime) -> DiscoveryState:
    services = [service.model_dump(mode="json") for service in report.services]
    return DiscoveryState(agent.node.id, report.discovery, report.connected, report.reason, services, now)


def _by(messages: Iterable[M], *key: str) -> Iterable[M]:
    """One for each value of the key, the last."""
    return {attrgetter(*key)(message): message for message in messages}.values()


async def _take_gateways(session: AsyncSession, agent: Agent, gateways: tuple[Gateway, ...]) -> None:
    """What peers dial is part of what is compiled: a change of it is one of the tenant."""
    said = _gateways(agent, gateways)
    known = await nodes.get(session, agent.tenant_id, agent.node.id)
    if known is None or known.gateways != said:
        revision = await raise_revision(session, agent.tenant_id)
        current = await nodes.get(session, agent.tenant_id, agent.node.id, lock=True)
        if current is None or current.revoked_at:
            raise refused_proof("Revoked", "this node was revoked")
        await nodes.change(session, agent.tenant_id, agent.node.id, gateways=said, revision=revision)


def _gateways(agent: Agent, gateways: tuple[Gateway, ...]) -> list[Any]:
    if len(gateways) > MOST_GATEWAYS:
        raise Invalid(f"a node has at most {MOST_GATEWAYS} gateways", [FieldError("gateways", f"{len(gateways)} of them")])
    for index, gateway in enumerate(gateways):
        if not _is_host(gateway.host) or not 0 < gateway.port < 65536:
            description = f"{gateway.host}:{gateway.port} is not an IP address or DNS name with a port"
            raise Invalid(description, [FieldError(f"gateways[{index}]", description)])
    own = (gateway.model_copy(update={"node_id": str(agent.node.id)}) for gateway in gateways)
    return [gateway.model_dump(mode="json") for gateway in own]


def _is_host(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return _DNS_NAME.fullmatch(host) is not None
    return True


async def _take_metrics(session: AsyncSession, agent: Agent, boot_id: str, report: MetricsReport, now: datetime) -> None:
    if await telemetry.accept(session, agent.tenant_id, agent.node.id, boot_id, report.sequence):
        bucket = datetime.fromtimestamp(now.timestamp() // BUCKET_S * BUCKET_S, UTC)
        await telemetry.add(session, agent.tenant_id, _rollups(agent, bucket, report.edges))


def _rollups(agent: Agent, bucket: datetime, edges: Iterable[EdgeMetrics]) -> Iterator[Rollup]:
    """Of load balancers, sites and classes that there are: a node cannot make up names."""
    view = agent.cache.view
    for edge in edges:
        namespace, _, name = edge.load_balancer.partition("/")
        known = view.intent.of(_KINDS_OF_LOAD_BALANCER[edge.protocol])
        if Key(namespace, name) in known and (not edge.destination or edge.destination in view.sites):
            yield Rollup(
                bucket=bucket,
                load_balancer=edge.load_balancer,
                protocol=edge.protocol,
                source_site=agent.site_id,
                destination_site=edge.destination,
                requests=_named(edge.requests, _COUNTED[edge.protocol]),
                latency_ms=_named(edge.latency_ms, _BOUND),
                latency_sum_ms=edge.latency_sum_ms,
                bytes_sent=edge.bytes_sent,
                bytes_received=edge.bytes_received,
            )


def _named(counts: Mapping[str, int], known: re.Pattern[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if known.fullmatch(name)}
