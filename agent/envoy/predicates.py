"""Conditions for Envoy's matchers as a small algebra, so that what always or never holds disappears before Envoy sees it.

A predicate is `True`, `False`, or the fields of an `xds.type.matcher.v3.Matcher.MatcherList.Predicate`.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from envoy.config.core.v3.address_pb2 import CidrRange
from envoy.extensions.matching.common_inputs.network.v3.network_inputs_pb2 import FilterStateInput, SourceIPInput
from envoy.extensions.matching.common_inputs.ssl.v3.ssl_inputs_pb2 import UriSanInput
from envoy.extensions.matching.input_matchers.ip.v3.ip_pb2 import Ip
from envoy.type.matcher.v3.http_inputs_pb2 import HttpRequestHeaderMatchInput

from agent.envoy.messages import Fields, extension

Predicate = bool | Fields
Input = Fields


def all_of(predicates: Iterable[Predicate]) -> Predicate:
    terms = [predicate for predicate in predicates if predicate is not True]
    if any(term is False for term in terms):
        return False
    return _joined("and_matcher", terms) if terms else True


def any_of(predicates: Iterable[Predicate]) -> Predicate:
    terms = [predicate for predicate in predicates if predicate is not False]
    if any(term is True for term in terms):
        return True
    return _joined("or_matcher", terms) if terms else False


def _joined(how: str, terms: list[Any]) -> Predicate:
    single: Predicate = terms[0]
    return single if len(terms) == 1 else {how: {"predicate": terms}}


def negated(predicate: Predicate) -> Predicate:
    if isinstance(predicate, bool):
        return not predicate
    return {"not_matcher": predicate}


def header(name: str) -> Input:
    return extension("header", HttpRequestHeaderMatchInput(header_name=name))


def filter_state(key: str) -> Input:
    return extension("filter-state", FilterStateInput(key=key))


def source_ip() -> Input:
    """The client's address, by X-Forwarded-For where the listener trusts it."""
    return extension("source-ip", SourceIPInput())


def peer_uri() -> Input:
    """URI SAN of the client's certificate."""
    return extension("uri-san", UriSanInput())


def _matches(input_: Input, value: Fields) -> Predicate:
    return {"single_predicate": {"input": input_, "value_match": value}}


def exactly(input_: Input, value: str) -> Predicate:
    return _matches(input_, {"exact": value})


def begins(input_: Input, value: str) -> Predicate:
    return _matches(input_, {"prefix": value})


def ends(input_: Input, value: str) -> Predicate:
    return _matches(input_, {"suffix": value})


def contains(input_: Input, value: str) -> Predicate:
    return _matches(input_, {"contains": value})


def like(input_: Input, regex: str) -> Predicate:
    """The whole value matches the RE2 expression."""
    return _matches(input_, {"safe_regex": {"google_re2": {}, "regex": regex}})


def present(input_: Input) -> Predicate:
    return like(input_, r"(?s).*")


def within(input_: Input, cidrs: Iterable[str]) -> Predicate:
    """The IP address is in one of the networks, written `address/length` or as a single address."""
    ranges = [_range(cidr) for cidr in cidrs]
    if not ranges:
        return False
    matcher = extension("ip", Ip(cidr_ranges=ranges, stat_prefix="policy"))
    return {"single_predicate": {"input": input_, "custom_match": matcher}}


@lru_cache(10_000)
def _range(cidr: str) -> CidrRange:
    """The same message for the same addresses, of which there may be thousands, most of them in every version of a config."""
    address, _, length = cidr.partition("/")
    return CidrRange(address_prefix=address, prefix_len={"value": int(length or (128 if ":" in address else 32))})
