"""For probes and for Prometheus."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from controlplane.api.deps import CurrentServices, IsOperator, Now
from controlplane.errors import Unavailable
from controlplane.services import telemetry

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="isthmus.health.Live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", operation_id="isthmus.health.Ready")
async def ready(services: CurrentServices) -> dict[str, str]:
    """Requests can be served: the database answers and its schema is the right one. Sites do not matter here."""
    if services.stopping.is_set():
        raise Unavailable("stopping")
    if not await services.database.reachable():
        raise Unavailable("the database cannot be reached, or its schema is not the current one")
    return {"status": "ok"}


class _Told(Collector):
    """Families that were read from the database, as a collector."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


@router.get("/metrics", operation_id="isthmus.health.Metrics")
async def metrics(services: CurrentServices, operator: IsOperator, now: Now) -> Response:
    """In the text format of Prometheus: this replica's own to anybody, which name no tenant.

    With the operator's token (`Authorization: Bearer <token>`) those of all tenants' load balancers and sites, too, which every replica tells alike.
    """
    exposed = generate_latest()
    if operator:
        registry = CollectorRegistry()
        registry.register(_Told(await telemetry.exposition(services.database)))
        registry.register(_Told(await services.observer.leases.exposition(now)))
        exposed += generate_latest(registry)
    return Response(exposed, media_type=CONTENT_TYPE_LATEST)
