"""One tenant never reads another, whatever a query says."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from controlplane.auth import Caller
from controlplane.store.session import Database
from controlplane.store.tables import Base

OF_TENANT = sorted(table.name for table in Base.metadata.tables.values() if "tenant_id" in table.columns)


@pytest.mark.parametrize("table", OF_TENANT)
async def test_a_query_without_a_condition_sees_only_its_tenant(database: Database, caller: Caller, table: str) -> None:
    async with database.sessions(caller.tenant_id) as session:
        others = text(f"SELECT count(*) FROM {table} WHERE tenant_id <> :own")
        assert (await session.execute(others, {"own": caller.tenant_id})).scalar_one() == 0


async def test_without_a_tenant_there_is_nothing(database: Database, caller: Caller) -> None:
    async with database.transaction() as session:
        assert (await session.execute(text("SELECT count(*) FROM resources"))).scalar_one() == 0
        assert (await session.execute(text("SELECT count(*) FROM tenants"))).scalar_one() == 0


async def test_rows_of_another_tenant_cannot_be_written(database: Database, new_tenant: Callable[[], Any]) -> None:
    one, other = await new_tenant(), await new_tenant()
    with pytest.raises((ProgrammingError, DBAPIError), match="row-level security"):
        async with database.sessions(one.tenant_id) as session:
            await session.execute(
                text("INSERT INTO deletions VALUES (:tenant, 1, 'site', gen_random_uuid(), 'system', 'a', now())"),
                {"tenant": other.tenant_id},
            )
    async with database.sessions(one.tenant_id) as session:
        changed = await session.execute(text("UPDATE tenants SET revision = 99 WHERE id = :id"), {"id": other.tenant_id})
        assert changed.rowcount == 0  # type: ignore[attr-defined]  # a cursor's result


async def test_the_tenant_ends_with_the_transaction(database: Database, caller: Caller) -> None:
    async with database.sessions(caller.tenant_id) as session:
        assert await _tenant(session) == caller.tenant_id
    async with database.transaction() as session:
        assert await _tenant(session) is None


async def _tenant(session: Any) -> UUID | None:
    found: UUID | None = (await session.execute(text("SELECT current_tenant()"))).scalar()
    return found
