"""API credentials: who a token belongs to, and making and withdrawing them."""

from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.auth import Caller, new_token, token_hash
from controlplane.errors import AlreadyExists, Forbidden, Invalid, NotFound, Unauthenticated
from controlplane.services import auditing
from controlplane.store import credentials as store
from controlplane.store import tenants
from controlplane.store.credentials import Credential

DEFAULT_LIFE_DAYS = 90
LONGEST_LIFE_DAYS = 3650

OPERATOR = "operator"
"""Name of the operator's credential."""


async def authenticate(definer: AsyncConnection, token: str, now: datetime) -> Caller:
    """Raises `Unauthenticated`; a token that never was, was revoked, is suspended or has expired gets the same answer."""
    bearer = await store.bearer(definer, token_hash(token))
    if bearer is None or not bearer.active or (bearer.expires_at is not None and bearer.expires_at <= now):
        raise Unauthenticated("the API token is not valid")
    return Caller(bearer.tenant_id, bearer.tenant, bearer.operator, bearer.name, bearer.id)


async def act_in(definer: AsyncConnection, caller: Caller, tenant: str | None) -> Caller:
    """The caller in the tenant that they name; only operators may name another than their own."""
    if not tenant or tenant == caller.tenant:
        return caller
    if not caller.operator:
        raise Forbidden("this credential belongs to another tenant")
    tenant_id = await tenants.find(definer, tenant)
    if tenant_id is None:
        raise NotFound(f"tenant {tenant} does not exist")
    return replace(caller, tenant_id=tenant_id, tenant=tenant)


async def create(
    session: AsyncSession, caller: Caller, name: str, *, namespace: str, type: str, service: bool, days: int | None, now: datetime
) -> tuple[Credential, str]:
    """The credential and its token, which is not kept. `days` 0 or None: the default life."""
    token = new_token()
    credential = Credential(
        id=uuid4(),
        name=name,
        namespace=namespace,
        service=service,
        type=type,
        hash=token_hash(token),
        operator=False,
        active=True,
        created_at=now,
        expires_at=_expiry(days, now),
    )
    try:
        await store.add(session, caller.tenant_id, credential)
    except IntegrityError:
        raise AlreadyExists(f"{_kind(service)} {name} exists already") from None
    await _record(session, caller, credential, "Create", now)
    return credential, token


async def list_all(session: AsyncSession, caller: Caller, *, service: bool) -> tuple[Credential, ...]:
    return await store.list_all(session, caller.tenant_id, service=service)


async def get(session: AsyncSession, caller: Caller, name: str, *, service: bool) -> Credential:
    found = await store.find(session, caller.tenant_id, name, service=service)
    if found is None or found.operator:
        raise NotFound(f"{_kind(service)} {name} does not exist")
    return found


async def revoke(session: AsyncSession, caller: Caller, name: str, *, service: bool, now: datetime) -> None:
    """From the commit on, nobody can use it. It is forgotten, so that its name is free."""
    credential = await get(session, caller, name, service=service)
    await store.remove(session, caller.tenant_id, name, service=service)
    await _record(session, caller, credential, "Revoke", now)


async def renew(session: AsyncSession, caller: Caller, name: str, *, service: bool, days: int | None, now: datetime) -> None:
    """It expires so many days from now."""
    credential = await get(session, caller, name, service=service)
    await store.renew(session, caller.tenant_id, name, service=service, expires_at=_expiry(days, now))
    await _record(session, caller, credential, "Renew", now)


async def activate(session: AsyncSession, caller: Caller, name: str, *, service: bool, active: bool, now: datetime) -> None:
    """Suspend it, or let it be used again."""
    credential = await get(session, caller, name, service=service)
    await store.activate(session, caller.tenant_id, name, service=service, active=active)
    await _record(session, caller, credential, "Activate", now)


async def set_operator(session: AsyncSession, tenant_id: UUID, token: str, now: datetime) -> None:
    """The operator's token, instead of the one before."""
    await store.remove(session, tenant_id, OPERATOR, service=True)
    credential = Credential(
        id=uuid4(),
        name=OPERATOR,
        namespace="system",
        service=True,
        type="SERVICE_API_TOKEN",
        hash=token_hash(token),
        operator=True,
        active=True,
        created_at=now,
        expires_at=None,
    )
    await store.add(session, tenant_id, credential)


def _expiry(days: int | None, now: datetime) -> datetime:
    days = days or DEFAULT_LIFE_DAYS
    if not 1 <= days <= LONGEST_LIFE_DAYS:
        raise Invalid(f"expiration_days should be 1 to {LONGEST_LIFE_DAYS}")
    return now + timedelta(days=days)


async def _record(session: AsyncSession, caller: Caller, credential: Credential, verb: str, now: datetime) -> None:
    namespace, name, uid = credential.namespace, credential.name, credential.id
    await auditing.record(session, caller, f"api_credential.CustomAPI.{verb}", now, namespace=namespace, name=name, uid=uid)


def _kind(service: bool) -> str:
    return "service_credential" if service else "api_credential"
