"""Each tenant's share of the snapshots of regional edges, kept ready in a replica that edges ask.

A tenant's share follows the tenant. If it cannot be compiled its last good one stays, and the others never notice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.compile.edge import Share, public_items, relay_item
from controlplane.compile.snapshot import CompiledItem
from controlplane.errors import NotFound, Unavailable
from controlplane.services.view import View
from controlplane.store import edges as store
from controlplane.store.edges import ShareRow
from controlplane.store.session import Database

log = structlog.get_logger()

NOTHING: Mapping[str, tuple[CompiledItem, ...]] = {}


@dataclass(frozen=True)
class Held:
    """What is known of a tenant's share."""

    revision: int
    """Of the tenant, up to which it was looked at."""
    share: Share | None
    """None: the tenant has nothing for edges."""
    good: bool = True
    """Whether it is that of the revision, or the last that could be compiled."""


class Shares:
    """Of one replica. `latest` gives the newest view of a tenant; `changed` is called when an edge's snapshot may be another one."""

    def __init__(
        self, database: Database, compiler: Executor, latest: Callable[[UUID], Awaitable[View]], changed: Callable[[], None]
    ) -> None:
        self._database = database
        self._compiler = compiler
        self._latest = latest
        self._changed = changed
        self._held: dict[UUID, Held] | None = None
        """None: no edge has asked yet."""
        self._lock = asyncio.Lock()
        """Held while looking."""
        self._behind: set[UUID] = set()
        self._follower: asyncio.Task[None] | None = None

    async def all(self) -> tuple[Share, ...]:
        """Raises `Unavailable` if they were never read and cannot be."""
        if self._held is None:
            await self._look(None)
        held = self._held or {}
        return tuple(each.share for _, each in sorted(held.items()) if each.share)

    async def at(self, tenant_id: UUID, revision: int) -> Held:
        """The tenant's, looked at no earlier than that revision."""
        await self.all()
        held = (self._held or {}).get(tenant_id)
        if held is None or held.revision < revision:
            await self._look([tenant_id])
            held = (self._held or {}).get(tenant_id)
        return held or Held(revision, None)

    def hear(self, tenant_id: UUID, revision: int) -> None:
        """The tenant changed: follow it in the background, if edges ask this replica."""
        if self._held is None or ((known := self._held.get(tenant_id)) and known.revision >= revision):
            return
        self._behind.add(tenant_id)
        self._follow()

    def edges_changed(self) -> None:
        """There are other edges than before: every tenant that is public may have something for them."""
        if self._held is not None:
            self._behind |= {tenant_id for tenant_id, held in self._held.items() if held.share and held.share.public is not NOTHING}
            self._follow()

    def forget(self, known: Iterable[UUID]) -> None:
        """Tenants other than these are gone."""
        gone = (self._held or {}).keys() - set(known)
        if self._held and gone:
            self._held = {tenant_id: held for tenant_id, held in self._held.items() if tenant_id not in gone}
            self._changed()

    def _follow(self) -> None:
        if self._behind and (self._follower is None or self._follower.done()):
            self._follower = asyncio.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        while self._behind:
            behind, self._behind = self._behind, set()
            try:
                await self._look(list(behind))
            except Unavailable as error:
                log.warning("regional edges keep what they have", error=str(error))
                return

    async def _look(self, tenant_ids: list[UUID] | None) -> None:
        async with self._lock:
            if tenant_ids is None and self._held is not None:
                return
            try:
                async with self._database.definer() as definer:
                    rows = await store.shares(definer, tenant_ids)
            except (SQLAlchemyError, OSError) as error:
                raise Unavailable("the database does not answer") from error
            before = self._held or {}
            found = {row.tenant_id: await self._share(row, before.get(row.tenant_id)) for row in rows}
            self._held = {**before, **found}
            if any(before.get(tenant_id) is None or before[tenant_id].share != held.share for tenant_id, held in found.items()):
                self._changed()

    async def _share(self, row: ShareRow, before: Held | None) -> Held:
        last = before.share.public if before and before.share else NOTHING
        public, good = await self._public(row, last) if row.public else (NOTHING, True)
        if not row.sites and not public:
            return Held(row.revision, None, good)
        relay = relay_item(str(row.tenant_id), row.anchor_pem, row.crl_pem, row.sites)
        return Held(row.revision, Share(relay, public, row.revocations), good)

    async def _public(
        self, row: ShareRow, last: Mapping[str, tuple[CompiledItem, ...]]
    ) -> tuple[Mapping[str, tuple[CompiledItem, ...]], bool]:
        try:
            view = await self._latest(row.tenant_id)
            return await asyncio.get_running_loop().run_in_executor(self._compiler, public_items, view.intent, view.observations), True
        except NotFound:
            return NOTHING, True
        except Exception:
            log.exception("regional edges keep the last good part of a tenant", tenant=str(row.tenant_id), revision=row.revision)
            return last, False
