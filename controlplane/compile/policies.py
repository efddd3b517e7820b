"""Service policies as items: selectors over sites become ids, lists become rules."""

import re
from collections.abc import Iterable
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.intent import CACHE
from controlplane.compile.members import SITES, Topology, labels
from controlplane.compile.snapshot import CompiledItem
from controlplane.resources import service_policy as resources
from controlplane.resources.base import Key, Stored, chosen
from controlplane.resources.selector import Selector

_FIRST = {"FIRST_MATCH": None, "DENY_OVERRIDES": "DENY", "ALLOW_OVERRIDES": "ALLOW"}
_ACTIONS = {"allow_list": "ALLOW", "deny_list": "DENY"}


class CompiledPolicy(NamedTuple):
    item: CompiledItem
    headers: frozenset[str]
    """Lower-case names of those that it looks at."""
    sites: frozenset[str]
    """Those that its rules name, by id."""


@lru_cache(CACHE)
def compile_policy(policy: Stored[resources.ServicePolicy], topology: Topology) -> CompiledPolicy:
    body = _policy(policy.spec, topology)
    return CompiledPolicy(
        CompiledItem.of(ItemKind.POLICY, str(policy.key), body),
        frozenset(header.name.lower() for rule in body.rules for header in rule.headers),
        frozenset(site for rule in body.rules for site in rule.sites or ()),
    )


def _policy(spec: resources.ServicePolicy, topology: Topology) -> items.Policy:
    name, choice = chosen(spec, "rule_choice")
    if name == "rule_list":
        return items.Policy(rules=_rules(choice, _FIRST[spec.algo], topology))
    if name in _ACTIONS:
        return _source_list(choice, _ACTIONS[name])
    return items.Policy(rules=(), default="ALLOW" if name == "allow_all_requests" else "DENY")


def _source_list(sources: resources.SourceList, action: str) -> items.Policy:
    """A list without prefixes matches nobody, whereas a rule without them would match everybody."""
    prefixes = sources.prefix_list.prefixes
    rules = (items.PolicyRule.model_validate({"name": "prefix-list", "action": action, "prefixes": prefixes}),) if prefixes else ()
    default = "ALLOW" if sources.default_action_allow else "DENY" if sources.default_action_deny else None
    return items.Policy.model_validate({"rules": rules, "default": default})


def _rules(rules: resources.RuleList, first: str | None, topology: Topology) -> tuple[items.PolicyRule, ...]:
    """Those that can match at all, in the order of evaluation."""
    compiled = (_rule(rule, topology) for rule in rules.rules if not rule.metadata.disable)
    return tuple(sorted((rule for rule in compiled if rule), key=lambda rule: first is not None and rule.action != first))


def _rule(rule: resources.Rule, topology: Topology) -> items.PolicyRule | None:
    """None for a rule that no request can match: in an item an empty condition would hold always."""
    spec = rule.spec
    sites = _sites(spec, topology)
    methods = spec.http_method.methods if spec.http_method else ()
    every_method = not methods or "ANY" in methods
    no_method = spec.http_method is not None and spec.http_method.invert_matcher and every_method
    if sites == () or no_method:
        return None
    path = spec.path or resources.PathMatcher.model_construct()
    domains = spec.domain_matcher or resources.DomainMatcher.model_construct()
    return items.PolicyRule(
        name=rule.metadata.name,
        action=spec.action,
        sites=sites,
        pods=_pods(spec.client_pod_selector.selector) if spec.client_pod_selector else None,
        prefixes=spec.ip_prefix_list.ip_prefixes if spec.ip_prefix_list else (),
        prefixes_invert=spec.ip_prefix_list is not None and spec.ip_prefix_list.invert_match,
        path_prefixes=path.prefix_values,
        path_exact=path.exact_values,
        path_suffixes=path.suffix_values,
        path_regexes=path.regex_values,
        path_invert=path.invert_matcher,
        methods=() if every_method else methods,
        methods_invert=not every_method and spec.http_method is not None and spec.http_method.invert_matcher,
        headers=tuple(_header(header) for header in spec.headers),
        query=tuple(_query(parameter) for parameter in spec.query_params),
        domains_exact=domains.exact_values,
        domains_regex=domains.regex_values,
    )


def _sites(spec: resources.RuleSpec, topology: Topology) -> tuple[str, ...] | None:
    """Ids of the source sites, sorted; None for any."""
    if spec.client_selector:
        selector = spec.client_selector.selector
        return tuple(id for id, site in topology.sites.items() if selector.matches(labels(site)))
    names = (spec.client_name,) if spec.client_name else spec.client_name_matcher.exact_values if spec.client_name_matcher else None
    return None if names is None else _named(names, topology)


def _pods(selector: Selector) -> items.PodSelector:
    return items.PodSelector(requirements=tuple(sorted(selector.requirements, key=attrgetter("key", "operator", "values"))))


def _named(names: Iterable[str], topology: Topology) -> tuple[str, ...]:
    keys = {Key(SITES, name) for name in names}
    return tuple(sorted(topology.ids[key] for key in keys if key in topology.ids))


def _header(header: resources.HeaderMatcher) -> items.HeaderMatch:
    exact, regex = _one_of(header.item) if header.item else (None, None)
    if header.item:
        return items.HeaderMatch(name=header.name, exact=exact, regex=regex, invert=header.invert_matcher)
    absent = header.check_not_present is not None or header.presence is False
    return items.HeaderMatch(name=header.name, present=True, invert=header.invert_matcher != absent)


def _query(parameter: resources.QueryMatcher) -> items.QueryMatch:
    if parameter.item:
        exact, regex = _one_of(parameter.item)
        return items.QueryMatch(name=parameter.key, exact=exact, regex=regex)
    return items.QueryMatch(name=parameter.key, present=parameter.check_not_present is None and parameter.presence is not False)


def _one_of(values: resources.ValueMatcher) -> tuple[str | None, str | None]:
    """An exact value, or an expression that matches what any of the values does."""
    if len(values.exact_values) == 1 and not values.regex_values:
        return values.exact_values[0], None
    alternatives = [*(re.escape(value) for value in values.exact_values), *(f"(?:{regex})" for regex in values.regex_values)]
    return None, "|".join(alternatives)
