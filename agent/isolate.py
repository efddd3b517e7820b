"""Which items can be in force together: one bad item never holds back the others.

Envoy's NACK refuses a response as a whole, so the item at fault is found by trying. If the NACK points at one item, that one goes.
Otherwise items are tried in parts, and what is referred to comes before what refers (`_ORDER`): `render` leaves out what has nothing to
refer to, so every item is really tried when it is added.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from agent.envoy.balancers import needs_of
from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.protocol.items import Export, HttpLoadBalancer, ItemKind, TcpLoadBalancer

_ORDER = (
    ItemKind.SITE,
    ItemKind.DISCOVERY,
    ItemKind.EDGE,
    ItemKind.RELAY,
    ItemKind.PEER,
    ItemKind.POLICY,
    ItemKind.ORIGIN_POOL,
    ItemKind.EXPORT,
    ItemKind.LISTENER,
    ItemKind.TCP_LOADBALANCER,
    ItemKind.HTTP_LOADBALANCER,
    ItemKind.PUBLISH,
    ItemKind.SERVICE_EXPORT,
)
_ROUNDS = 5
"""More are needed only by an Envoy that refuses now what it accepted a moment ago."""


@dataclass(frozen=True)
class Trial:
    """How Envoy took a snapshot. `reason` is empty if it accepted it; otherwise `suspects` are the items behind what it refused,
    none of them if that comes from no item.
    """

    reason: str = ""
    suspects: frozenset[ItemId] = frozenset()


Attempt = Callable[[AgentSnapshot], Awaitable[Trial]]


@dataclass(frozen=True)
class Accepted:
    """What Envoy holds now, why it does not hold the rest, and what is wrong with the part that comes from no item."""

    snapshot: AgentSnapshot
    reasons: Mapping[Item, str] = field(default_factory=dict)
    fault: str = ""


async def accept(good: AgentSnapshot, target: AgentSnapshot, attempt: Attempt) -> Accepted:
    """Bring into force as much of `target` as Envoy accepts; of what it refuses, the version in `good` stays.

    `attempt` applies a snapshot; what it raises ends the search. The last one attempted is the one returned.
    """
    search = _Search(attempt)
    if not (await search.attempt(target)).reason:
        return Accepted(target, fault=search.fault)
    changed = [item for id, item in target.items.items() if good.items.get(id) != item]
    kept = {id: good.items[id] for id in target.items if id in good.items}
    base = await search.largest(AgentSnapshot(kept), _ordered(changed))
    for _ in range(_ROUNDS):
        if search.in_force is base:
            break
        trial = await search.attempt(base)
        if trial.reason:
            # They were accepted earlier; what else they are made of (a secret, an address) has changed.
            spoiled = [item for id, item in base.items.items() if id in trial.suspects]
            base = await search.largest(base.without(trial.suspects), _ordered(spoiled))
    return Accepted(base, search.reasons, search.fault)


def grounds(item: Item, snapshot: AgentSnapshot) -> tuple[str, ...]:
    """Hashes of what the item refers to: once they differ, what was refused may be accepted. Empty ones stand for what is not there."""
    return tuple([snapshot.items[id].hash if id in snapshot.items else "" for id in _referred(item)])


def _referred(item: Item) -> tuple[ItemId, ...]:
    match item.body:
        case HttpLoadBalancer() | TcpLoadBalancer():
            pools, policies = needs_of(item)[:2]
        case Export(pool=pool, uses=uses):
            pools, policies = (pool,), tuple([policy for use in uses for policy in use.policies or ()])
        case _:
            pools, policies = (), ()
    return (*[ItemId(ItemKind.ORIGIN_POOL, key) for key in pools], *[ItemId(ItemKind.POLICY, key) for key in policies])


class _Search:
    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.reasons: dict[Item, str] = {}
        self.fault = ""
        self.in_force: AgentSnapshot | None = None

    async def attempt(self, snapshot: AgentSnapshot) -> Trial:
        trial = await self._attempt(snapshot)
        if trial.suspects:
            self.in_force = None
            return trial
        self.in_force, self.fault = snapshot, trial.reason
        return Trial()

    async def largest(self, base: AgentSnapshot, items: Sequence[Item]) -> AgentSnapshot:
        """`base` with all of `items` that Envoy accepts; without an item of `base` that it refuses now."""
        whole = base.with_items(items)
        trial = await self.attempt(whole)
        if not trial.reason:
            return whole
        if len(trial.suspects & whole.items.keys()) == 1:
            return await self._without(base, items, trial)
        if len(items) <= 1:
            self.reasons.update(dict.fromkeys(items, trial.reason))
            return base
        for part in _split(items, trial.suspects):
            base = await self.largest(base, part)
        return base

    async def _without(self, base: AgentSnapshot, items: Sequence[Item], trial: Trial) -> AgentSnapshot:
        """The one under suspicion goes: in a new version the old one stays, and what was in force before is taken out."""
        (culprit,) = trial.suspects & base.with_items(items).items.keys()
        rest = [item for item in items if item.id != culprit]
        self.reasons[base.with_items(items).items[culprit]] = trial.reason
        return await self.largest(base if len(rest) < len(items) else base.without({culprit}), rest)


def _split(items: Sequence[Item], suspects: Collection[ItemId]) -> tuple[Sequence[Item], Sequence[Item]]:
    """Those under suspicion from the others, or, if that tells nothing, in halves."""
    innocent = [item for item in items if item.id not in suspects]
    if innocent and len(innocent) < len(items):
        return innocent, [item for item in items if item.id in suspects]
    middle = len(items) // 2
    return items[:middle], items[middle:]


def _ordered(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (_ORDER.index(item.id.kind), item.id.key))
