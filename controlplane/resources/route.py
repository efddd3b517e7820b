"""Routes of HTTP load balancers: what they match, and what becomes of a request that does."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from controlplane.resources.base import Choice, Empty, Flag, OriginPoolRef, Unless, Value, Whole
from controlplane.resources.enumeration import Names, did_you_mean
from controlplane.resources.headers import UNSUPPORTED_COOKIES, HeaderEdits
from controlplane.resources.origin_pool import SUBSETS
from controlplane.resources.regex import check_re2, check_substitution
from controlplane.resources.scalars import HeaderName, HeaderText, HostHeader, LookedUpHeaderName, Path, Port, PortMatches, Regex, Text
from controlplane.resources.secrets import Inline, decode_inline

_METHODS = ("ANY", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "COPY")
RETRACTION = "unhealthy origins are always withdrawn"
COOKIE_ATTRIBUTES = "attributes of cookies are not supported"

HttpMethod = Annotated[
    Literal["ANY", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "COPY"],
    Names(*_METHODS, refused={"CONNECT": "CONNECT is not supported: use a TCP load balancer"}),
]
ProtoRedirect = Annotated[Literal["incoming-proto", "http", "https"], Names("incoming-proto", "http", "https")]

RETRY_CONDITIONS = (
    "5xx",
    "gateway-error",
    "connect-failure",
    "refused-stream",
    "retriable-4xx",
    "retriable-status-codes",
    "reset",
)


def _retry_condition(word: str) -> str:
    if word not in RETRY_CONDITIONS:
        raise ValueError(f"{word} is not a retry condition{did_you_mean(word, RETRY_CONDITIONS)}")
    return word


RetryCondition = Annotated[str, Field(max_length=64), AfterValidator(_retry_condition)]
StatusCode = Annotated[Whole, Field(ge=100, le=599)]


class PoolWithWeight(Value):
    """A pool, how much of the traffic it gets among those of its priority, and when it is used."""

    choices = (Choice("choice", ("pool",), required=True, refused={"cluster": "cluster objects are not supported: give pool"}),)
    unsupported = {"endpoint_subsets": SUBSETS}

    pool: OriginPoolRef | None = None
    weight: Whole = Field(1, ge=0, le=65_535)
    """0 takes the pool out of use."""
    priority: Whole = Field(0, ge=0, le=32)
    """1 is used first, then 2, 3 …, and 0 last."""


class PathMatch(Value):
    choices = (Choice("path_match", ("prefix", "path", "regex"), required=True),)

    prefix: Path | None = None
    path: Path | None = None
    regex: Regex | None = None


class HeaderMatch(Value):
    choices = (Choice("value_match", ("exact", "regex", "presence"), meant_empty=("exact", "presence")),)

    name: HeaderName
    exact: HeaderText | None = None
    regex: Regex | None = None
    presence: Flag | None = None
    """Whether there is such a header; true is also what is meant when none of the three is given."""
    invert_match: Flag = False


class PortMatch(Value):
    choices = (Choice("port_match", ("no_port_match", "port", "port_ranges"), default="no_port_match"),)

    no_port_match: Empty | None = None
    port: Port | None = None
    port_ranges: PortMatches | None = None


class Matching(Value):
    """What all kinds of routes match by."""

    path: PathMatch
    http_method: HttpMethod = "ANY"
    headers: tuple[HeaderMatch, ...] = Field((), max_length=16)
    incoming_port: PortMatch | None = None


class SimpleQueryParams(Value):
    choices = (
        Choice(
            "query_params",
            ("retain_all_params",),
            default="retain_all_params",
            refused={
                "remove_all_params": "parameters of forwarded requests cannot be removed",
                "replace_params": "parameters of forwarded requests cannot be replaced",
            },
        ),
    )

    retain_all_params: Empty | None = None


class BackOff(Value):
    """Milliseconds."""

    base_interval: Whole = Field(25, ge=1, le=1_800_000)
    max_interval: Whole = Field(250, ge=1, le=1_800_000)

    @model_validator(mode="after")
    def intervals_are_a_range(self) -> Self:
        if self.max_interval < self.base_interval:
            raise ValueError("max_interval is below base_interval")
        return self


class RetryPolicy(Value):
    unsupported = {"retry_on": "give retry_condition"}

    num_retries: Whole = Field(1, ge=0, le=8)
    per_try_timeout: Whole = Field(0, ge=0, le=600_000)
    """Milliseconds; 0 means the timeout of the route."""
    retry_condition: tuple[RetryCondition, ...] = Field(min_length=1, max_length=len(RETRY_CONDITIONS))
    retriable_status_codes: tuple[StatusCode, ...] = Field((), max_length=16)
    back_off: BackOff | None = None


class RegexRewrite(Value):
    pattern: Regex
    substitution: Text = Field("", max_length=256)
    """`\\1` to `\\9` stand for groups of the pattern."""

    @model_validator(mode="after")
    def groups_exist(self) -> Self:
        check_substitution(self.substitution, groups=check_re2(self.pattern))
        return self


class WebSocketConfig(Value):
    unsupported = {"max_connect_attempts": "is not supported: the retry policy applies"}

    use_websocket: Flag = True
    idle_timeout: Whole = Field(0, ge=0, le=86_400_000)
    """Milliseconds; 0 means none."""


class CookieForHashing(Value):
    """The cookie that keeps a client at its origin; made by the proxy when `ttl` is given and the client has none."""

    choices = (
        Choice("httponly", off=("ignore_httponly",), refused={"add_httponly": COOKIE_ATTRIBUTES}),
        Choice("secure", off=("ignore_secure",), refused={"add_secure": COOKIE_ATTRIBUTES}),
        Choice(
            "samesite",
            off=("ignore_samesite",),
            refused=dict.fromkeys(("samesite_lax", "samesite_none", "samesite_strict"), COOKIE_ATTRIBUTES),
        ),
    )

    name: HeaderName
    path: Path | None = None
    ttl: Whole | None = Field(None, ge=0, le=86_400_000)
    """Milliseconds; 0 makes a cookie of the browser's session."""


class HashPolicy(Value):
    choices = (Choice("policy_specifier", ("cookie", "header_name", "source_ip"), required=True),)

    cookie: CookieForHashing | None = None
    header_name: LookedUpHeaderName | None = None
    source_ip: Flag | None = None
    terminal: Flag = False


class HashPolicies(Value):
    hash_policy: tuple[HashPolicy, ...] = Field(min_length=1, max_length=8)


class RoutePolicies(Value):
    """What the load balancer's service policies have to do with a route."""

    disable: Flag = False


class RouteOptions(HeaderEdits):
    """`advanced_options` of a simple route."""

    choices = (
        Choice("retry_policy_choice", ("default_retry_policy", "no_retry_policy", "retry_policy"), default="default_retry_policy"),
        Choice("rewrite_choice", ("disable_prefix_rewrite", "prefix_rewrite", "regex_rewrite"), default="disable_prefix_rewrite"),
        Choice("mirroring_choice", off=("disable_mirroring",), refused={"mirror_policy": "mirroring is not supported"}),
        Choice("buffer_choice", off=("common_buffering",), refused={"buffer_policy": "buffering is not supported"}),
        Choice("hash_policy_choice", ("common_hash_policy", "specific_hash_policy"), default="common_hash_policy"),
        Choice("websocket_choice", ("disable_web_socket_config", "web_socket_config"), default="disable_web_socket_config"),
        Choice("spdy_choice", off=("disable_spdy",), refused={"enable_spdy": "SPDY is not supported"}),
        Choice("cluster_retract_choice", off=("retract_cluster",), refused={"do_not_retract_cluster": RETRACTION}),
        Choice("waf_choice", off=("inherited_waf", "disable_waf"), refused={"app_firewall": "WAF is not supported"}),
        Choice("waf_exclusion_choice", off=("inherited_waf_exclusion",), refused={"waf_exclusion_policy": "WAF is not supported"}),
        Choice(
            "bot_defense_javascript_injection_choice",
            off=("inherited_bot_defense_javascript_injection",),
            refused={"bot_defense_javascript_injection": "bot defense is not supported"},
        ),
    )
    unsupported = {
        **UNSUPPORTED_COOKIES,
        "cors_policy": "CORS policies are not supported",
        "csrf_policy": "CSRF policies are not supported",
        "endpoint_subsets": SUBSETS,
        "priority": Unless("only DEFAULT is supported", ("DEFAULT",)),
    }
    ignored = frozenset({"disable_location_add"})

    timeout: Whole = Field(0, ge=0, le=600_000)
    """Milliseconds, of the whole request; 0 means 30,000."""
    default_retry_policy: Empty | None = None
    no_retry_policy: Empty | None = None
    retry_policy: RetryPolicy | None = None
    disable_prefix_rewrite: Empty | None = None
    prefix_rewrite: Path | None = None
    regex_rewrite: RegexRewrite | None = None
    common_hash_policy: Empty | None = None
    specific_hash_policy: HashPolicies | None = None
    disable_web_socket_config: Empty | None = None
    web_socket_config: WebSocketConfig | None = None
    service_policy: RoutePolicies | None = None


class SimpleRoute(Matching):
    choices = (Choice("host_rewrite_params", ("auto_host_rewrite", "host_rewrite", "disable_host_rewrite"), default="auto_host_rewrite"),)

    query_params: SimpleQueryParams | None = None
    origin_pools: tuple[PoolWithWeight, ...] = Field(min_length=1, max_length=16)
    auto_host_rewrite: Empty | None = None
    host_rewrite: HostHeader | None = None
    disable_host_rewrite: Empty | None = None
    advanced_options: RouteOptions | None = None


def _redirect_code(code: int) -> int:
    if code not in (0, 301, 302, 303, 307, 308):
        raise ValueError("should be 301, 302, 303, 307 or 308")
    return code or 301


RedirectCode = Annotated[Whole, AfterValidator(_redirect_code)]


class RouteRedirect(Value):
    choices = (
        Choice(
            "query_params",
            ("retain_all_params", "remove_all_params", "replace_params"),
            default="retain_all_params",
            meant_empty=("replace_params",),
        ),
        Choice("redirect_path_choice", ("path_redirect", "prefix_rewrite")),
    )
    unsupported = {"port_redirect": "name the port in host_redirect"}

    host_redirect: HostHeader | None = None
    path_redirect: Path | None = None
    prefix_rewrite: Path | None = None
    proto_redirect: ProtoRedirect = "incoming-proto"
    response_code: RedirectCode = 301

    retain_all_params: Empty | None = None
    remove_all_params: Empty | None = None
    replace_params: Text | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def location_can_be_made(self) -> Self:
        """The proxy writes a location with a query string of its own from the whole path, of which it cannot replace a part."""
        if self.prefix_rewrite is not None and self.replace_params is not None:
            raise ValueError("prefix_rewrite and replace_params do not go together: give path_redirect, or leave the query string")
        return self


class RedirectRoute(Matching):
    route_redirect: RouteRedirect


def _inline_text(url: str) -> str:
    """Envoy refuses larger inline bodies."""
    body = decode_inline(url)
    if len(body) > 4096:
        raise ValueError("should be at most 4096 bytes long")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ValueError("should be text in UTF-8") from error
    return url


InlineText = Annotated[Inline, AfterValidator(_inline_text)]


class RouteDirectResponse(Value):
    unsupported = {"response_body": "give response_body_encoded"}

    response_code: Annotated[Whole, Field(ge=200, le=599)]
    response_body_encoded: InlineText | None = None


class DirectResponseRoute(Matching):
    route_direct_response: RouteDirectResponse


class Route(Value):
    choices = (
        Choice(
            "choice",
            ("simple_route", "redirect_route", "direct_response_route"),
            required=True,
            refused={"custom_route_object": "route objects are not supported"},
        ),
    )

    simple_route: SimpleRoute | None = None
    redirect_route: RedirectRoute | None = None
    direct_response_route: DirectResponseRoute | None = None
