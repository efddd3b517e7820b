"""Who changed what. Records can be added and read, never changed."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Select, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.store.rows import values
from controlplane.store.tables import AuditRow


@dataclass(frozen=True)
class AuditRecord:
    at: datetime
    credential: str
    """Its name, which another one may have had before."""
    operator: bool
    rpc: str
    """As in F5 XC, e.g. `ves.io.schema.origin_pool.API.Create`."""
    namespace: str
    name: str
    uid: UUID | None = None
    revision: int | None = None
    object: dict[str, Any] | None = None
    """The object after the change, without its secrets."""
    credential_id: UUID | None = None
    """None: a registration token."""


async def add(session: AsyncSession, tenant_id: UUID, record: AuditRecord) -> None:
    await session.execute(insert(AuditRow).values(tenant_id=tenant_id, **vars(record)))


@dataclass(frozen=True)
class Term:
    """What a column has to be, or not to be."""

    column: Literal["credential", "rpc", "namespace", "name"]
    equal: bool
    value: str


async def between(
    session: AsyncSession, tenant_id: UUID, start: datetime, end: datetime, terms: Iterable[Term], *, newest_first: bool, most: int
) -> tuple[AuditRecord, ...]:
    """At most `most` records of [start, end) for which all terms hold."""
    order = (AuditRow.at.desc(), AuditRow.id.desc()) if newest_first else (AuditRow.at, AuditRow.id)
    return values(
        AuditRecord, await session.scalars(_matching(select(AuditRow), tenant_id, start, end, terms).order_by(*order).limit(most))
    )


async def count(session: AsyncSession, tenant_id: UUID, start: datetime, end: datetime, terms: Iterable[Term], *, most: int) -> int:
    """How many there are, counted up to `most`."""
    found = _matching(select(AuditRow.id), tenant_id, start, end, terms).limit(most)
    return await session.scalar(select(func.count()).select_from(found.subquery())) or 0


def _matching(query: Select[Any], tenant_id: UUID, start: datetime, end: datetime, terms: Iterable[Term]) -> Select[Any]:
    query = query.where(AuditRow.tenant_id == tenant_id, AuditRow.at >= start, AuditRow.at < end)
    for term in terms:
        column = getattr(AuditRow, term.column)
        query = query.where(column == term.value if term.equal else column != term.value)
    return query
