"""Looks at Envoy about every second: whether it serves, how many endpoints are healthy, what it counted."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn, Protocol

from agent import tunnels
from agent.envoy import names, stats
from agent.envoy.inputs import PeerView
from agent.envoy.stats import Reading
from agent.errors import ProxyFailed
from agent.peers import bucketed
from agent.protocol.report import EdgeMetrics, OriginHealth
from agent.proxy import ProxyState
from agent.tasks import woken
from agent.tunnels import Encryption, Tunnels

EVERY_S = 1.0
COUNT_EVERY_S = 5.0
"""Counters are many, and nobody waits for them."""
_SOON_S = 0.1
_MEMBERSHIP = re.compile(
    rf"^cluster\.{re.escape(names.pool(''))}(?P<pool>.+)\.membership_(?P<what>healthy|total): (?P<count>\d+)$", re.MULTILINE
)
_MEMBERSHIP_FILTER = r"^cluster\.pool\|.*\.membership_(healthy|total)$"


class Admin(Protocol):
    async def get(self, path: str) -> str: ...


class Proxy(Protocol):
    """The part of `proxy.Proxy` that is needed here."""

    @property
    def admin(self) -> Admin: ...
    @property
    def adopted(self) -> bool: ...
    async def state(self) -> ProxyState: ...


class Scrape:
    """`changed` is called when `own` was replaced, `counted` with what was counted since the last time."""

    def __init__(self, proxy: Proxy, changed: Callable[[], None], counted: Callable[[Sequence[EdgeMetrics]], None]) -> None:
        self._proxy = proxy
        self._changed = changed
        self._counted = counted
        self._reading: Reading | None = None
        self._count_at = 0.0
        self._due = asyncio.Event()
        self.state: ProxyState = "starting"
        self.health: Mapping[str, OriginHealth] = {}
        """By pool: endpoints of this site."""
        self.own = PeerView(reachable=True)
        """The same as peers would see it."""
        self.origins: tuple[OriginHealth, ...] | None = None
        """None as long as Envoy has not said anything."""
        self.tunnels: Mapping[str, Tunnels] = {}
        """That this node keeps, by regional edge."""
        self.encryption = Encryption()

    def look(self) -> None:
        """Something was changed: do not wait for the next second."""
        self._due.set()

    async def run(self) -> NoReturn:
        while True:
            self._due.clear()
            await self.step()
            await asyncio.sleep(_SOON_S)
            await woken(self._due, EVERY_S - _SOON_S)

    async def step(self) -> None:
        self.state = await self._proxy.state()
        if self.state != "live":
            return
        with suppress(ProxyFailed):
            text = await self._proxy.admin.get(f"/stats?filter={_MEMBERSHIP_FILTER}")
            self.health = _memberships(text)
            self.origins = tuple(health for _, health in sorted(self.health.items()))
            self._see_itself()
            self._see_tunnels(await self._proxy.admin.get(f"/stats?filter={tunnels.FILTER}"))
            await self._count()

    async def _count(self) -> None:
        """Of an Envoy that an earlier agent started, only what comes after the first reading: that agent reported what was before."""
        now = asyncio.get_running_loop().time()
        if now < self._count_at:
            return
        self._count_at = now + COUNT_EVERY_S
        reading = await asyncio.to_thread(stats.parse, await self._proxy.admin.get(stats.PATH))
        before = self._reading if self._reading is not None or self._proxy.adopted else Reading(0, {})
        self._reading = reading
        self._counted(stats.difference(before, reading))

    def _see_tunnels(self, text: str) -> None:
        self.tunnels = tunnels.dialled(text, self.tunnels, time.time())
        self.encryption = tunnels.encryption(text)

    def _see_itself(self) -> None:
        before = self.own.exports
        exports = {pool: bucketed(health.healthy, before.get(pool, 0)) for pool, health in self.health.items() if health.total}
        if exports != before:
            self.own = PeerView(reachable=True, exports=exports)
            self._changed()


def _memberships(text: str) -> dict[str, OriginHealth]:
    counts: dict[str, dict[str, int]] = {}
    for match in _MEMBERSHIP.finditer(text):
        counts.setdefault(match["pool"], {})[match["what"]] = int(match["count"])
    return {pool: OriginHealth(pool=pool, healthy=found.get("healthy", 0), total=found.get("total", 0)) for pool, found in counts.items()}
