"""How clients stay with an origin, whichever site it is at.

Origins of this site are chosen by hash policies, those of another by a header with what these look at. So both must be there with a client's
first request: one without the cookie goes by the id of the request, which then becomes the value of the cookie.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from envoy.extensions.filters.http.header_to_metadata.v3.header_to_metadata_pb2 import Config as HeaderToMetadata

from agent.envoy import names
from agent.envoy.messages import METADATA, Fields, flag, header, literal, packed
from agent.protocol.items import HashPolicy, HttpLoadBalancer

HEADER_TO_METADATA_FILTER = "envoy.filters.http.header_to_metadata"
_REQUEST_ID = "x-request-id"
"""Made anew for every request, whatever the client sent."""


class Visit(NamedTuple):
    """A kind of client, and how its requests are hashed."""

    conditions: tuple[Fields, ...]
    """Header matches."""
    policies: tuple[Fields, ...]
    """Hash policies for origins here."""
    terms: tuple[str, ...]
    """The same for those elsewhere, as `%…%` commands."""
    cookies: tuple[Fields, ...]
    """Response headers."""

    def applied(self, action: Fields, *, crosses: bool) -> Fields:
        """The action of a route, and what goes with it; `crosses`: whether other sites may serve."""
        weighted = action["route"].get("weighted_clusters")
        by_hash = {"weighted_clusters": {**weighted, "use_hash_policy": flag(True)}} if weighted and self.policies else {}
        return {
            "route": {**action["route"], **by_hash, "hash_policy": self.policies},
            "request_headers_to_add": [header(names.HASH_HEADER, "|".join(self.terms))] if crosses and self.terms else [],
            "response_headers_to_add": self.cookies,
        }


def visits(policies: Sequence[HashPolicy]) -> Iterable[Visit]:
    """Clients that bring all cookies that they are to stick by, then those that are given them."""
    given = [policy for policy in policies if _is_given(policy)]
    policies_, terms = tuple(map(_policy, policies)), tuple(map(_term, policies))
    if not given:
        yield Visit((), policies_, terms, ())
        return
    yield Visit(tuple(map(_brings, given)), policies_, terms, ())
    newcomers = [
        (_by_request(policy), f"%REQ({_REQUEST_ID})%") if _is_given(policy) else (_policy(policy), _term(policy)) for policy in policies
    ]
    yield Visit((), tuple(policy for policy, _ in newcomers), tuple(term for _, term in newcomers), tuple(map(_cookie, given)))


def _is_given(policy: HashPolicy) -> bool:
    return policy.cookie is not None and policy.cookie_ttl is not None


def _brings(policy: HashPolicy) -> Fields:
    regex = rf"(?:.*[;,]\s*)?{re.escape(policy.cookie or '')}=[^;,\s].*"
    return {"name": "cookie", "string_match": {"safe_regex": {"regex": regex}}}


def _policy(policy: HashPolicy) -> Fields:
    if policy.header is not None:
        return {"header": {"header_name": policy.header}, "terminal": policy.terminal}
    if policy.cookie is not None:
        return {"cookie": {"name": policy.cookie}, "terminal": policy.terminal}
    return {"connection_properties": {"source_ip": True}, "terminal": policy.terminal}


def _by_request(policy: HashPolicy) -> Fields:
    return {"header": {"header_name": _REQUEST_ID}, "terminal": policy.terminal}


def _term(policy: HashPolicy) -> str:
    if policy.header is not None:
        return f"%REQ({policy.header})%"
    if policy.cookie is not None:
        return f"%DYNAMIC_METADATA({METADATA}:{_key(policy.cookie)})%"
    return "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"


def _cookie(policy: HashPolicy) -> Fields:
    life = f"; Max-Age={policy.cookie_ttl // 1_000}" if policy.cookie_ttl else ""
    path = f"; Path={literal(policy.cookie_path)}" if policy.cookie_path else ""
    return header("set-cookie", f"{literal(policy.cookie or '')}=%REQ({_REQUEST_ID})%{life}{path}; HttpOnly", append=True)


def hashed_cookies(lb: HttpLoadBalancer) -> Fields:
    """Cookies into metadata: there is no command that reads a cookie."""
    by_route = chain.from_iterable(route.forward.hash_policies for route in lb.routes if route.forward is not None)
    cookies = sorted({policy.cookie for policy in (*lb.hash_policies, *by_route) if policy.cookie is not None})
    rules = [{"cookie": name, "on_header_present": {"metadata_namespace": METADATA, "key": _key(name)}} for name in cookies]
    return {HEADER_TO_METADATA_FILTER: packed(HeaderToMetadata(request_rules=rules))} if rules else {}


def _key(cookie: str) -> str:
    return f"cookie-{cookie.encode().hex()}"
