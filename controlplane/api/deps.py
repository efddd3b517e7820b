"""What routes ask for. The only place with `Depends` on requests, callers, sessions and services.

All are asynchronous, even where they wait for nothing: FastAPI runs others in threads, which takes longer than they do.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.report import HEARTBEAT_PATH, REPORT_PATH
from controlplane.api.body import inflate, parse, read_bytes
from controlplane.auth import Caller, proof_in, token_hash, token_in, verify_body
from controlplane.errors import Forbidden, Invalid, NotFound, TooManyRequests, Unauthenticated
from controlplane.resources.base import Key
from controlplane.services import credentials
from controlplane.services.admission import Allowance, Gate, Proofs
from controlplane.services.agents import Agent, Agents, Call
from controlplane.services.authorities import Fabric
from controlplane.services.delivery import Delivery
from controlplane.services.heartbeats import Heartbeats
from controlplane.services.public_names import Txt
from controlplane.services.status import Observer
from controlplane.services.tokens import Entrance
from controlplane.store.session import Database

TENANT_HEADER = "x-volterra-apigw-tenant"


class Limits:
    """How fast one replica lets itself be asked."""

    def __init__(self, per_credential: RateLimitItem, per_failing_address: RateLimitItem) -> None:
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._per_credential = per_credential
        self._per_failing_address = per_failing_address

    def spend(self, credential: str) -> None:
        """One request of a credential, by the hash of its token. Raises `TooManyRequests`."""
        if not self._window.hit(self._per_credential, credential):
            raise self._refusal(self._per_credential, credential, "this credential sends too many requests")

    def knows(self, credential: str) -> bool:
        """Whether it was good a moment ago."""
        return self._window.get_window_stats(self._per_credential, credential).remaining < self._per_credential.amount

    def fail(self, address: str) -> None:
        """One request without a valid credential. Raises `TooManyRequests`."""
        if not self._window.hit(self._per_failing_address, address):
            raise self._failing(address)

    def check(self, address: str, known: Callable[[], bool]) -> None:
        """Raises `TooManyRequests` for an address that fails too often, before anything is looked up; who shares it and is known goes on."""
        if not self._window.test(self._per_failing_address, address) and not known():
            raise self._failing(address)

    def _failing(self, address: str) -> TooManyRequests:
        return self._refusal(self._per_failing_address, address, "too many requests without a valid credential")

    def _refusal(self, limit: RateLimitItem, who: str, message: str) -> TooManyRequests:
        reset_at = self._window.get_window_stats(limit, who).reset_time
        return TooManyRequests(message, retry_after_s=max(1.0, reset_at - clock().timestamp()))


@dataclass(frozen=True)
class Services:
    """Everything that requests share in one replica; built in `app.py`."""

    database: Database
    fabric: Fabric
    entrance: Entrance
    delivery: Delivery
    agents: Agents
    heartbeats: Heartbeats
    observer: Observer
    limits: Limits
    gate: Gate
    calls: Allowance
    changes: Allowance
    """Of what nodes say of themselves."""
    proofs: Proofs
    txt: Txt
    """Looks TXT records up."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the replica stops: what waits answers at once."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def clock() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - this is the edge that reads the clock


async def _now() -> datetime:
    return clock()


async def _client_address(request: Request) -> str:
    return request.client.host if request.client else ""


ClientAddress = Annotated[str, Depends(_client_address)]
CurrentServices = Annotated[Services, Depends(_services)]
Now = Annotated[datetime, Depends(_now)]


async def _caller(request: Request, services: CurrentServices, now: Now) -> Caller:
    address = await _client_address(request)
    try:
        token = token_in(request.headers.get("authorization"))
        credential = token_hash(token).hex()
        services.limits.check(address, partial(services.limits.knows, credential))
        async with services.database.definer() as definer:
            caller = await credentials.authenticate(definer, token, now)
            services.limits.spend(credential)
            return await credentials.act_in(definer, caller, request.headers.get(TENANT_HEADER))
    except Unauthenticated:
        services.limits.fail(address)
        raise


CurrentCaller = Annotated[Caller, Depends(_caller)]


async def _operator(caller: CurrentCaller) -> Caller:
    if not caller.operator:
        raise Forbidden("only the operator may do this")
    return caller


Operator = Annotated[Caller, Depends(_operator)]


async def _is_operator(request: Request, services: CurrentServices, now: Now) -> bool:
    return "authorization" in request.headers and (await _caller(request, services, now)).operator


IsOperator = Annotated[bool, Depends(_is_operator)]
"""For what anybody may ask, and the operator gets more of. A credential that is not valid is refused all the same."""


async def _json(request: Request, caller: CurrentCaller) -> Any:
    return parse(await read_bytes(request))


async def _optional_json(request: Request, caller: CurrentCaller) -> Any:
    body = await read_bytes(request)
    return parse(body) if body.strip() else {}


JsonBody = Annotated[Any, Depends(_json)]
"""Not even read before it is known who sends it."""
OptionalJsonBody = Annotated[Any, Depends(_optional_json)]
"""As `JsonBody`; {} if there is none."""


async def _session(services: CurrentServices, caller: CurrentCaller) -> AsyncIterator[AsyncSession]:
    async with services.database.sessions(caller.tenant_id) as session:
        yield session


Session = Annotated[AsyncSession, Depends(_session, scope="function")]
"""The request's transaction: committed before the answer is sent, rolled back on any exception."""

LARGEST_REPORT = 8 << 20
"""Bytes of its body, before and after it is decompressed."""
LARGEST_OF_AGENTS = 256 << 10
"""As `LARGEST_REPORT`, for every other call of agents."""


async def _enrolment(request: Request, services: CurrentServices) -> Any:
    try:
        return parse(await read_bytes(request, LARGEST_OF_AGENTS))
    except Invalid:
        services.limits.fail(await _client_address(request))
        raise


EnrolmentBody = Annotated[Any, Depends(_enrolment)]
"""Anybody may send one: what cannot be read counts as a request without a valid credential."""


@dataclass(frozen=True)
class AgentRequest:
    """A call of a node that proved who it is."""

    agent: Agent
    body: bytes


async def recognised(request: Request, services: CurrentServices, now: Now) -> AgentRequest:
    """The body is not even read before the proof is known to come from a node. Signs of life never wait in line."""
    path, query = request.scope["path"], request.scope["query_string"].decode("latin-1")
    target = request.scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    address = await _client_address(request)
    largest = LARGEST_REPORT if path == REPORT_PATH else LARGEST_OF_AGENTS
    try:
        call = Call(proof_in(request.headers.get("authorization")), request.method, target)
        services.limits.check(address, partial(services.agents.knows, call))
        async with services.gate.place() if path != HEARTBEAT_PATH else nullcontext():
            agent = await services.agents.recognise(call, now)
        services.calls.spend(agent.node.id, asyncio.get_running_loop().time())
        sent = await read_bytes(request, largest)
        verify_body(agent.proof, sent)
    except Unauthenticated:
        services.limits.fail(address)
        raise
    return AgentRequest(agent, inflate(sent, request.headers.get("content-encoding"), largest))


CurrentAgent = Annotated[AgentRequest, Depends(recognised)]


async def _agent_session(services: CurrentServices, request: CurrentAgent) -> AsyncIterator[AsyncSession]:
    async with services.gate.place(), services.database.sessions(request.agent.tenant_id) as session:
        yield session


AgentSession = Annotated[AsyncSession, Depends(_agent_session, scope="function")]
"""As `Session`, for calls of agents that write."""


_NAME = re.compile(r"[a-z]([-a-z0-9]{0,126}[a-z0-9])?")


async def _name(request: Request) -> str:
    return _segment(request, "name")


async def _namespace(request: Request) -> str:
    return _segment(request, "namespace") if "namespace" in request.path_params else ""


async def _key(request: Request) -> Key:
    return Key(await _namespace(request), await _name(request))


def _segment(request: Request, name: str) -> str:
    """What cannot be a name does not exist; some of it the database would not even look for."""
    text: str = request.path_params[name]
    if not _NAME.fullmatch(text):
        raise NotFound(f"{text!r} cannot be the {name} of anything")
    return text


NameInPath = Annotated[str, Depends(_name)]
NamespaceInPath = Annotated[str, Depends(_namespace)]
"""Empty where the path has none."""
KeyInPath = Annotated[Key, Depends(_key)]
