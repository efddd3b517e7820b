"""Policies as ordered verdicts; that Envoy understands them the same way is shown with a real one."""

from typing import Any

import pytest

from agent.envoy.callers import groups
from agent.envoy.inputs import Item, ItemId
from agent.envoy.policy import Requests, first_match, headers_of, verdicts
from agent.envoy.predicates import all_of, any_of, negated, source_ip
from agent.protocol.items import HeaderMatch, ItemKind, LabelRequirement, PodSelector, Policy, PolicyRule

HERE, ELSEWHERE = ("here",), ("elsewhere",)
REQUESTS = Requests(lambda sites: "here" in sites, source_ip())
CONNECTIONS = Requests(lambda sites: "here" in sites, source_ip(), is_http=False)


def policy(*rules: PolicyRule, default: Any = None) -> Item:
    return Item(ItemId(ItemKind.POLICY, "shop/p"), str(rules), Policy(rules=rules, default=default))


def rule(action: Any, **conditions: Any) -> PolicyRule:
    return PolicyRule(name="r", action=action, **conditions)


def test_conditions_that_always_or_never_hold_disappear() -> None:
    term: dict[str, Any] = {"single_predicate": {}}
    assert all_of([]) is True
    assert any_of([]) is False
    assert all_of([True, term]) is term
    assert all_of([False, term]) is False
    assert any_of([True, term]) is True
    assert any_of([False, term]) is term
    assert negated(False) is True


def test_what_no_policy_decides_is_denied() -> None:
    assert verdicts([], REQUESTS) == [(True, "DENY")]
    assert verdicts([policy(default="ALLOW")], REQUESTS) == [(True, "ALLOW"), (True, "DENY")]


def test_sites_are_decided_where_they_are_known() -> None:
    rules = policy(rule("DENY", sites=ELSEWHERE), rule("ALLOW", sites=HERE))
    assert verdicts([rules], REQUESTS)[:2] == [(False, "DENY"), (True, "ALLOW")]


WEB = PodSelector(requirements=(LabelRequirement(key="app", operator="in", values=("web",)),))


def test_pods_are_known_as_the_place_knows_them() -> None:
    rules = policy(rule("ALLOW", pods=WEB))
    known = Requests(lambda _: True, source_ip(), lambda selector: selector is WEB)
    assert verdicts([rules], known) == [(True, "ALLOW"), (True, "DENY")]
    assert verdicts([rules], REQUESTS) == [(False, "ALLOW"), (True, "DENY")]


@pytest.mark.parametrize("action", ["ALLOW", "DENY", "NEXT_POLICY"])
def test_what_cannot_be_told_is_denied_as_far_as_the_rule_reaches(action: str) -> None:
    rules = policy(rule("ALLOW", sites=HERE, prefixes=("10.0.0.0/8",)), rule(action, pods=WEB, sites=HERE), rule("ALLOW"), default="ALLOW")
    unknown = Requests(lambda sites: "here" in sites, source_ip(), lambda _: None)
    assert [(predicate is True, verdict) for predicate, verdict in verdicts([rules], unknown)][:3] == [
        (False, "ALLOW"),
        (True, "DENY"),
        (True, "ALLOW"),
    ]
    elsewhere = policy(rule(action, pods=WEB, sites=ELSEWHERE), default="ALLOW")
    assert verdicts([elsewhere], unknown)[:2] == [(False, "DENY"), (True, "ALLOW")]


def test_addresses_are_grouped_by_all_that_holds_for_them() -> None:
    pods = (("a", ("10.0.0.1", "10.0.0.2")), ("b", ("10.0.0.2", "fd00::1")), ("c", None), ("d", ()))
    assert groups(pods) == (("|a|", ("10.0.0.1",)), ("|a|b|", ("10.0.0.2",)), ("|b|", ("fd00::1",)))


def test_next_policy_leaves_the_policy_and_not_the_chain() -> None:
    left = policy(rule("NEXT_POLICY", sites=HERE), rule("DENY"), default="DENY")
    assert verdicts([left, policy(default="ALLOW")], REQUESTS) == [(False, "DENY"), (False, "DENY"), (True, "ALLOW"), (True, "DENY")]


def test_connections_have_no_paths_or_methods_so_that_no_rule_about_them_matches() -> None:
    rules = policy(rule("ALLOW", path_prefixes=("/",)), rule("ALLOW", methods=("GET",), methods_invert=True), rule("DENY"))
    assert [predicate for predicate, _ in verdicts([rules], CONNECTIONS)] == [False, False, True, True]


def test_nothing_comes_after_a_verdict_that_always_holds() -> None:
    outcomes = {action: {"action": {"name": action}} for action in ("ALLOW", "DENY")}
    matcher = first_match([({"single_predicate": {}}, "DENY"), (True, "ALLOW"), (True, "DENY")], outcomes)
    assert [found.on_match.action.name for found in matcher.matcher_list.matchers] == ["DENY"]
    assert matcher.on_no_match.action.name == "ALLOW"


def test_headers_that_policies_look_at_are_named_once() -> None:
    match = HeaderMatch(name="X-Key", exact="1")
    assert headers_of([policy(rule("ALLOW", headers=(match,))), policy(rule("DENY", headers=(match,)))]) == ("x-key",)
