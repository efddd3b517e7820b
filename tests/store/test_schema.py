"""The migrations, and the role that they make, on both kinds of Postgres."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import ProgrammingError

from controlplane.store import schema
from controlplane.store.schema import Refused
from controlplane.store.session import Database
from controlplane.store.tables import Base
from tests.backend import DEBIAN_BINARIES, Postgres, debian, embedded


@pytest.fixture(scope="module", params=["embedded", "debian"])
def server(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """An empty database."""
    if request.param == "debian" and not DEBIAN_BINARIES.exists():
        pytest.skip("Debian's Postgres is not installed")
    with embedded() if request.param == "embedded" else debian() as server:
        yield server


@pytest.fixture
def migrated(server: Postgres) -> Postgres:
    schema.migrate(server.owner_url, server.app_url)
    return server


@pytest.fixture
async def application(migrated: Postgres) -> AsyncIterator[Database]:
    """As the role that serves."""
    database = Database(migrated.app_url)
    yield database
    await database.close()


@pytest.fixture
async def owner(migrated: Postgres) -> AsyncIterator[Database]:
    database = Database(migrated.owner_url)
    yield database
    await database.close()


def query(server: Postgres, statement: str) -> list[str]:
    with create_engine(server.owner_url, poolclass=NullPool).connect() as connection:
        return list(connection.execute(text(statement)).scalars())


def execute(server: Postgres, statement: str) -> None:
    with create_engine(server.owner_url, poolclass=NullPool).begin() as connection:
        connection.execute(text(statement))


TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
FUNCTIONS = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"


def test_down_and_up_again(migrated: Postgres) -> None:
    before = query(migrated, TABLES)
    schema.downgrade(migrated.owner_url)
    assert query(migrated, TABLES) == ["alembic_version"]
    assert query(migrated, FUNCTIONS) == []
    schema.migrate(migrated.owner_url, migrated.app_url)
    assert query(migrated, TABLES) == before
    schema.migrate(migrated.owner_url, migrated.app_url)


def test_the_schema_is_what_the_models_say(migrated: Postgres) -> None:
    with create_engine(migrated.owner_url, poolclass=NullPool).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_every_table_of_a_tenant_has_a_policy(migrated: Postgres) -> None:
    guarded = query(migrated, "SELECT relname FROM pg_class WHERE relrowsecurity AND relnamespace = 'public'::regnamespace")
    with_tenant = {table.name for table in Base.metadata.tables.values() if "tenant_id" in table.columns} | {"tenants"}
    assert set(guarded) == with_tenant
    policies = query(migrated, "SELECT DISTINCT tablename FROM pg_policies WHERE schemaname = 'public'")
    assert set(policies) == with_tenant


def test_functions_across_tenants_are_for_the_application_only(migrated: Postgres) -> None:
    public = "SELECT proname FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace AND proacl::text LIKE '%{=X%'"
    assert query(migrated, public) == []
    paths = "SELECT proname FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace AND NOT 'search_path=pg_catalog, public, pg_temp' = ANY (proconfig)"
    assert query(migrated, paths) == []


async def test_the_application_role_may_serve(application: Database) -> None:
    await application.check()
    assert await application.reachable()
    async with application.definer() as definer:
        with pytest.raises(ProgrammingError, match="permission denied"):
            await definer.execute(text("DELETE FROM audit_log"))
        with pytest.raises(ProgrammingError, match="permission denied"):
            await definer.execute(text("CREATE TABLE mine (id int)"))


async def test_the_owner_may_not_serve(owner: Database) -> None:
    with pytest.raises(Refused, match="owns the tables"):
        await owner.check()


async def test_a_member_of_the_owner_may_not_serve(migrated: Postgres, application: Database) -> None:
    app, owner = migrated.app_url.username, migrated.owner_url.username
    execute(migrated, f"GRANT {owner} TO {app}")
    with pytest.raises(Refused, match="owns the tables"):
        await application.check()
    execute(migrated, f"REVOKE {owner} FROM {app}")


async def test_a_member_of_a_superuser_may_not_serve(migrated: Postgres, application: Database) -> None:
    superuser = replace(migrated, owner_url=migrated.owner_url.set(username="postgres"))
    execute(superuser, f"GRANT postgres TO {migrated.app_url.username}")
    with pytest.raises(Refused, match="is a superuser"):
        await application.check()
    execute(superuser, f"REVOKE postgres FROM {migrated.app_url.username}")


async def test_another_schema_is_refused(migrated: Postgres, application: Database) -> None:
    execute(migrated, "UPDATE alembic_version SET version_num = 'older'")
    with pytest.raises(Refused, match=r"schema is at older.*isthmus-controlplane migrate"):
        await application.check()
    assert not await application.reachable()
    execute(migrated, f"UPDATE alembic_version SET version_num = '{schema.head()}'")


def test_one_role_for_both_is_refused(server: Postgres) -> None:
    with pytest.raises(Refused, match="a role of its own"):
        schema.migrate(server.owner_url, server.owner_url)
