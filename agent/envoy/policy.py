"""Service policies as RBAC: an ordered list of conditions where the first that holds decides.

They are enforced twice. At ingress the source site is this one, and what a rule says of sites is decided here. At the destination it is what
the peer's certificate says, and what ingress saw before it changed the request comes in private headers.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from envoy.config.rbac.v3.rbac_pb2 import Action
from xds.type.matcher.v3.matcher_pb2 import Matcher

from agent.envoy import names
from agent.envoy.inputs import Item, body
from agent.envoy.messages import Fields, extension
from agent.envoy.predicates import (
    Input,
    Predicate,
    all_of,
    any_of,
    begins,
    ends,
    exactly,
    header,
    like,
    negated,
    present,
    within,
)
from agent.protocol.items import HeaderMatch, PodSelector, Policy, PolicyRule, QueryMatch

Verdict = tuple[Predicate, str]
"""`ALLOW` or `DENY` if the predicate holds."""
FromSites = Callable[[Sequence[str]], Predicate]
"""Whether the request comes from one of the sites."""
FromPods = Callable[[PodSelector], Predicate | None]
"""Whether it comes from a pod for which the selector holds; None: nobody here knows which pods there are."""


@dataclass(frozen=True)
class Requests:
    """Where a policy finds what it looks at."""

    from_sites: FromSites
    client: Input
    from_pods: FromPods = lambda _: False
    header_prefix: str = ""
    """Of copies that ingress made of the headers that policies name."""
    is_http: bool = True


def verdicts(policies: Iterable[Item], requests: Requests) -> list[Verdict]:
    """Of all policies in order; a request that none decides is denied."""
    decided = [verdict for policy in policies for verdict in _policy(body(policy, Policy), requests)]
    return [*decided, (True, "DENY")]


def headers_of(policies: Iterable[Item]) -> tuple[str, ...]:
    """Lower-case names of the headers that the policies look at, sorted."""
    rules = (rule for policy in policies for rule in body(policy, Policy).rules)
    return tuple(sorted({match.name.lower() for rule in rules for match in rule.headers}))


def queries_of(policies: Iterable[Item]) -> tuple[str, ...]:
    """Names of the query parameters that the policies look at, sorted."""
    rules = (rule for policy in policies for rule in body(policy, Policy).rules)
    return tuple(sorted({match.name for rule in rules for match in rule.query}))


def matcher(verdicts_: Iterable[Verdict]) -> Matcher:
    """For RBAC filters."""
    return first_match(verdicts_, {action: {"action": _action(action)} for action in ("ALLOW", "DENY")})


def first_match(verdicts_: Iterable[Verdict], outcomes: Mapping[str, Fields]) -> Matcher:
    """The first that holds decides what happens. What can never hold is left out, and what always holds ends the list."""
    matchers: list[Fields] = []
    for predicate, action in verdicts_:
        if predicate is True:
            return _matcher(matchers, outcomes[action])
        if predicate is not False:
            matchers.append({"predicate": predicate, "on_match": outcomes[action]})
    return _matcher(matchers, outcomes["DENY"])


def _matcher(matchers: list[Fields], otherwise: Fields) -> Matcher:
    listed = {"matcher_list": {"matchers": matchers}} if matchers else {}
    return Matcher(on_no_match=otherwise, **listed)


def _action(action: str) -> Fields:
    return extension("action", Action(name=action.lower(), action=action))


def _policy(policy: Policy, requests: Requests) -> Iterable[Verdict]:
    """`NEXT_POLICY` leaves the policy: whatever follows in it must also not match that rule.

    Where it is not known whether a rule matches, because pods cannot be read, what it could match is denied.
    """
    stays: Predicate = True
    for rule in policy.rules:
        if rule.pods is not None and requests.from_pods(rule.pods) is None:
            yield all_of([stays, _rule(rule, requests)]), "DENY"
            continue
        matched = all_of([stays, _rule(rule, requests)])
        if rule.action == "NEXT_POLICY":
            stays = all_of([stays, negated(_rule(rule, requests))])
        else:
            yield matched, rule.action
    if policy.default is not None:
        yield stays, policy.default


def _rule(rule: PolicyRule, requests: Requests) -> Predicate:
    conditions = [_sites(rule, requests), _pods(rule, requests), _prefixes(rule, requests)]
    if _looks_into_http(rule):
        conditions += _http(rule, requests) if requests.is_http else [False]
    return all_of(conditions)


def _looks_into_http(rule: PolicyRule) -> bool:
    paths = rule.path_prefixes or rule.path_exact or rule.path_suffixes or rule.path_regexes
    return bool(paths or rule.methods or rule.headers or rule.query or rule.domains_exact or rule.domains_regex)


def _http(rule: PolicyRule, requests: Requests) -> list[Predicate]:
    headers = [_header(match, requests) for match in rule.headers]
    return [_path(rule), _methods(rule), _domains(rule), *headers, *map(_query, rule.query)]


def _sites(rule: PolicyRule, requests: Requests) -> Predicate:
    return True if rule.sites is None else requests.from_sites(rule.sites)


def _pods(rule: PolicyRule, requests: Requests) -> Predicate:
    found = None if rule.pods is None else requests.from_pods(rule.pods)
    return True if found is None else found


def _prefixes(rule: PolicyRule, requests: Requests) -> Predicate:
    return _one_of([within(requests.client, rule.prefixes)] if rule.prefixes else [], inverted=rule.prefixes_invert)


def _one_of(alternatives: Sequence[Predicate], *, inverted: bool = False) -> Predicate:
    """At least one; without any there is no condition."""
    if not alternatives:
        return True
    return negated(any_of(alternatives)) if inverted else any_of(alternatives)


def _path(rule: PolicyRule) -> Predicate:
    path = header(names.PATH_HEADER)
    alternatives = [
        *(begins(path, value) for value in rule.path_prefixes),
        *(exactly(path, value) for value in rule.path_exact),
        *(ends(path, value) for value in rule.path_suffixes),
        *(like(path, value) for value in rule.path_regexes),
    ]
    return _one_of(alternatives, inverted=rule.path_invert)


def _methods(rule: PolicyRule) -> Predicate:
    return _one_of([exactly(header(":method"), method) for method in rule.methods], inverted=rule.methods_invert)


def _domains(rule: PolicyRule) -> Predicate:
    """However the client writes them: in capitals, fully qualified, after a user, with a port that Envoy cannot strip."""
    host = header(names.HOST_HEADER)
    domains = [*map(re.escape, rule.domains_exact), *rule.domains_regex]
    return _one_of([like(host, rf"(?i)(?:.*@)?(?:{domain})\.*(?::.*)?") for domain in domains])


def _header(match: HeaderMatch, requests: Requests) -> Predicate:
    found = _value(match, header(requests.header_prefix + match.name.lower()))
    return negated(found) if match.invert else found


def _query(match: QueryMatch) -> Predicate:
    return _value(match, header(names.query_header(match.name)))


def _value(match: HeaderMatch | QueryMatch, input_: Input) -> Predicate:
    if match.exact is not None:
        return exactly(input_, match.exact)
    if match.regex is not None:
        return like(input_, match.regex)
    return negated(present(input_)) if match.present is False else present(input_)
