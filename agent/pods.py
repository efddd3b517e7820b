"""Which pods of this site's clusters policies mean, by address.

They are read only while a policy of the site looks at them. What counts are clusters whose pods call from their own addresses: the node's own one, and
those that it reaches likewise.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from agent.discovery.following import Following
from agent.discovery.kubeconfig import ClusterAccess, from_item
from agent.discovery.pods import Identity, Pod, read_pod
from agent.discovery.reflector import ReadForbidden
from agent.envoy.callers import selected
from agent.envoy.inputs import AgentSnapshot, Item, ItemId, body
from agent.protocol.items import Discovery, ItemKind, PodSelector, Policy
from agent.tasks import end, lasting

_PATIENCE_S = 5.0
"""How long an API may take with its first answer before others stop waiting for it."""
_OWN = ""


@dataclass
class _Followed:
    pods: Following[Identity]
    task: asyncio.Task[None]
    hash: str
    since: float

    @property
    def forbidden(self) -> bool:
        """Whether pods may not be read; then what was read before does not count."""
        return isinstance(self.pods.failure, ReadForbidden)

    @property
    def unknown(self) -> bool:
        return self.forbidden or self.pods.objects is None


@dataclass
class SitePods:
    """`changed` is called when addresses may be others. To be closed."""

    own: Callable[[], ClusterAccess] | None
    """How to reach the cluster that this node belongs to, if there is one."""
    secrets: Callable[[], Mapping[str, bytes]]
    changed: Callable[[], None]
    _followed: dict[str, _Followed] = field(default_factory=dict, init=False)
    _last: tuple[object, Mapping[str, tuple[str, ...]]] | None = field(default=None, init=False)

    def follow(self, snapshot: AgentSnapshot) -> None:
        """Watch what its policies need from now on."""
        wanted = self._clusters(snapshot) if selectors(snapshot) else {}
        for key, followed in list(self._followed.items()):
            if key not in wanted or wanted[key][0] != followed.hash:
                self._followed.pop(key).task.cancel()
        for key, (hash, load) in wanted.items():
            if key not in self._followed:
                pods = Following(load, Pod, read_pod, self.changed)
                self._followed[key] = _Followed(pods, lasting(pods.run, f"pods {key}", pods.failed), hash, time.monotonic())

    def _clusters(self, snapshot: AgentSnapshot) -> dict[str, tuple[str, Callable[[], ClusterAccess]]]:
        """By key, with the hash of what they are made of."""
        found = {} if self.own is None else {_OWN: ("", self.own)}
        for item in snapshot.by_kind[ItemKind.DISCOVERY]:
            if body(item, Discovery).delivery == "reachable":
                found[item.id.key] = item.hash, partial(self._access, item)
        return found

    def _access(self, item: Item) -> ClusterAccess:
        return from_item(body(item, Discovery), self.secrets())

    def addresses(self, snapshot: AgentSnapshot, before: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...] | None]:
        """By id of each selector of its policies, sorted; None: unknown. What was not read yet is as it was before."""
        wanted = selectors(snapshot)
        followed = [*self._followed.values()]
        if any(each.forbidden for each in followed):
            return dict.fromkeys(wanted, None)
        if any(each.unknown for each in followed):
            return {id: before.get(id) for id in wanted}
        state = (tuple(wanted), [(each.pods, each.pods.version) for each in followed])
        if self._last is None or self._last[0] != state:
            self._last = state, _matching(wanted, [identity for each in followed for identity in (each.pods.objects or {}).values()])
        return self._last[1]

    def refused(self, snapshot: AgentSnapshot) -> Mapping[ItemId, str]:
        """Its policies that cannot tell pods apart here, and why."""
        reasons = sorted({str(each.pods.failure) for each in self._followed.values() if each.unknown and each.pods.failure})
        if not reasons:
            return {}
        said = f"requests that its rules about pods may concern are denied, for pods cannot be read: {'; '.join(reasons)}"
        return {item.id: said for item in snapshot.by_kind[ItemKind.POLICY] if selected((item,))}

    @property
    def settled(self) -> bool:
        """Whether what the last `follow` asked for is known, or cannot be known soon."""
        patient = time.monotonic() - _PATIENCE_S
        return all(not each.unknown or each.pods.failure or each.since < patient for each in self._followed.values())

    async def close(self) -> None:
        await end(followed.task for followed in self._followed.values())


def selectors(snapshot: AgentSnapshot) -> Mapping[str, PodSelector]:
    """Of its policies, by id."""
    rules = (rule for item in snapshot.by_kind[ItemKind.POLICY] for rule in body(item, Policy).rules)
    found = {rule.pods.id: rule.pods for rule in rules if rule.pods}
    return dict(sorted(found.items()))


def _matching(wanted: Mapping[str, PodSelector], pods: Iterable[Identity]) -> Mapping[str, tuple[str, ...]]:
    newest: dict[str, Identity] = {}
    for pod in pods:
        for address in pod.addresses:
            if address not in newest or newest[address].since < pod.since:
                newest[address] = pod
    kinds = {pod.labels for pod in newest.values()}
    found = {}
    for id, selector in wanted.items():
        holding = {labels for labels in kinds if selector.holds(dict(labels))}
        found[id] = tuple(sorted(address for address, pod in newest.items() if pod.labels in holding))
    return found
