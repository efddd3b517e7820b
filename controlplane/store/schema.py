"""The schema: brought up to date by the role that owns it, and what the application's role may do with it."""

from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import URL, Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError

from controlplane.store.locks import Lock

FIRST_SERVER_VERSION = 15
"""The oldest Postgres that has what the tables need (`UNIQUE NULLS NOT DISTINCT`)."""

_READ_AND_ADD = ("audit_log",)
_READ = ("alembic_version",)
_WRITTEN = "a database URL is written postgresql://user:password@host:port/database"


class Refused(Exception):
    """The database cannot be used as it is; the message says what to do."""


def url_of(address: str) -> URL:
    """A database URL as SQLAlchemy wants it, whatever driver it named. Raises `Refused`, without the password in it."""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise Refused(_WRITTEN) from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise Refused(_WRITTEN)
    return url.set(drivername="postgresql+psycopg")


def head() -> str:
    """The revision of the schema that this program needs."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def migrate(owner_url: URL, app_url: URL) -> None:
    """Create or update the schema, and the application's role with its grants. Safe to repeat and to run from several replicas at once."""
    if owner_url.username == app_url.username:
        raise Refused("the application needs a role of its own: the database URL and the migration database URL name the same user")
    engine = create_engine(owner_url, poolclass=NullPool)
    with engine.connect() as connection:
        _check_server(connection)
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": int(Lock.MIGRATION)})
        connection.commit()
        command.upgrade(_config(connection), "head")
        _create_role(connection, app_url)
        _grant(connection, str(app_url.username))
        connection.commit()


def downgrade(owner_url: URL) -> None:
    """Remove everything; only tests want that."""
    with create_engine(owner_url, poolclass=NullPool).connect() as connection:
        command.downgrade(_config(connection), "base")
        connection.commit()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.attributes["connection"] = connection
    return config


def _check_server(connection: Connection) -> None:
    version = int(connection.execute(text("SHOW server_version_num")).scalar_one()) // 10_000
    if version < FIRST_SERVER_VERSION:
        raise Refused(f"Postgres {FIRST_SERVER_VERSION} or newer is needed, this is {version}")


def _create_role(connection: Connection, app_url: URL) -> None:
    known = connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": app_url.username}).first()
    if known is None:
        statement = sql.SQL("CREATE ROLE {} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE").format(_role(app_url.username))
        if app_url.password:
            statement += sql.SQL(" PASSWORD {}").format(sql.Literal(str(app_url.password)))
        _run(connection, statement)


def _grant(connection: Connection, role: str) -> None:
    tables = connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars().all()
    functions = connection.execute(
        text("SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef")
    )
    _run(connection, sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(_role(role)))
    for table in tables:
        _run(connection, sql.SQL("GRANT {} ON {} TO {}").format(sql.SQL(_rights(table)), sql.Identifier(table), _role(role)))
    for signature in functions.scalars():
        _run(connection, sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(sql.SQL(signature), _role(role)))


def _rights(table: str) -> str:
    if table in _READ:
        return "SELECT"
    return "SELECT, INSERT" if table in _READ_AND_ADD else "SELECT, INSERT, UPDATE, DELETE"


def _role(name: str | None) -> sql.Identifier:
    return sql.Identifier(str(name))


def _run(connection: Connection, statement: sql.Composable) -> None:
    connection.exec_driver_sql(statement.as_string().replace("%", "%%"))
