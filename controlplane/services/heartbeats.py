"""Signs of life: taken in memory, written in batches, judged by leases."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from agent.protocol.report import Heartbeat, HeartbeatAnswer
from controlplane.services.agents import Agent
from controlplane.services.batches import Batches
from controlplane.store import nodes as store
from controlplane.store.changes import announce_status
from controlplane.store.nodes import NodeStatus
from controlplane.store.observations import known_boots
from controlplane.store.session import Database

log = structlog.get_logger()

SHORTEST_PACE_S = 3.0
LONGEST_PACE_S = 30.0
NODES_PER_S = 150.0
"""So many heartbeats per second are what a tenant's fleet may cost: a third of a core."""
LEASE_PACES = 3
CLOCK_ALARM_S = 30.0
ASKED_AGAIN_AFTER = timedelta(seconds=20)
"""Whoever was asked for a report needs some time for it."""
FORGOTTEN_AFTER = timedelta(hours=1)
"""A node that was silent for so long is gone, or is known again by its next sign of life."""
TWIN = "two agents run with this node's identity; each needs a state directory of its own, and a registration under another name"


def pace_s(fleet: int) -> float:
    """Between two heartbeats of one node, in a tenant with so many."""
    return min(max(SHORTEST_PACE_S, fleet / NODES_PER_S), LONGEST_PACE_S)


def lease(fleet: int) -> timedelta:
    """A node that was silent for longer is not known to live."""
    return timedelta(seconds=LEASE_PACES * pace_s(fleet))


def is_fresh(status: NodeStatus | None, fleet: int, now: datetime) -> bool:
    """Whether the node was heard of within its lease."""
    return status is not None and now - status.last_heartbeat_at <= lease(fleet)


def alarms(status: NodeStatus, fleet: int, now: datetime) -> Iterator[tuple[str, str]]:
    """What a person should look into: the type of a condition, and words."""
    if status.twin_at is not None and now - status.twin_at <= lease(fleet):
        yield "DuplicateNode", TWIN
    if abs(status.clock_skew_s) > CLOCK_ALARM_S:
        direction = "ahead of" if status.clock_skew_s > 0 else "behind"
        yield "ClockSkew", f"its clock is {abs(status.clock_skew_s):.0f} s {direction} the control plane's"


@dataclass(frozen=True)
class Taken:
    status: NodeStatus
    tells: bool
    """Whether it says something that somebody may be waiting for."""


@dataclass(frozen=True)
class Clock:
    """Of one boot of a node, against this one."""

    boot_id: str
    ahead_s: float
    """As much as any heartbeat showed: by the one that took the least time."""
    late_s: float | None = None
    """What the last one showed, if that one was late."""

    def after(self, ahead_s: float, longest_s: float) -> "Clock":
        """A clock that was set back shows the same again; what was under way for longer than `longest_s` does not."""
        if ahead_s >= self.ahead_s or (self.late_s is not None and abs(self.late_s - ahead_s) < 1):
            return Clock(self.boot_id, ahead_s)
        return replace(self, late_s=ahead_s if self.ahead_s - ahead_s > longest_s else None)


class Heartbeats:
    """Of one replica."""

    def __init__(self, database: Database, now: datetime) -> None:
        self._database = database
        self._last: dict[UUID, NodeStatus] = {}
        self._pending: dict[UUID, dict[UUID, Taken]] = {}
        """By tenant and node."""
        self._reported: dict[UUID, str] = {}
        """Nodes of whose boot there is a report."""
        self._boots = Batches(self._known_boots)
        self._clocks: dict[UUID, Clock] = {}
        self._asked: dict[UUID, tuple[str, datetime]] = {}
        """Nodes of whose boot there was none, and when they were asked for it."""
        self._replaced: dict[UUID, str] = {}
        """The boot before the current one, by node."""
        self._twins: dict[UUID, datetime] = {}
        """When two boots of a node were last heard of by turns."""
        self.urgent = asyncio.Event()
        """Set when something is to be written at once."""
        self.healthy_since: datetime | None = now
        """Since when heartbeats could have been heard and written; None while they cannot."""
        self._forgot_at = now

    async def take(self, agent: Agent, heartbeat: Heartbeat, now: datetime) -> HeartbeatAnswer:
        """What is not newer than the last of its boot changes nothing, nor does what was under way for longer than a lease."""
        status = _status(agent.node.id, heartbeat, now)
        fleet = agent.cache.view.fleet.size
        if self._is_late(status, fleet):
            return HeartbeatAnswer(pace_s=pace_s(fleet), now=now.timestamp())
        last = self._last.get(agent.node.id)
        if last is not None and last.boot_id != status.boot_id:
            self._note_boot(last, status)
        if self._has_twin(agent.node.id, fleet, now):
            status = replace(status, twin_at=self._twins[agent.node.id])
        if last is None or last.boot_id != status.boot_id or last.sequence < status.sequence:
            tells = last is None or _said(last) != _said(status)
            self._last[agent.node.id] = status
            self._pending.setdefault(agent.tenant_id, {})[agent.node.id] = Taken(status, tells or self._unwritten(agent))
            if tells:
                self.urgent.set()
        resend = not await self._boot_is_known(agent, heartbeat.boot_id, now)
        renew = bool(heartbeat.issuer) and heartbeat.issuer not in agent.cache.view.issuers
        return HeartbeatAnswer(pace_s=pace_s(agent.cache.view.fleet.size), now=now.timestamp(), resend=resend, renew=renew)

    def reported(self, node_id: UUID, boot_id: str) -> None:
        """A report of that boot was written."""
        self._reported[node_id] = boot_id

    def is_silent(self, heard_at: datetime | None, fleet: int, now: datetime) -> bool:
        """Whether a node that was last heard of then is known not to live: judged only after a whole lease in which it could have been heard."""
        return self.could_hear(fleet, now) and heard_at is not None and now - heard_at > lease(fleet)

    def could_hear(self, fleet: int, now: datetime) -> bool:
        """Whether all was well for a whole lease, so that silence means something."""
        return self.healthy_since is not None and now - self.healthy_since > lease(fleet)

    def deaf(self) -> None:
        """Nothing can be heard or written, or could be until just now."""
        self.healthy_since = None

    def hears(self, now: datetime) -> None:
        self.healthy_since = self.healthy_since or now

    async def flush(self, now: datetime) -> None:
        """Write what was taken since the last time; what cannot be written now stays for the next."""
        self.urgent.clear()
        pending, self._pending = self._pending, {}
        for tenant_id, taken in pending.items():
            try:
                await self._write(tenant_id, taken)
                self.hears(now)
            except IntegrityError:
                log.info("heartbeats of nodes that are gone", tenant=str(tenant_id), nodes=len(taken))
            except (SQLAlchemyError, OSError) as error:
                if self.healthy_since:
                    log.warning("cannot write heartbeats", error=str(error))
                self.deaf()
                self._pending[tenant_id] = {**taken, **self._pending.get(tenant_id, {})}

    def forget(self, now: datetime) -> None:
        """Nodes that were silent for long; looks at most once in that time."""
        if now - self._forgot_at < FORGOTTEN_AFTER:
            return
        self._forgot_at = now
        kept = {node_id for node_id, status in self._last.items() if now - status.last_heartbeat_at < FORGOTTEN_AFTER}
        known: tuple[dict[UUID, Any], ...] = (self._last, self._reported, self._clocks, self._asked, self._replaced, self._twins)
        for by_node in known:
            for node_id in by_node.keys() - kept:
                del by_node[node_id]

    async def _write(self, tenant_id: UUID, taken: dict[UUID, Taken]) -> None:
        async with self._database.sessions(tenant_id) as session:
            statuses = [taken[node_id].status for node_id in sorted(taken)]
            await store.write_statuses(session, tenant_id, statuses)
            await store.note_twins(session, tenant_id, statuses)
            if any(heartbeat.tells for heartbeat in taken.values()):
                await announce_status(session, tenant_id)

    def _note_boot(self, last: NodeStatus, status: NodeStatus) -> None:
        """A boot that speaks again after another one had replaced it is no restart: somebody has copied a state directory."""
        if self._replaced.get(status.node_id) == status.boot_id:
            self._twins[status.node_id] = status.last_heartbeat_at
        self._replaced[status.node_id] = last.boot_id

    async def _known_boots(self, tenant_id: UUID, asked: Mapping[tuple[UUID, str], None]) -> Mapping[tuple[UUID, str], bool]:
        async with self._database.sessions(tenant_id) as session:
            known = await known_boots(session, tenant_id, asked)
        return {boot: boot in known for boot in asked}

    def _is_late(self, status: NodeStatus, fleet: int) -> bool:
        known = self._clocks.get(status.node_id)
        if known is None or known.boot_id != status.boot_id:
            known = Clock(status.boot_id, status.clock_skew_s)
        clock = self._clocks[status.node_id] = known.after(status.clock_skew_s, lease(fleet).total_seconds())
        return clock.late_s is not None

    def _has_twin(self, node_id: UUID, fleet: int, now: datetime) -> bool:
        seen = self._twins.get(node_id)
        return seen is not None and now - seen <= lease(fleet)

    def _unwritten(self, agent: Agent) -> bool:
        """Whether something that was said before is still to be written."""
        earlier = self._pending.get(agent.tenant_id, {}).get(agent.node.id)
        return earlier is not None and earlier.tells

    async def _boot_is_known(self, agent: Agent, boot_id: str, now: datetime) -> bool:
        """Or a report was asked for a moment ago."""
        if self._reported.get(agent.node.id) != boot_id:
            asked = self._asked.get(agent.node.id)
            if asked and asked[0] == boot_id and now - asked[1] < ASKED_AGAIN_AFTER:
                return True
            if not await self._boots.ask(agent.tenant_id, (agent.node.id, boot_id), None):
                self._asked[agent.node.id] = (boot_id, now)
                return False
            self._reported[agent.node.id] = boot_id
        return True


def _status(node_id: UUID, heartbeat: Heartbeat, now: datetime) -> NodeStatus:
    return NodeStatus(
        node_id=node_id,
        boot_id=heartbeat.boot_id,
        sequence=heartbeat.sequence,
        last_heartbeat_at=now,
        applied_hash=heartbeat.applied_hash,
        applied_revision=heartbeat.applied_revision,
        rejected=[rejection.model_dump(mode="json") for rejection in heartbeat.rejected],
        proxy=heartbeat.proxy,
        warnings=list(heartbeat.warnings),
        clock_skew_s=heartbeat.sent_at - now.timestamp(),
        version=heartbeat.version,
        issuer=heartbeat.issuer,
    )


def _said(status: NodeStatus) -> tuple[object, ...]:
    """Without what every heartbeat changes."""
    return (
        status.boot_id,
        status.applied_hash,
        status.rejected,
        status.proxy,
        status.warnings,
        status.version,
        status.issuer,
        status.twin_at is None,
    )
