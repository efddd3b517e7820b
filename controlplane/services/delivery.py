"""What every site should have, kept ready: a replica's caches of intent, compiled snapshots, and the agents that wait for a change.

Postgres is the truth. A cache holds one tenant's view and catches up by revision, when a notification says so, when
somebody names something it does not know, or after a while; so losing a notification costs time, never correctness.
What cannot be read or compiled changes nothing: the last good snapshot stays in force.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from agent.protocol.items import ItemKind
from agent.protocol.manifest import ItemBody, ManifestAnswer
from controlplane.auth import refused_proof
from controlplane.compile.edge import Share, compile_edge, tenant_of
from controlplane.compile.intent import Tenant
from controlplane.compile.site import compile_site
from controlplane.compile.snapshot import CompiledItem, Snapshot
from controlplane.errors import NotFound, TooManyRequests, Unavailable
from controlplane.services.answers import ANSWER_BYTES, answer, fitting, named
from controlplane.services.authorities import Fabric
from controlplane.services.caches import OnEdges, Published, TenantCache
from controlplane.services.shares import Shares
from controlplane.services.view import Edges, View, advance, beside, beside_concerned, concerned, first_view
from controlplane.store import changes as store
from controlplane.store import edges as edge_store
from controlplane.store.session import Database

log = structlog.get_logger()

LONGEST_WAIT_S = 55.0
RELOADED_AFTER_S = 1800.0
"""A cache that could not catch up for so long reads everything anew: tombstones are not kept for ever."""
IDLE_S = 900.0
"""A tenant that nobody asked for so long is dropped from memory."""

V = TypeVar("V")


class Delivery:
    """Of one replica. `compiler` runs what is pure and slow; one thread, so that it never takes more than its share."""

    def __init__(self, database: Database, fabric: Fabric, compiler: Executor, *, most_waiting: int = 20_000) -> None:
        self._database = database
        self._fabric = fabric
        self._compiler = compiler
        self._most_waiting = most_waiting
        self._waiting = 0
        self._tenants: dict[UUID, TenantCache] = {}
        self._opening: dict[UUID, asyncio.Task[TenantCache]] = {}
        self._heard: dict[UUID, int] = {}
        """Of tenants that are being opened: the latest revision of which a notification told."""
        self._edges = Edges()
        self._edges_lock = asyncio.Lock()
        """Held while they are read."""
        self._next_edges_look: asyncio.Task[None] | None = None
        """Reads them, and has not begun to."""
        self.shares = Shares(database, compiler, self._latest, self._share_changed)

    # What agents ask

    async def manifest(self, tenant_id: UUID, site_id: str, node_id: UUID, known: str | None, wait_s: float) -> ManifestAnswer:
        """The site's manifest, or its difference from the one with hash `known`; waits for one, but for no longer than `wait_s`."""
        cache = await self.cache(tenant_id)
        deadline = _now() + min(max(wait_s, 0.0), LONGEST_WAIT_S)
        published = await self.published(cache, site_id)
        if known is not None and published.hash != known:
            # The node may have been told something newer by another replica.
            await self.catch_up(cache)
            published = await self.published(cache, site_id)
        while published.hash == known and await self._changed(cache, site_id, node_id, deadline):
            if cache.view.fleet.nodes[node_id].revoked_at:
                raise refused_proof("Revoked", "this node was revoked")
            published = await self.published(cache, site_id)
        # Not what it was before the wait: that it is outdated may be known by now, and the new one not compiled.
        return answer(cache, site_id, cache.published.get(site_id, published), known)

    async def items(self, tenant_id: UUID, site_id: str, hashes: Sequence[str]) -> tuple[ItemBody, ...]:
        """In the order asked, as many as fit in one answer: of what the site should have, or lately should have had. Others are missing."""
        cache = await self.cache(tenant_id)
        found = await self._items(cache, site_id, hashes)
        if len(found) < len(set(hashes)):
            await self.catch_up(cache)
            found = await self._items(cache, site_id, hashes)
        return fitting(found.values(), ANSWER_BYTES)

    async def _items(self, cache: TenantCache, site_id: str, hashes: Iterable[str]) -> dict[str, CompiledItem]:
        snapshot = (await self.published(cache, site_id)).snapshot
        current = {item.hash: item for item in snapshot.items.values()}
        found = ((hash, current.get(hash) or cache.superseded.get((site_id, hash))) for hash in hashes)
        return {hash: item for hash, item in found if item is not None}

    async def secret_owners(self, tenant_id: UUID, site_id: str, refs: Sequence[str]) -> dict[str, UUID]:
        """Those of these references that the site's items name, and whose secrets they are: on a regional edge, those of many tenants."""
        cache = await self.cache(tenant_id)
        allowed = await self._secret_owners(cache, site_id, refs)
        if len(allowed) < len(set(refs)):
            await self.catch_up(cache)
            allowed = await self._secret_owners(cache, site_id, refs)
        return allowed

    async def _secret_owners(self, cache: TenantCache, site_id: str, refs: Sequence[str]) -> dict[str, UUID]:
        found = named((await self.published(cache, site_id)).snapshot, refs)
        if not cache.view.sites[site_id].spec.is_edge:
            return dict.fromkeys(found, cache.id)
        return {ref: UUID(tenant_of(key)) for ref, key in found.items()}

    async def _changed(self, cache: TenantCache, site_id: str, node_id: UUID, deadline: float) -> bool:
        """Wait until the site's manifest may be another one; False when the time is up, or when the node asks anew elsewhere."""
        if self._waiting >= self._most_waiting:
            raise TooManyRequests("too many nodes wait at this replica", retry_after_s=5.0)
        nodes = cache.waiting.setdefault(site_id, {})
        _answer_with(nodes.get(node_id), look=False)
        woken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        nodes[node_id] = woken
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await woken
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
            if nodes.get(node_id) is woken:
                del nodes[node_id]

    # Compiled snapshots

    async def published(self, cache: TenantCache, site_id: str) -> Published:
        """Of the cache's current view. Raises `NotFound` for a site that is gone, `Unavailable` if it never could be compiled."""
        while site_id in cache.stale or site_id not in cache.published:
            if site_id not in cache.view.sites:
                raise NotFound(f"there is no site {site_id}")
            task = cache.compiling.get(site_id)
            if task is None:
                task = cache.compiling[site_id] = asyncio.create_task(self._compile(cache, site_id))
            await asyncio.shield(task)
        return cache.published[site_id]

    async def _compile(self, cache: TenantCache, site_id: str) -> None:
        view = cache.view
        cache.stale.discard(site_id)
        loop = asyncio.get_running_loop()
        try:
            site = view.sites[site_id]
            shares = await self.shares.all() if site.spec.is_edge else ()
            snapshot = await loop.run_in_executor(self._compiler, _compile, site_id, view, shares)
        except Exception as error:
            log.exception("cannot compile", tenant=str(cache.id), site=site_id, revision=view.revision)
            if site_id not in cache.published:
                raise Unavailable(f"the configuration of site {site_id} cannot be compiled") from error
            return
        finally:
            del cache.compiling[site_id]
        cache.publish(site_id, snapshot, view.revision)

    # Catching up

    async def cache(self, tenant_id: UUID) -> TenantCache:
        """The tenant's cache, loaded if it was not there. Raises `NotFound` and `Unavailable`."""
        cache = self._tenants.get(tenant_id)
        if cache is None:
            task = self._opening.get(tenant_id)
            if task is None:
                task = self._opening[tenant_id] = asyncio.create_task(self._open(tenant_id))
            cache = await asyncio.shield(task)
        cache.used_at = _now()
        return cache

    def tenant_of(self, node_id: UUID) -> UUID | None:
        """Of a node, if its tenant is in memory."""
        return next((tenant_id for tenant_id, cache in self._tenants.items() if node_id in cache.view.fleet.nodes), None)

    async def catch_up(self, cache: TenantCache) -> None:
        """Return when the cache has everything that was committed before this call. Raises `NotFound` and `Unavailable`."""
        await asyncio.shield(self._next_look(cache))

    def hear(self, tenant_id: UUID, revision: int) -> None:
        """A notification: catch up in the background, if the tenant is in memory, or as soon as it is."""
        if tenant_id in self._opening:
            self._heard[tenant_id] = max(revision, self._heard.get(tenant_id, -1))
        cache = self._tenants.get(tenant_id)
        if cache is not None and cache.view.revision < revision:
            self._next_look(cache)
        if self._edges.operator_id in (tenant_id, None) and self._edges.revision < revision and self._next_edges_look is None:
            self._next_edges_look = asyncio.create_task(self._follow_edges())
        self.shares.hear(tenant_id, revision)

    def release(self) -> None:
        """Answer everybody who waits."""
        for cache in self._tenants.values():
            for nodes in cache.waiting.values():
                for woken in nodes.values():
                    _answer_with(woken, look=False)

    async def compare(self) -> None:
        """Catch up with every tenant in memory that is behind, and drop those that nobody uses."""
        now = _now()
        for cache in list(self._tenants.values()):
            if not any(cache.waiting.values()) and now - cache.used_at > IDLE_S:
                del self._tenants[cache.id]
        if self._tenants:
            known = await store.revisions(self._database)
            for tenant_id, revision in known.items():
                self.hear(tenant_id, revision)
                current = self._tenants.get(tenant_id)
                if current is not None and current.view.revision >= revision:
                    current.caught_up_at = max(current.caught_up_at, now)
            self.shares.forget(known)

    async def _open(self, tenant_id: UUID) -> TenantCache:
        try:
            view = await self._read(tenant_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("the database does not answer") from error
        finally:
            del self._opening[tenant_id]
            heard = self._heard.pop(tenant_id, -1)
        cache = self._tenants[tenant_id] = TenantCache(tenant_id, beside(view, self._edges), _now(), _now())
        if view.revision < heard:
            self._next_look(cache)
        return cache

    async def _read(self, tenant_id: UUID) -> View:
        """Everything there is."""
        if self._edges.operator_id is None:
            async with self._edges_lock:
                await self._look_at_edges()
        async with self._database.sessions(tenant_id) as session:
            changes = await store.since(session, tenant_id, -1)
            if changes is None:
                raise NotFound(f"there is no tenant {tenant_id}")
        tenant = Tenant(str(tenant_id), changes.tenant, self._fabric.trust_domain, "")
        return await self._pure(first_view, tenant, changes, self._fabric.own_certificate, self._edges)

    # Regional edges, which are the same for every tenant

    async def on_edges(self, tenant_id: UUID, revision: int) -> OnEdges | None:
        """What edges should have of a tenant, looked at no earlier than that revision. None if there are none."""
        if self._edges.operator_id is None:
            return None
        held = await self.shares.at(tenant_id, revision)
        cache = await self.cache(self._edges.operator_id)
        published = {}
        for site_id, site in cache.view.sites.items():
            if site.spec.is_edge:
                published[site_id] = await self.published(cache, site_id)
        return OnEdges(tenant_id, held.revision if held.good else revision - 1, cache, published)

    async def _latest(self, tenant_id: UUID) -> View:
        cache = await self.cache(tenant_id)
        await self.catch_up(cache)
        return cache.view

    async def _follow_edges(self) -> None:
        async with self._edges_lock:
            self._next_edges_look = None
            with suppress(SQLAlchemyError, OSError):
                await self._look_at_edges()

    async def _look_at_edges(self) -> None:
        """Read them, with the lock held; what they changed is compiled anew in every tenant in memory."""
        async with self._database.definer() as definer:
            listed = await edge_store.list_all(definer)
        if listed is None:
            return
        before, self._edges = self._edges, Edges.of(listed)
        if self._edges.same_as(before):
            return
        for cache in list(self._tenants.values()):
            async with cache.lock:
                sites = beside_concerned(cache.view, self._edges, partial(_having, ItemKind.EDGE, cache.published))
                self._replace(cache, beside(cache.view, self._edges), sites)
        self.shares.edges_changed()

    def _share_changed(self) -> None:
        cache = self._tenants.get(self._edges.operator_id) if self._edges.operator_id else None
        if cache is not None:
            self._replace(cache, cache.view, {site_id for site_id, site in cache.view.sites.items() if site.spec.is_edge})

    def _next_look(self, cache: TenantCache) -> asyncio.Task[None]:
        if cache.next_look is None:
            cache.next_look = asyncio.create_task(self._look(cache))
            cache.next_look.add_done_callback(_retrieve)
        return cache.next_look

    async def _look(self, cache: TenantCache) -> None:
        async with cache.lock:
            cache.next_look = None
            try:
                await self._advance(cache)
            except NotFound:
                raise
            except Exception as error:
                if not cache.failing:
                    log.exception("cannot catch up; what was known stays in force", tenant=str(cache.id))
                cache.failing = True
                raise Unavailable("the latest configuration cannot be read") from error
            cache.failing = False
            cache.caught_up_at = _now()

    async def _advance(self, cache: TenantCache) -> None:
        if _now() - cache.caught_up_at > RELOADED_AFTER_S:
            view = beside(await self._read(cache.id), self._edges)
            self._replace(cache, view, view.sites.keys())
            return
        async with self._database.sessions(cache.id) as session:
            changes = await store.since(session, cache.id, cache.view.revision)
        if changes is None:
            raise NotFound(f"there is no tenant {cache.id}")
        if changes.revision > cache.view.revision:
            self._replace(cache, *await self._pure(_advanced, cache.view, changes, partial(_having, ItemKind.PEER, dict(cache.published))))
            for node in changes.nodes:
                _answer_with(cache.waiting.get(str(node.site_id), {}).get(node.id) if node.revoked_at else None, look=True)

    def _replace(self, cache: TenantCache, view: View, sites: AbstractSet[str]) -> None:
        """`sites` are those that are to be compiled anew."""
        gone = cache.published.keys() - view.sites.keys()
        for site_id in gone:
            del cache.published[site_id]
        cache.outdate(sites)
        cache.view = view
        cache.stale &= view.sites.keys()
        cache.to_wake |= (sites | gone) & cache.waiting.keys()
        if cache.to_wake and (cache.waker is None or cache.waker.done()):
            cache.waker = asyncio.create_task(self._wake(cache))

    async def _wake(self, cache: TenantCache) -> None:
        """Compile for the sites where somebody waits, and have those look again: each knows which manifest it has, and waits on if it is the same.

        Whether the compiled snapshot is new does not matter here: somebody else may have asked for it, and had it compiled, first.
        """
        while cache.to_wake:
            site_id = cache.to_wake.pop()
            with suppress(NotFound, Unavailable):
                await self.published(cache, site_id)
            for woken in cache.waiting.get(site_id, {}).values():
                _answer_with(woken, look=True)

    async def _pure(self, function: Callable[..., V], *arguments: Any) -> V:
        return await asyncio.get_running_loop().run_in_executor(self._compiler, function, *arguments)


def _advanced(view: View, changes: store.Changes, peers_of: Callable[[str], Iterable[str]]) -> tuple[View, frozenset[str]]:
    """What holds after the changes, and which sites it concerns."""
    new = advance(view, changes)
    return new, concerned(view, new, changes, peers_of)


def _compile(site_id: str, view: View, shares: Iterable[Share]) -> Snapshot:
    site = view.sites[site_id]
    if site.spec.is_edge:
        snapshot = compile_edge(site, view.intent.tenant, shares)
    else:
        snapshot = compile_site(site_id, view.intent, view.observations)
    return snapshot.worked_out()


def _answer_with(woken: asyncio.Future[bool] | None, *, look: bool) -> None:
    if woken is not None and not woken.done():
        woken.set_result(look)


def _having(kind: ItemKind, published: Mapping[str, Published], key: str) -> Iterable[str]:
    """Sites in whose snapshot there is an item, such as of a peer."""
    return [site_id for site_id, has in published.items() if (kind, key) in has.snapshot.items]


def _retrieve(task: asyncio.Task[None]) -> None:
    """The failure was logged, and the poll tries again."""
    if not task.cancelled():
        task.exception()


def _now() -> float:
    return asyncio.get_running_loop().time()
