"""What load balancers served, for graphs and for Prometheus. Both read what is in the database, so every replica answers the same."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from uuid import UUID

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.errors import FieldError, Invalid
from controlplane.services.graph import Graph, Span, graph
from controlplane.store import edges, resources, telemetry, tenants
from controlplane.store.session import Database
from controlplane.store.telemetry import Rollup

MOST_ROLLUPS = 50_000
"""For one graph: a second of work, and some 100 MB."""
LABELS = ("tenant", "namespace", "loadbalancer", "source_site", "destination_site")


async def service_graph(
    session: AsyncSession, tenant_id: UUID, namespace: str | None, span: Span, group_by: Sequence[str], only: Mapping[str, str]
) -> Graph:
    """Of the load balancers in one namespace or in all. `only`: load balancer and site names that are wanted, by `VHOST` and `SITE`.

    Raises `Invalid` if more was recorded in that time than is added up for one request.
    """
    names = await _site_names(session, tenant_id)
    rollups = await telemetry.between(
        session, tenant_id, span.start, span.end, namespace=namespace, name=only.get("VHOST"), most=MOST_ROLLUPS + 1
    )
    if len(rollups) > MOST_ROLLUPS:
        description = (
            f"there are more than {MOST_ROLLUPS} records of that time: ask for a shorter one, for one namespace or one load balancer"
        )
        raise Invalid(description, [FieldError("start_time", description)])
    wanted = (rollup for rollup in rollups if _is_wanted(rollup, only, names))
    return await asyncio.to_thread(graph, wanted, span, group_by, names)


def _is_wanted(rollup: Rollup, only: Mapping[str, str], names: Mapping[str, str]) -> bool:
    return "SITE" not in only or only["SITE"] in (names.get(rollup.source_site), names.get(rollup.destination_site))


async def exposition(database: Database) -> list[Metric]:
    """Families for Prometheus, of all tenants."""
    families = _families()
    async with database.definer() as definer:
        known = await tenants.list_all(definer)
    for tenant in known:
        async with database.sessions(tenant.id) as session:
            totals = await telemetry.totals(session, tenant.id)
            names = await _site_names(session, tenant.id)
        for rollup in totals:
            _add(families, rollup, _labels(tenant.name, rollup, names))
    return list(families.values())


def _families() -> dict[str, Metric]:
    return {
        "requests": CounterMetricFamily("isthmus_loadbalancer_requests", "HTTP requests served, by class.", labels=(*LABELS, "class")),
        "connections": CounterMetricFamily("isthmus_loadbalancer_connections", "TCP connections, by outcome.", labels=(*LABELS, "outcome")),
        "latency": HistogramMetricFamily("isthmus_loadbalancer_latency_seconds", "Time to answer an HTTP request.", labels=LABELS),
        "sent": CounterMetricFamily("isthmus_loadbalancer_sent_bytes", "Bytes to clients.", labels=LABELS),
        "received": CounterMetricFamily("isthmus_loadbalancer_received_bytes", "Bytes from clients.", labels=LABELS),
    }


def _add(families: Mapping[str, Metric], rollup: Rollup, labels: Sequence[str]) -> None:
    counted = families["requests" if rollup.protocol == "http" else "connections"]
    for name, count in sorted(rollup.requests.items()):
        counted.add_metric((*labels, name), count)  # type: ignore[attr-defined]  # the base class lacks it
    if rollup.latency_ms:
        families["latency"].add_metric(labels, list(_buckets(rollup)), rollup.latency_sum_ms / 1000)  # type: ignore[attr-defined]  # as above
    families["sent"].add_metric(labels, rollup.bytes_sent)  # type: ignore[attr-defined]  # as above
    families["received"].add_metric(labels, rollup.bytes_received)  # type: ignore[attr-defined]  # as above


def _buckets(rollup: Rollup) -> Iterator[tuple[str, float]]:
    """Upper bounds in seconds, the last one `+Inf`."""
    bounds = sorted((float(bound), count) for bound, count in rollup.latency_ms.items())
    for bound, count in bounds:
        yield ("+Inf" if bound == float("inf") else str(bound / 1000)), count
    if bounds and bounds[-1][0] != float("inf"):
        yield "+Inf", bounds[-1][1]


def _labels(tenant: str, rollup: Rollup, names: Mapping[str, str]) -> tuple[str, ...]:
    namespace, _, name = rollup.load_balancer.partition("/")
    sites: Iterable[str] = (names.get(site, site) for site in (rollup.source_site, rollup.destination_site))
    return (tenant, namespace, name, *sites)


async def _site_names(session: AsyncSession, tenant_id: UUID) -> dict[str, str]:
    """By id, with those of the regional edges."""
    listed = await edges.list_all(session)
    shared = {str(json.uid): json.name for json, _ in listed.edges} if listed else {}
    return shared | {str(site.uid): site.name for site in await resources.list_page(session, tenant_id, "site")}
