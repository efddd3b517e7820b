"""What agents call, as `agent.protocol` has it. Every call proves possession of the node's key."""

import base64
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Response
from fastapi.concurrency import run_in_threadpool

from agent.protocol.base import Message
from agent.protocol.enrolment import RENEW_PATH, Credentials, RenewRequest
from agent.protocol.manifest import (
    ITEMS_PATH,
    MANIFEST_PATH,
    SECRETS_PATH,
    ItemsAnswer,
    ItemsRequest,
    ManifestAnswer,
    SecretsAnswer,
    SecretsRequest,
)
from agent.protocol.report import HEARTBEAT_PATH, REPORT_PATH, Heartbeat, HeartbeatAnswer, Report
from controlplane.api.body import parse
from controlplane.api.deps import AgentSession, CurrentAgent, CurrentServices, Now
from controlplane.api.requests import message
from controlplane.compile.snapshot import Snapshot
from controlplane.errors import Forbidden
from controlplane.services import enrolment, reports, secrets, served
from controlplane.services.enrolment import Desk

router = APIRouter(tags=["agents"])

_LARGE = 256 << 10
"""Bytes that are not parsed on the event loop."""

M = TypeVar("M", bound=Message)


@router.get(MANIFEST_PATH, operation_id="isthmus.agent.Manifest", response_model=ManifestAnswer)
async def manifest(
    request: CurrentAgent,
    services: CurrentServices,
    known: Annotated[str | None, Query(alias="hash", max_length=64)] = None,
    wait: Annotated[float, Query(ge=0, le=300)] = 0.0,
) -> Response:
    """What the site should have: at once without `hash`, else as soon as it is another one, or after `wait` seconds."""
    agent = request.agent
    await services.proofs.spend(agent)
    wait_s = 0.0 if services.stopping.is_set() else wait
    answer = services.delivery.manifest(agent.tenant_id, agent.site_id, agent.node.id, known, wait_s)
    del request, agent  # a proof that is spent need not wait with its node
    return _answer(await answer)


@router.post(ITEMS_PATH, operation_id="isthmus.agent.Items", response_model=ItemsAnswer)
async def items(request: CurrentAgent, services: CurrentServices) -> Response:
    """Bodies of items, as many as fit in one answer."""
    asked = _read(ItemsRequest, request.body)
    await services.proofs.spend(request.agent)
    found = await services.delivery.items(request.agent.tenant_id, request.agent.site_id, asked.hashes)
    return _answer(ItemsAnswer.model_construct(items=found))


@router.post(SECRETS_PATH, operation_id="isthmus.agent.Secrets")
async def secret_bodies(request: CurrentAgent, services: CurrentServices) -> SecretsAnswer:
    """Bodies of secrets, of those that the site's items name."""
    agent, asked = request.agent, _read(SecretsRequest, request.body)
    owners = await services.delivery.secret_owners(agent.tenant_id, agent.site_id, asked.refs)
    if foreign := set(asked.refs) - owners.keys():
        raise Forbidden(f"nothing at this site needs {', '.join(sorted(foreign))}")
    await services.proofs.spend(request.agent)
    found: dict[str, bytes] = {}
    for tenant_id in set(owners.values()):
        own = [ref for ref in asked.refs if owners[ref] == tenant_id]
        async with services.database.sessions(tenant_id) as session:
            found |= await secrets.open_secrets(session, tenant_id, own, services.fabric.ring)
    return SecretsAnswer(secrets={ref: base64.b64encode(body).decode() for ref, body in found.items()})


@router.post(HEARTBEAT_PATH, operation_id="isthmus.agent.Heartbeat")
async def heartbeat(request: CurrentAgent, services: CurrentServices, now: Now) -> HeartbeatAnswer:
    """A sign of life. Its sequence protects it from being repeated."""
    return await services.heartbeats.take(request.agent, _read(Heartbeat, request.body), now)


async def _on_edge(request: CurrentAgent, services: CurrentServices) -> Snapshot | None:
    return await served.on_edge(services.delivery, request.agent)


OnEdge = Annotated[Snapshot | None, Depends(_on_edge)]
"""Comes before a session: it may need connections of its own."""


@router.post(REPORT_PATH, operation_id="isthmus.agent.Report")
async def report(request: CurrentAgent, services: CurrentServices, on_edge: OnEdge, session: AgentSession, now: Now) -> dict[str, Any]:
    """What the node sees around it."""
    large = len(request.body) > _LARGE
    said = await run_in_threadpool(_read, Report, request.body) if large else _read(Report, request.body)
    await reports.take(session, request.agent, said, on_edge, services.changes, now)
    services.heartbeats.reported(request.agent.node.id, said.boot_id)
    return {}


@router.post(RENEW_PATH, operation_id="isthmus.agent.Renew")
async def renew(request: CurrentAgent, services: CurrentServices, session: AgentSession, now: Now) -> Credentials:
    """The next certificate."""
    desk = Desk(services.fabric, services.entrance, request.agent.tenant_id)
    return await enrolment.renew(session, desk, request.agent, _read(RenewRequest, request.body).csr_pem, now)


def _answer(message: Message) -> Response:
    """As JSON at once: these can be long, and FastAPI would check them first."""
    return Response(message.model_dump_json(), media_type="application/json")


def _read(of: type[M], body: bytes) -> M:
    return message(of, parse(body))
