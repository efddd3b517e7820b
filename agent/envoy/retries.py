"""What is tried again, and on what signs.

By default that is what no origin can have seen, and where the method is idempotent also what one may have seen. The method is looked at once, where requests
enter, and not by routes: Envoy makes a route configuration anew whenever one of its virtual hosts changes, which would take twice as long.
"""

from collections.abc import Iterable, Sequence

from envoy.extensions.common.matching.v3.extension_matcher_pb2 import ExtensionWithMatcher
from envoy.extensions.filters.common.matcher.action.v3.skip_action_pb2 import SkipFilter
from envoy.extensions.filters.http.header_mutation.v3.header_mutation_pb2 import HeaderMutation
from envoy.extensions.retry.host.previous_hosts.v3.previous_hosts_pb2 import PreviousHostsPredicate
from envoy.extensions.retry.priority.previous_priorities.v3.previous_priorities_config_pb2 import PreviousPrioritiesConfig

from agent.envoy import names
from agent.envoy.messages import Fields, extension, header, milliseconds, number
from agent.envoy.predicates import header as header_input
from agent.envoy.predicates import like, negated
from agent.protocol.items import RetryPolicy

IDEMPOTENT = "GET|HEAD|OPTIONS|TRACE|PUT|DELETE"
"""Methods, as an expression; RFC 9110, 9.2.2."""
_REASONS_HEADER = "x-envoy-retry-on"
"""Of a request: conditions that Envoy adds to those of the policy. Clients cannot send it, and origins do not see it."""
_UNTOUCHED = ("connect-failure", "refused-stream")
"""Conditions under which no origin has seen the request."""
_SELECTIONS = 16
"""Of a host, until a retry is content with one that was tried: by then another one is found, however little weight it has."""


def method_filter() -> Fields:
    """Of listeners where requests enter: after a broken connection those with an idempotent method are tried again."""
    told = HeaderMutation(mutations={"request_mutations": [{"append": header(_REASONS_HEADER, "reset")}]})
    others = negated(like(header_input(":method"), IDEMPOTENT))
    skipping = {"matchers": [{"predicate": others, "on_match": {"action": extension("skip", SkipFilter())}}]}
    return extension(
        "isthmus.idempotent",
        ExtensionWithMatcher(
            xds_matcher={"matcher_list": skipping}, extension_config=extension("envoy.filters.http.header_mutation", told)
        ),
    )


def policy(retry: RetryPolicy, orders: Sequence[tuple[str, ...]]) -> Fields:
    """Of a route that leads to these orders of clusters. What can make no difference there is left out."""
    if not retry.num_retries:
        return {}
    markers = [{"name": names.MARKER, "string_match": {"exact": value}} for value in _markers(retry, orders)]
    by_marker = {"retriable-headers"} if markers else set()
    by_status = {"retriable-status-codes"} if retry.status_codes else set()
    per_try = {"per_try_timeout": milliseconds(retry.per_try_timeout)} if retry.per_try_timeout else {}
    return {
        "retry_on": ",".join(sorted({*(retry.conditions or _UNTOUCHED), *by_marker, *by_status})),
        "num_retries": number(retry.num_retries),
        "retriable_status_codes": retry.status_codes,
        "retriable_headers": markers,
        "retry_host_predicate": [extension("envoy.retry_host_predicates.previous_hosts", PreviousHostsPredicate())],
        "host_selection_retry_max_attempts": _SELECTIONS,
        "retry_back_off": {"base_interval": milliseconds(retry.back_off_base), "max_interval": milliseconds(retry.back_off_max)},
        **_next_priority(orders),
        **per_try,
    }


def _markers(retry: RetryPolicy, orders: Sequence[tuple[str, ...]]) -> list[str]:
    """Values of the marker that are reasons to try again: as a destination gives them, or witnessed where origins of this site may answer as well."""
    crossing = [order for order in orders if not all(map(names.is_local, order))]
    ends = {"@http" if len(order) > 1 else "" for order in crossing}
    return [value + end for value in _values(retry) for end in sorted(ends)]


def _values(retry: RetryPolicy) -> tuple[str, ...]:
    if not retry.conditions:
        return names.UNREACHED, names.REPLAYABLE
    return (names.UNREACHED, names.REPLAYABLE, names.BROKEN) if "reset" in retry.conditions else (names.UNREACHED,)


def _next_priority(orders: Iterable[tuple[str, ...]]) -> Fields:
    """Origins of this site alone all have the same."""
    if all(len(order) == 1 and names.is_local(order[0]) for order in orders):
        return {}
    return {"retry_priority": extension("envoy.retry_priorities.previous_priorities", PreviousPrioritiesConfig(update_frequency=1))}


def removed_headers(retry: RetryPolicy) -> list[str]:
    """From requests of a route: where it says itself when to try again, or never to, the method counts for nothing."""
    return [_REASONS_HEADER] if retry.conditions or not retry.num_retries else []
