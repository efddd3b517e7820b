"""Which object needs which, indexed both ways."""

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.resources.base import Key, Ref
from controlplane.store.tables import RefRow, ResourceRow


@dataclass(frozen=True)
class Referrer:
    kind: str
    key: Key
    path: str
    """Where it refers."""


async def put(session: AsyncSession, tenant_id: UUID, kind: str, key: Key, refs: Iterable[Ref]) -> None:
    """Replace what an object refers to."""
    await session.execute(
        delete(RefRow).where(RefRow.tenant_id == tenant_id, RefRow.kind == kind, RefRow.namespace == key.namespace, RefRow.name == key.name)
    )
    first = {(ref.kind, ref.key): ref for ref in reversed(tuple(refs))}
    rows = [
        {
            "tenant_id": tenant_id,
            "kind": kind,
            "namespace": key.namespace,
            "name": key.name,
            "to_kind": ref.kind,
            "to_namespace": ref.key.namespace,
            "to_name": ref.key.name,
            "path": ref.path,
        }
        for ref in first.values()
    ]
    if rows:
        await session.execute(insert(RefRow), rows)


async def referrers(session: AsyncSession, tenant_id: UUID, kind: str, keys: Iterable[Key]) -> tuple[Referrer, ...]:
    """Objects that refer to one of these, sorted."""
    query = select(RefRow.kind, RefRow.namespace, RefRow.name, RefRow.path).where(
        RefRow.tenant_id == tenant_id, RefRow.to_kind == kind, tuple_(RefRow.to_namespace, RefRow.to_name).in_(list(keys))
    )
    rows = await session.execute(query.order_by(RefRow.kind, RefRow.namespace, RefRow.name))
    return tuple(Referrer(kind, Key(namespace, name), path) for kind, namespace, name, path in rows)


async def missing(session: AsyncSession, tenant_id: UUID, refs: Iterable[Ref]) -> tuple[Ref, ...]:
    """Those whose target does not exist, in the order given."""
    wanted = tuple(refs)
    columns = (ResourceRow.kind, ResourceRow.namespace, ResourceRow.name)
    query = select(*columns).where(ResourceRow.tenant_id == tenant_id, tuple_(*columns).in_({(ref.kind, *ref.key) for ref in wanted}))
    there = {(kind, Key(namespace, name)) for kind, namespace, name in await session.execute(query)} if wanted else set()
    return tuple(ref for ref in wanted if (ref.kind, ref.key) not in there)


async def broken(session: AsyncSession, tenant_id: UUID, kind: str, key: Key) -> tuple[tuple[str, Key, bool], ...]:
    """(kind, key, whether it exists) of what an object refers to that is deleted or disabled."""
    target = (
        (ResourceRow.tenant_id == RefRow.tenant_id)
        & (ResourceRow.kind == RefRow.to_kind)
        & (ResourceRow.namespace == RefRow.to_namespace)
        & (ResourceRow.name == RefRow.to_name)
    )
    disabled = ResourceRow.meta["disable"].as_boolean()
    query = (
        select(RefRow.to_kind, RefRow.to_namespace, RefRow.to_name, ResourceRow.uid.is_not(None))
        .outerjoin(ResourceRow, target)
        .where(RefRow.tenant_id == tenant_id, RefRow.kind == kind, RefRow.namespace == key.namespace, RefRow.name == key.name)
        .where(ResourceRow.uid.is_(None) | disabled)
    )
    return tuple((to_kind, Key(namespace, name), there) for to_kind, namespace, name, there in await session.execute(query))
