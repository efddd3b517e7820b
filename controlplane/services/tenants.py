"""Tenants: for the operator, and the first one."""

from dataclasses import replace
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.auth import OPERATOR_TENANT, Caller
from controlplane.errors import AlreadyExists, Conflict, Forbidden, NotFound
from controlplane.resources.base import Metadata
from controlplane.services import auditing, credentials
from controlplane.services.authorities import Fabric, create_tenant_authority
from controlplane.services.resources import BUILT_IN_NAMESPACES
from controlplane.store import changes
from controlplane.store import resources as resource_store
from controlplane.store import tenants as store
from controlplane.store.changes import StoredJson
from controlplane.store.session import enter
from controlplane.store.tenants import TenantRecord

DEFAULT = OPERATOR_TENANT
"""The tenant that is there from the first start."""
FIRST_CREDENTIAL = "admin"


async def create(session: AsyncSession, fabric: Fabric, caller: Caller, name: str, now: datetime) -> tuple[UUID, str]:
    """Its id, and an API token for its first administrator, which is not kept. Raises `AlreadyExists`."""
    tenant_id = await found(session, fabric, name, now)
    inside = replace(caller, tenant_id=tenant_id, tenant=name)
    _, token = await credentials.create(
        session, inside, FIRST_CREDENTIAL, namespace="system", type="API_TOKEN", service=False, days=None, now=now
    )
    await auditing.record(session, inside, "tenant.API.Create", now, namespace="", name=name)
    return tenant_id, token


async def found(session: AsyncSession, fabric: Fabric, name: str, now: datetime) -> UUID:
    """A tenant with its authority and its built-in namespaces; leaves the session inside it."""
    tenant_id = uuid4()
    await enter(session, tenant_id)
    try:
        await store.create(session, tenant_id, name, now)
    except IntegrityError:
        raise AlreadyExists(f"tenant {name} exists already") from None
    await create_tenant_authority(session, fabric, tenant_id, now)
    revision = await changes.raise_revision(session, tenant_id)
    for namespace in BUILT_IN_NAMESPACES:
        await resource_store.create(session, tenant_id, _namespace(namespace, revision, now))
    return tenant_id


async def list_all(definer: AsyncConnection | AsyncSession) -> tuple[TenantRecord, ...]:
    return await store.list_all(definer)


async def get(definer: AsyncConnection | AsyncSession, name: str) -> TenantRecord:
    """Raises `NotFound`."""
    for tenant in await store.list_all(definer):
        if tenant.name == name:
            return tenant
    raise NotFound(f"tenant {name} does not exist")


async def delete(session: AsyncSession, caller: Caller, tenant: TenantRecord, now: datetime) -> None:
    """With everything in it. Raises `Conflict` while it has sites or is the caller's, `Forbidden` for the built-in one."""
    if tenant.name == DEFAULT:
        raise Forbidden(f"tenant {DEFAULT} is built in")
    if tenant.id == caller.tenant_id:
        raise Conflict(f"tenant {tenant.name} is the one that this request acts in: delete it from another one")
    await enter(session, tenant.id)
    await changes.raise_revision(session, tenant.id)
    if await store.has_sites(session, tenant.id):
        raise Conflict(f"tenant {tenant.name} still has sites: decommission them first")
    await store.remove(session, tenant.id)
    await enter(session, caller.tenant_id)
    await auditing.record(session, caller, "tenant.API.Delete", now, namespace="", name=tenant.name)


def _namespace(name: str, revision: int, now: datetime) -> StoredJson:
    return StoredJson(
        kind="namespace",
        namespace="",
        name=name,
        uid=uuid4(),
        meta=Metadata(name=name, description="built in").model_dump(mode="json"),
        spec={},
        version=1,
        revision=revision,
        created_revision=revision,
        created_at=now,
        modified_at=now,
        creator_class="system",
    )
