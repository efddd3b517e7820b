"""Facts that all replicas share."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.store.tables import SettingRow


async def get(session: AsyncSession | AsyncConnection, key: str) -> dict[str, Any] | None:
    return (await session.execute(select(SettingRow.value).where(SettingRow.key == key))).scalar()


async def put(session: AsyncSession, key: str, value: dict[str, Any]) -> None:
    statement = insert(SettingRow).values(key=key, value=value)
    await session.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))
