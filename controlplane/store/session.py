"""Connections to Postgres: as the application's role, in transactions that belong to one tenant."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import URL, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from controlplane.store.schema import Refused, head

INTENT_CHANNEL = "isthmus_intent"
"""Payload `<tenant id>:<revision>`."""
STATUS_CHANNEL = "isthmus_status"
"""Payload `<tenant id>`."""

# Whoever only listens would never notice that the other side is gone: after one silent second it is asked every second, three times.
_KEEPALIVE: Mapping[str, Any] = {"keepalives_idle": 1, "keepalives_interval": 1, "keepalives_count": 3, "tcp_user_timeout": 4000}

LOCK_TIMEOUT = "10s"
STATEMENT_TIMEOUT = "30s"
CONNECTION_TIMEOUT_S = 10.0
"""For one of the pool."""

_ENTER = text(
    "SELECT set_config('isthmus.tenant', :tenant, true), set_config('lock_timeout', :lock, true),"
    " set_config('statement_timeout', :statement, true)"
)

# Of the role and of all that it could become by SET ROLE.
_POWERS = text("""
    SELECT current_user AS rolname,
           bool_or(rolsuper) AS rolsuper,
           bool_or(rolbypassrls) AS rolbypassrls,
           EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                   WHERE n.nspname = 'public' AND c.relkind = 'r' AND pg_has_role(c.relowner, 'MEMBER')) AS owner
    FROM pg_roles WHERE pg_has_role(oid, 'MEMBER')
""")


class Database:
    """One pool of connections. `listen_url` goes around a pooler, which would swallow notifications."""

    def __init__(self, url: URL, *, listen_url: URL | None = None, connections: int = 20) -> None:
        # Behind a pooler a prepared statement may belong to someone else's server connection.
        options = {"prepare_threshold": None} if listen_url else {}
        self._listen_url = listen_url or url
        self.engine: AsyncEngine = create_async_engine(
            url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=CONNECTION_TIMEOUT_S,
            pool_pre_ping=True,
            connect_args=options,
            hide_parameters=True,
        )

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def sessions(self, tenant_id: UUID) -> AsyncIterator[AsyncSession]:
        """One transaction that sees one tenant; committed at the end, rolled back on any exception."""
        async with self.transaction() as session:
            await enter(session, tenant_id)
            yield session

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """One transaction that sees no tenant until it `enter`s one."""
        async with AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @asynccontextmanager
    async def definer(self) -> AsyncIterator[AsyncConnection]:
        """Outside any tenant, for the functions that look across them; every statement commits by itself."""
        async with self.engine.connect() as connection:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")

    async def listen(self, *channels: str) -> psycopg.AsyncConnection:
        """A connection of one's own that hears these channels; the caller iterates over its `notifies()` and closes it."""
        address = self._listen_url.set(drivername="postgresql").render_as_string(hide_password=False)
        connection = await psycopg.AsyncConnection.connect(address, autocommit=True, **_KEEPALIVE)
        for channel in channels:
            await connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
        return connection

    async def check(self) -> None:
        """Refuse a role that row-level security does not bind, and a schema that is not the current one."""
        async with self.definer() as connection:
            await _check_role(connection)
            await check_schema(connection)

    async def reachable(self) -> bool:
        """Whether requests can be served: the database answers, and its schema is the current one."""
        try:
            async with self.definer() as connection:
                await check_schema(connection)
        except (OperationalError, Refused, TimeoutError):
            return False
        return True


async def enter(session: AsyncSession, tenant_id: UUID) -> None:
    """From here to the end of the transaction, only this tenant exists."""
    await session.execute(_ENTER, {"tenant": str(tenant_id), "lock": LOCK_TIMEOUT, "statement": STATEMENT_TIMEOUT})


async def _check_role(connection: AsyncConnection) -> None:
    role = (await connection.execute(_POWERS)).one()
    reasons = {
        "is a superuser": role.rolsuper,
        "may bypass row-level security (BYPASSRLS)": role.rolbypassrls,
        "owns the tables": role.owner,
    }
    bad = [reason for reason, holds in reasons.items() if holds]
    if bad:
        raise Refused(
            f"the database role {role.rolname!r} {' and '.join(bad)}, so it could read every tenant's rows. Give --database-url a role that owns"
            " nothing, and the owner's to --migration-database-url; `isthmus-controlplane migrate` creates the first with its rights"
        )


async def check_schema(connection: AsyncConnection) -> None:
    """Refuse any schema but the one this program was written for."""
    known = (await connection.execute(text("SELECT to_regclass('public.alembic_version') IS NOT NULL"))).scalar_one()
    version = (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar() if known else None
    if version != head():
        raise Refused(
            f"the database's schema is at {version or 'nothing'}, and this program needs {head()}: run `isthmus-controlplane migrate`"
            " with the owner's URL in --migration-database-url"
        )
