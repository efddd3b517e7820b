"""Objects of all kinds: one table, five verbs."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import delete, insert, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.resources.base import Key, Metadata, Stored
from controlplane.resources.registry import load
from controlplane.store.changes import StoredJson
from controlplane.store.rows import value, values
from controlplane.store.tables import DeletionRow, ResourceRow

_KEPT_PARSED = 50_000


@dataclass(frozen=True)
class Moment:
    """When a change happens: the tenant's revision and the time."""

    revision: int
    now: datetime


@dataclass(frozen=True)
class _Memo:
    """An object, found by uid and version and compared as a whole: what a transaction wrote may be rolled back, and its version come again."""

    json: StoredJson

    def __hash__(self) -> int:
        return hash((self.json.uid, self.json.version))


def parsed(json: StoredJson) -> Stored[Any]:
    """The object itself."""
    return _parsed(_Memo(json))


@lru_cache(maxsize=_KEPT_PARSED)
def _parsed(memo: _Memo) -> Stored[Any]:
    json = memo.json
    return Stored(
        kind=json.kind,
        uid=json.uid,
        metadata=Metadata.model_validate(json.meta),
        spec=load(json.kind, json.spec),
        version=json.version,
        revision=json.revision,
        created_revision=json.created_revision,
        created_at=json.created_at,
        modified_at=json.modified_at,
    )


async def create(session: AsyncSession, tenant_id: UUID, json: StoredJson) -> bool:
    """False if there is one of that name."""
    statement = upsert(ResourceRow).values(tenant_id=tenant_id, **vars(json)).on_conflict_do_nothing()
    return await session.scalar(statement.returning(ResourceRow.uid)) is not None


async def get(session: AsyncSession, tenant_id: UUID, kind: str, key: Key) -> StoredJson | None:
    return value(StoredJson, await session.scalar(_at(tenant_id, kind, key)))


async def list_page(
    session: AsyncSession, tenant_id: UUID, kind: str, namespace: str | None = None, *, after: Key | None = None, limit: int | None = None
) -> tuple[StoredJson, ...]:
    """Sorted by key, from the one after `after`; of one namespace or of all."""
    query = select(ResourceRow).filter_by(tenant_id=tenant_id, kind=kind).order_by(ResourceRow.namespace, ResourceRow.name).limit(limit)
    if namespace is not None:
        query = query.filter_by(namespace=namespace)
    if after is not None:
        query = query.where(tuple_(ResourceRow.namespace, ResourceRow.name) > tuple_(*after))
    return values(StoredJson, await session.scalars(query))


async def find(session: AsyncSession, tenant_id: UUID, kind: str, keys: Collection[Key]) -> tuple[StoredJson, ...]:
    """Those of these keys that exist."""
    if not keys:
        return ()
    columns = tuple_(ResourceRow.namespace, ResourceRow.name)
    return values(StoredJson, await session.scalars(select(ResourceRow).filter_by(tenant_id=tenant_id, kind=kind).where(columns.in_(keys))))


async def exists(session: AsyncSession, tenant_id: UUID, kind: str, key: Key) -> bool:
    query = select(ResourceRow.uid).filter_by(tenant_id=tenant_id, kind=kind, namespace=key.namespace, name=key.name)
    return await session.scalar(query) is not None


async def replace(session: AsyncSession, tenant_id: UUID, json: StoredJson) -> None:
    """Overwrite the object of that uid."""
    columns = {"meta": json.meta, "spec": json.spec, "version": json.version, "revision": json.revision, "modified_at": json.modified_at}
    statement = update(ResourceRow).filter_by(tenant_id=tenant_id, uid=json.uid).values(columns)
    await session.execute(statement.execution_options(synchronize_session=False))


async def remove(session: AsyncSession, tenant_id: UUID, gone: Iterable[StoredJson], moment: Moment) -> None:
    """With what hangs on them (refs, claims, secrets); leaves tombstones."""
    tombstones = [
        {
            "tenant_id": tenant_id,
            "revision": moment.revision,
            "kind": json.kind,
            "uid": json.uid,
            "namespace": json.namespace,
            "name": json.name,
            "deleted_at": moment.now,
        }
        for json in gone
    ]
    if tombstones:
        uids = [tombstone["uid"] for tombstone in tombstones]
        statement = delete(ResourceRow).filter_by(tenant_id=tenant_id).where(ResourceRow.uid.in_(uids))
        await session.execute(statement.execution_options(synchronize_session=False))
        await session.execute(insert(DeletionRow), tombstones)


async def in_namespace(session: AsyncSession, tenant_id: UUID, namespace: str) -> tuple[StoredJson, ...]:
    """Objects of all kinds inside a namespace, by kind and name."""
    query = select(ResourceRow).filter_by(tenant_id=tenant_id, namespace=namespace).order_by(ResourceRow.kind, ResourceRow.name)
    return values(StoredJson, await session.scalars(query))


def _at(tenant_id: UUID, kind: str, key: Key) -> Any:
    return select(ResourceRow).filter_by(tenant_id=tenant_id, kind=kind, namespace=key.namespace, name=key.name)
