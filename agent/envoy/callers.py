"""Pods of this site's clusters that policies tell apart by labels. Envoy knows them by address.

Where a request enters, the selectors that hold for its pod are worked out once, as one word. Policies read it there, and again at the
destination, to which it goes in a private header.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

from envoy.config.rbac.v3.rbac_pb2 import Action
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBAC as RbacFilter  # noqa: N811  # RBAC is the name of two messages
from envoy.extensions.filters.http.rbac.v3.rbac_pb2 import RBACPerRoute
from xds.type.matcher.v3.matcher_pb2 import Matcher

from agent.envoy import names
from agent.envoy.inputs import Item, LocalState, body
from agent.envoy.messages import Fields, extension, packed
from agent.envoy.predicates import Predicate, contains, source_ip, within
from agent.envoy.predicates import header as header_input
from agent.protocol.items import PodSelector, Policy

PODS_FILTER = "isthmus.pods"
"""An RBAC filter that refuses nothing: it only writes down which of its actions holds."""
Known = tuple[tuple[str, tuple[str, ...] | None], ...]
"""Ids of selectors with the addresses for which they hold, sorted; None: it is not known which pods there are."""
Group = tuple[str, tuple[str, ...]]
"""The selectors that hold, as one word, and the addresses for which it is these."""
CACHE = 128
"""Entries of the memo of what has addresses of pods in it: there may be thousands of them, and other ones all the time."""
_STAT_PREFIX = "pods_"
WORD = f"%DYNAMIC_METADATA(envoy.filters.http.rbac:{_STAT_PREFIX}shadow_effective_policy_id)%"


def known(policies: Iterable[Item], local: LocalState) -> Known:
    """What the node knows of the pods that the policies select."""
    return tuple((id, local.pods.get(id, ())) for id in selected(tuple(policies)))


@lru_cache(1024)
def selected(policies: tuple[Item, ...]) -> tuple[str, ...]:
    """Ids of the selectors of these policies, sorted."""
    return tuple(sorted({rule.pods.id for policy in policies for rule in body(policy, Policy).rules if rule.pods}))


def groups(pods: Known) -> tuple[Group, ...]:
    """Every address that some selector holds for, once. Sorted."""
    holding: dict[str, list[str]] = defaultdict(list)
    for id, addresses in pods:
        for address in addresses or ():
            holding[address].append(id)
    found: dict[str, list[str]] = defaultdict(list)
    for address, ids in holding.items():
        found[_word(ids)].append(address)
    return tuple((word, tuple(sorted(addresses))) for word, addresses in sorted(found.items()))


def _word(ids: Iterable[str]) -> str:
    return f"|{'|'.join(sorted(ids))}|"


def holds(selector: PodSelector, word: str) -> bool:
    return _word([selector.id]) in word


def told(selector: PodSelector) -> Predicate:
    """Whether the word in the private header says that it holds."""
    return contains(header_input(names.PODS_HEADER), _word([selector.id]))


def of_group(addresses: Iterable[str]) -> Predicate:
    return within(source_ip(), addresses)


def telling(pods: Known) -> Fields:
    """Config of `PODS_FILTER` for a virtual host, if there is anything to tell."""
    matchers = [
        {"predicate": of_group(addresses), "on_match": {"action": extension("action", Action(name=word, action="ALLOW"))}}
        for word, addresses in groups(pods)
    ]
    if not matchers:
        return {}
    rules = RbacFilter(shadow_matcher=Matcher(matcher_list={"matchers": matchers}), shadow_rules_stat_prefix=_STAT_PREFIX)
    return {PODS_FILTER: packed(RBACPerRoute(rbac=rules))}
