"""The loop that makes Envoy hold what the control plane wants and what this node sees, and knows how far that succeeded.

Level-triggered: every pass starts from all there is to know, so a wake-up more or less does no harm. Nothing here talks to the
control plane: while it is away, endpoints and peers go on changing Envoy's config.
"""

import asyncio
import base64
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol, cast

from agent.backoff import backoff
from agent.envoy.inputs import Addresses, AgentSnapshot, Endpoint, Item, ItemId, LocalState, NodeIdentity, OriginId, PeerView
from agent.envoy.paths import IPSEC, REVERSE
from agent.envoy.render import render
from agent.envoy.resources import Problem, Resource, Resources
from agent.errors import AgentError, ProxyFailed
from agent.intake import Wanted, readable
from agent.isolate import Accepted, Trial, accept, grounds
from agent.log import log
from agent.paths import Watch, relieved, watches
from agent.protocol.items import ItemKind
from agent.protocol.manifest import Entry
from agent.protocol.overlay import overlay_address
from agent.protocol.report import Rejection
from agent.state import Saved, SavedEndpoint
from agent.tasks import woken
from agent.xds import Nack, Outcome

SPACING_S = 0.05
"""Between passes, so that a burst of changes becomes one; the first of a burst is not delayed."""
_WARMING_S = 0.1
_RETRY_S = 30.0
_RETRIED = frozenset({ItemKind.LISTENER, ItemKind.TCP_LOADBALANCER})
"""May be refused for no fault of their own: the port was taken by another program."""
_MOST_REJECTIONS = 1000
_REASON_LENGTH = 1000


class Proxy(Protocol):
    """Envoy, as far as it is needed here."""

    async def apply(self, resources: Resources) -> Outcome: ...
    async def warming(self) -> int: ...


class Origins(Protocol):
    """What is known of origins at this site."""

    def follow(self, snapshot: AgentSnapshot) -> None:
        """Watch what these items need from now on."""

    def endpoints(
        self, snapshot: AgentSnapshot, before: Mapping[OriginId, tuple[Endpoint, ...]]
    ) -> Mapping[OriginId, tuple[Endpoint, ...]]:
        """Of its pools' origins at this site; those from before where nothing is known yet."""

    @property
    def settled(self) -> bool:
        """Whether what the last `follow` asked for anew is known, or cannot be known soon."""


class Pods(Protocol):
    """What is known of pods at this site that call."""

    def follow(self, snapshot: AgentSnapshot) -> None: ...
    def addresses(self, snapshot: AgentSnapshot, before: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...] | None]: ...
    @property
    def settled(self) -> bool: ...


class Peers(Protocol):
    def watch(self, peers: Mapping[str, Watch]) -> None: ...
    @property
    def views(self) -> Mapping[str, PeerView]: ...
    @property
    def settled(self) -> bool:
        """Whether there are ways to all of them, as far as they come soon."""

    @property
    def draining(self) -> frozenset[str]: ...
    @property
    def dials(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Verdict:
    """How far Envoy has what is wanted."""

    applied_hash: str | None = None
    applied_revision: int = 0
    rejected: tuple[Rejection, ...] = ()
    fault: str = ""
    """What Envoy refuses although it comes from no item."""
    since: float = 0.0


class _Known(NamedTuple):
    """A rejection, since when (steady clock), and on what grounds."""

    rejection: Rejection
    at: float
    grounds: tuple[str, ...]


class _Interrupted(AgentError):
    """Envoy went away, or said nothing, in the middle of a pass."""


@dataclass
class Reconciler:
    """`wanted` is read at every pass; `passed` is called after each that Envoy took, `changed` when it replaced `verdict`."""

    node: NodeIdentity
    addresses: Addresses
    run_dir: str
    trusted_ca_file: str
    wanted: Callable[[], Wanted]
    proxy: Proxy
    origins: Origins
    pods: Pods
    peers: Peers
    own: Callable[[], PeerView]
    """How the origins of this very site are."""
    passed: Callable[[], None]
    changed: Callable[[], None]
    start: Saved = field(default_factory=Saved)
    version: str = ""
    """Of the agent: another one may make better config, or come with an Envoy that accepts it."""
    workers: int = 1
    """Of Envoy."""
    refused: Callable[[AgentSnapshot], Mapping[ItemId, str]] = lambda _: {}
    """Items that are in force only outside of Envoy, and are not: why."""
    no_ipsec: Callable[[], str] = lambda: "it is off"
    """Why this node has no IPsec; empty: it has."""
    verdict: Verdict = field(default_factory=Verdict, init=False)
    good: AgentSnapshot = field(default_factory=AgentSnapshot, init=False)
    """What Envoy accepted last."""

    def __post_init__(self) -> None:
        self.good = AgentSnapshot.of(readable(self.start.good, self.start.bodies))
        self._rejected = self._still_rejected(self.wanted().snapshot)
        self._remembered = _remembered(self.start.endpoints)
        self._endpoints: Mapping[OriginId, tuple[Endpoint, ...]] = {}
        self._pods: Mapping[str, tuple[str, ...] | None] = dict(self.start.pods)
        self._problems: tuple[Problem, ...] = ()
        self._memoised = False
        self._wake = asyncio.Event()
        self._wake.set()

    def nudge(self) -> None:
        """Something changed: make a pass soon."""
        self._wake.set()

    async def run(self) -> NoReturn:
        delays = backoff(0.5, 10.0)
        while True:
            self._wake.clear()
            try:
                pause = await self.converge()
            except (_Interrupted, ProxyFailed):
                pause = next(delays)
            else:
                delays = backoff(0.5, 10.0)
            await asyncio.sleep(SPACING_S)
            await woken(self._wake, pause)

    async def converge(self) -> float | None:
        """One pass; says after how many seconds there is a reason for the next one, if nothing else happens."""
        wanted = self.wanted()
        if not wanted.manifest.entries:
            return None  # nothing is known yet; an Envoy that runs keeps what it has
        target = self._target(wanted)
        self.origins.follow(target)
        self.pods.follow(target)
        self.peers.watch(watches(target, self.no_ipsec()))
        known = self.origins.settled and self.pods.settled and self.peers.settled
        accepted = await accept(self.good, target, self._attempt)
        self._take(accepted, wanted)
        if not known or await self.proxy.warming():
            return _WARMING_S
        self._conclude(wanted, accepted)
        return self._next_retry()

    def _target(self, wanted: Wanted) -> AgentSnapshot:
        """What is wanted; in the place of what was rejected before or cannot be read, the last good version, if there is one."""
        refused = {id for id, item in wanted.snapshot.items.items() if self._is_rejected(item, wanted.snapshot)}
        broken = {_id(it) for it in wanted.broken}
        stand_ins = [self.good.items[id] for id in sorted(refused | broken) if id in self.good.items]
        return wanted.snapshot.without(refused).with_items(stand_ins) if refused or broken else wanted.snapshot

    def _still_rejected(self, wanted: AgentSnapshot) -> dict[tuple[ItemId, str], _Known]:
        """Of what was saved."""
        found = [(it, wanted.items.get(_id(it))) for it in self.start.rejected if self.start.version == self.version]
        now = time.monotonic()
        return {(item.id, item.hash): _Known(it, now, grounds(item, wanted)) for it, item in found if item and item.hash == it.hash}

    def _is_rejected(self, item: Item, wanted: AgentSnapshot) -> bool:
        known = self._known(item, wanted)
        return known is not None and (item.id.kind not in _RETRIED or time.monotonic() - known.at < _RETRY_S)

    def _known(self, item: Item, wanted: AgentSnapshot) -> _Known | None:
        """The item's rejection, while it stands."""
        known = self._rejected.get((item.id, item.hash))
        return known if known is not None and known.grounds == grounds(item, wanted) else None

    async def _attempt(self, snapshot: AgentSnapshot) -> Trial:
        try:
            resources = await self._rendered(snapshot)
        except Exception as error:  # noqa: BLE001 - whatever one item does to it, the others go on
            return _unrendered(snapshot, error)
        trial, faults = Trial(), dict[str, None]()
        while True:
            outcome = await self.proxy.apply(resources)
            if not outcome.complete:
                raise _Interrupted
            blamed = [resource for nack in outcome.nacks for resource in _blamed(resources, nack)]
            trial = Trial(_reasons(outcome), frozenset(id for resource in blamed for id in _items_of(resource)))
            if not blamed or trial.suspects:
                break
            # What no item made must not hold back the items: the rest is applied without it.
            faults[trial.reason] = None
            resources = _without(resources, blamed)
        self._problems = resources.problems
        return trial if trial.reason else Trial("; ".join(faults))

    async def _rendered(self, snapshot: AgentSnapshot) -> Resources:
        """The first time, while nothing is memoised, in a thread: that can take seconds. Later ones cost less than handing them over."""
        local = self._local(snapshot)
        if self._memoised:
            return render(snapshot, local)
        resources = await asyncio.to_thread(render, snapshot, local)
        self._memoised = True
        return resources

    def _local(self, snapshot: AgentSnapshot) -> LocalState:
        endpoints = self._endpoints = self.origins.endpoints(snapshot, self._remembered)
        self._remembered |= endpoints
        self._pods = self.pods.addresses(snapshot, _known(self._pods))
        return LocalState(
            node=self.node,
            addresses=self.addresses,
            run_dir=self.run_dir,
            trusted_ca_file=self.trusted_ca_file,
            endpoints=endpoints,
            peers=relieved({**self.peers.views, self.node.site_id: self.own()}, self.peers.draining),
            dials=self.peers.dials,
            pods=self._pods,
            workers=self.workers,
            overlay="" if self.no_ipsec() else overlay_address(self.node.node_id),
            secrets=self.wanted().secrets,
        )

    def _take(self, accepted: Accepted, wanted: Wanted) -> None:
        """Remember what Envoy holds and what it refused."""
        now = time.monotonic()
        for item, reason in accepted.reasons.items():
            log.warning("rejected", kind=item.id.kind, key=item.id.key, reason=reason)
            self._rejected[item.id, item.hash] = _Known(_rejection(item.id, item.hash, reason), now, grounds(item, wanted.snapshot))
        if self._rejected:
            hashes = {(_id(entry), entry.hash) for entry in wanted.manifest.entries}
            self._rejected = {key: known for key, known in self._rejected.items() if key in hashes and not _holds(accepted.snapshot, *key)}
        self.good = accepted.snapshot

    def _conclude(self, wanted: Wanted, accepted: Accepted) -> None:
        """Nothing is warming, and what new origins there are is known: what Envoy accepted is in use."""
        verdict = Verdict(
            applied_hash=None if accepted.fault else wanted.manifest.hash,
            applied_revision=wanted.revision,
            rejected=self._rejections(wanted),
            fault=accepted.fault,
            since=self.verdict.since,
        )
        pools = {id.key for id in wanted.snapshot.items if id.kind is ItemKind.ORIGIN_POOL}
        self._remembered = {id: found for id, found in self._remembered.items() if id.pool in pools}
        self.passed()
        if verdict == self.verdict:
            return
        if (verdict.applied_hash, verdict.rejected) != (self.verdict.applied_hash, self.verdict.rejected):
            log.info("applied", manifest=verdict.applied_hash, revision=verdict.applied_revision, rejected=len(verdict.rejected))
        if verdict.fault and verdict.fault != self.verdict.fault:
            log.error("envoy refuses the node's own config", reason=verdict.fault)
        self.verdict = Verdict(verdict.applied_hash, verdict.applied_revision, verdict.rejected, verdict.fault, time.time())
        self.changed()

    def _rejections(self, wanted: Wanted) -> tuple[Rejection, ...]:
        """Of items that are wanted, with their wanted hashes."""
        problems = [
            _rejection(it.item, item.hash, it.reason) for it in self._problems if (item := wanted.snapshot.items.get(it.item)) is not None
        ]
        elsewhere = [
            _rejection(id, wanted.snapshot.items[id].hash, why)
            for id, why in self.refused(wanted.snapshot).items()
            if id in wanted.snapshot.items
        ]
        every = [*(known.rejection for known in self._rejected.values()), *wanted.broken, *problems, *elsewhere]
        distinct = {(it.kind, it.key, it.hash): it for it in every}
        return tuple(it for _, it in sorted(distinct.items()))[:_MOST_REJECTIONS]

    def _next_retry(self) -> float | None:
        if self.verdict.fault:
            return _RETRY_S
        retried = [known.at for (id, _), known in self._rejected.items() if id.kind in _RETRIED]
        return max(0.0, min(retried) + _RETRY_S - time.monotonic()) if retried else None

    def endpoints_of(self, pool: str) -> frozenset[Endpoint]:
        """Of this site, as Envoy was told last."""
        return frozenset(endpoint for origin, found in self._endpoints.items() if origin.pool == pool for endpoint in found)

    def to_save(self) -> Saved:
        """What a restart without the control plane needs."""
        wanted = self.wanted()
        replaced = {it.hash: it.body.canonical().decode() for it in self.good.items.values() if it.hash not in wanted.bodies}
        return Saved(
            version=self.version,
            revision=wanted.revision,
            wanted=wanted.manifest.entries,
            good=tuple(Entry.model_construct(kind=it.id.kind, key=it.id.key, hash=it.hash) for it in self.good.items.values()),
            bodies={**replaced, **wanted.bodies},
            rejected=tuple([known.rejection for it in wanted.snapshot.items.values() if (known := self._known(it, wanted.snapshot))]),
            secrets={ref: base64.b64encode(body).decode() for ref, body in wanted.secrets.items()},
            endpoints=tuple(
                SavedEndpoint(pool=origin.pool, origin=origin.origin, address=it.address, port=it.port, zone=it.zone)
                for origin, found in self._endpoints.items()
                for it in found
            ),
            pods=_known(self._pods),
            dials=tuple(sorted(self.peers.dials)),
            paths={
                site: dict(view.paths)
                for site, view in self.peers.views.items()
                if set(view.paths.values()) - {True} or {IPSEC, REVERSE} & view.paths.keys()  # untried, were they not named
            },
        )


def _unrendered(snapshot: AgentSnapshot, error: Exception) -> Trial:
    """Any item may be behind it. Without one it is raised again: Envoy keeps what it has, and nothing is said of it."""
    suspects = frozenset(id for id in snapshot.items if id.kind is not ItemKind.SITE)
    if not suspects:
        raise error
    return Trial(f"this agent cannot make Envoy's config of it: {type(error).__name__}: {error}", suspects)


def _reasons(outcome: Outcome) -> str:
    return "; ".join(nack.message or "refused without a reason" for nack in outcome.nacks)


def _blamed(resources: Resources, nack: Nack) -> list[Resource]:
    """What may be at fault in a refused response: what Envoy's message names, or all of it."""
    sent = [resource for name in nack.names if (resource := resources.by_type[nack.type_url].get(name)) is not None]
    return [resource for resource in sent if resource.name in nack.message] or sent


def _items_of(resource: Resource) -> frozenset[ItemId]:
    """Without the site's own: nothing works without that, and what is made of it alone is of the node."""
    return frozenset(id for id in resource.sources if id.kind is not ItemKind.SITE)


def _without(resources: Resources, blamed: Iterable[Resource]) -> Resources:
    gone = {(resource.type_url, resource.name) for resource in blamed}
    by_type = {
        type_url: {name: resource for name, resource in named.items() if (type_url, name) not in gone}
        for type_url, named in resources.by_type.items()
    }
    return Resources(by_type, resources.problems)


def _id(of: Entry | Rejection) -> ItemId:
    """Of a kind that this version does not know, it is in no snapshot."""
    return ItemId(cast("ItemKind", of.kind), of.key)


def _holds(snapshot: AgentSnapshot, id: ItemId, hash: str) -> bool:
    return id in snapshot.items and snapshot.items[id].hash == hash


def _rejection(id: ItemId, hash: str, reason: str) -> Rejection:
    return Rejection(kind=id.kind, key=id.key, hash=hash, reason=reason[:_REASON_LENGTH])


def _known(pods: Mapping[str, tuple[str, ...] | None]) -> dict[str, tuple[str, ...]]:
    return {id: addresses for id, addresses in pods.items() if addresses is not None}


def _remembered(saved: Iterable[SavedEndpoint]) -> dict[OriginId, tuple[Endpoint, ...]]:
    endpoints: dict[OriginId, tuple[Endpoint, ...]] = {}
    for it in saved:
        origin = OriginId(it.pool, it.origin)
        endpoints[origin] = (*endpoints.get(origin, ()), Endpoint(it.address, it.port, it.zone))
    return endpoints
