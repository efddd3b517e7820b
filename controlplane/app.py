"""Everything put together: from settings to services, and from services to an application."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any

import limits
import structlog
from fastapi import FastAPI

from controlplane.api import (
    agent,
    authorities,
    config,
    data,
    description,
    discovery,
    errors,
    health,
    operator,
    public_names,
    register,
    status,
    topology,
    web,
)
from controlplane.api.deps import Limits, Services
from controlplane.api.middleware import Observe
from controlplane.api.polls import Polls
from controlplane.loops import heartbeats as heartbeat_loop
from controlplane.loops import homes, memory, notifications, retention, stopping
from controlplane.loops import leases as lease_loop
from controlplane.loops.retention import Keep
from controlplane.services import admission
from controlplane.services.admission import Gate, Proofs
from controlplane.services.agents import Agents
from controlplane.services.authorities import Fabric
from controlplane.services.delivery import Delivery
from controlplane.services.heartbeats import Heartbeats
from controlplane.services.leases import Leases
from controlplane.services.public_names import resolver
from controlplane.services.status import Observer
from controlplane.services.tokens import Entrance
from controlplane.settings import Settings
from controlplane.store.session import Database

log = structlog.get_logger()

Clock = Callable[[], datetime]
Work = Callable[[], Coroutine[Any, Any, None]]

RESTART_AFTER_S = 1.0

DESCRIPTION = """The control plane of Isthmus. Objects, paths, field names and errors follow the F5 XC configuration API.

Send `Authorization: APIToken <token>`. An answer of 2xx means committed; its `revision` is what to wait for in an object's status."""


def create_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
    """The application; `app.state.services` has to be set before the first request, as `running` does."""
    app = FastAPI(title="Isthmus control plane", version=version("isthmus"), description=DESCRIPTION, lifespan=lifespan)
    for router in (
        health.router,
        register.router,
        agent.router,
        operator.router,
        public_names.router,
        authorities.router,
        web.router,
        status.router(),
        config.router(),
        data.router,
        topology.router,
        discovery.router,
    ):
        app.include_router(router)
    errors.install(app)
    description.install(app)
    app.add_middleware(Polls)
    app.add_middleware(Observe)
    return app


def open_services(settings: Settings, database: Database, fabric: Fabric, compiler: ThreadPoolExecutor, clock: Clock) -> Services:
    life = timedelta(seconds=settings.node_certificate_life_s)
    fabric = replace(fabric, own_certificate=settings.own_certificate, node_life=life)
    delivery = Delivery(database, fabric, compiler)
    heartbeats = Heartbeats(database, clock())
    leases = Leases(database, heartbeats)
    return Services(
        database=database,
        fabric=fabric,
        entrance=Entrance(
            urls=settings.urls,
            longest_token_life_s=settings.longest_token_life_s,
            agent_image=settings.agent_image,
        ),
        delivery=delivery,
        agents=Agents(database, delivery),
        heartbeats=heartbeats,
        observer=Observer(database, delivery, heartbeats, leases, clock),
        gate=Gate(),
        calls=admission.calls(),
        changes=admission.changes(),
        proofs=Proofs(database),
        txt=resolver(settings.public_names_resolver),
        limits=Limits(limits.parse(settings.rate_limit), limits.parse(settings.failure_rate_limit)),
    )


def running(services: Services, keep: Keep, *more: Work) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """A lifespan with the background work of a replica."""
    delivery, heartbeats, observer = services.delivery, services.heartbeats, services.observer

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = services
        work: tuple[Work, ...] = (
            lambda: notifications.follow(services.database, delivery, observer.bell),
            lambda: heartbeat_loop.flush(heartbeats, observer.clock),
            lambda: lease_loop.watch(observer.leases, observer.clock),
            lambda: retention.forget(services.database, keep, observer.clock),
            lambda: homes.follow(services.database, heartbeats, observer.clock),
            memory.trim,
            lambda: stopping.release(delivery, observer.bell, services.stopping),
            *more,
        )
        tasks = [asyncio.create_task(_keep_up(each)) for each in work]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await heartbeats.flush(observer.clock())

    return lifespan


async def _keep_up(work: Work) -> None:
    """Loops handle what they expect; anything else is a bug, and must not end them."""
    while True:
        try:
            return await work()
        except Exception:
            log.exception("background work failed, starting it again")
            await asyncio.sleep(RESTART_AFTER_S)
