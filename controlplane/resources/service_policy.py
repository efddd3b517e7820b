"""Who may call a load balancer: enforced where the request enters and again at its destination."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from controlplane.resources.base import Choice, Empty, Flag, Name, Resource, Unless, Value
from controlplane.resources.enumeration import Names
from controlplane.resources.route import HttpMethod
from controlplane.resources.scalars import Cidr, DnsName, HeaderText, LookedUpHeaderName, LookedUpParameter, Path, Regex, Text
from controlplane.resources.virtual_site import LabelSelector

ASN = "autonomous systems are not supported"
SERVERS = "give the policy to the load balancers that it is for"
SETS = "prefix sets are not supported: list the prefixes"
FINGERPRINTS = "TLS fingerprints are not supported"
TRANSFORMERS = "transformers are not supported"
BODIES = "bodies are not looked at"

Algo = Annotated[Literal["FIRST_MATCH", "DENY_OVERRIDES", "ALLOW_OVERRIDES"], Names("FIRST_MATCH", "DENY_OVERRIDES", "ALLOW_OVERRIDES")]
Action = Annotated[Literal["DENY", "ALLOW", "NEXT_POLICY"], Names("DENY", "ALLOW", "NEXT_POLICY")]


class NameMatcher(Value):
    """Names of source sites."""

    unsupported = {"regex_values": "is not supported: give exact_values, or client_selector"}

    exact_values: tuple[Name, ...] = Field(min_length=1, max_length=64)


class IpPrefixList(Value):
    """Addresses of the clients as the proxy where they enter sees them."""

    ip_prefixes: tuple[Cidr, ...] = Field(min_length=1, max_length=128)
    invert_match: Flag = False


class PathMatcher(Value):
    """One of the values has to match, or none with `invert_matcher`."""

    unsupported = {"transformers": TRANSFORMERS}

    prefix_values: tuple[Path, ...] = Field((), max_length=64)
    exact_values: tuple[Path, ...] = Field((), max_length=64)
    suffix_values: tuple[Annotated[Text, Field(min_length=1, max_length=256)], ...] = Field((), max_length=64)
    regex_values: tuple[Regex, ...] = Field((), max_length=16)
    invert_matcher: Flag = False

    @model_validator(mode="after")
    def something_is_matched(self) -> Self:
        if not (self.prefix_values or self.exact_values or self.suffix_values or self.regex_values):
            raise ValueError("should have prefix_values, exact_values, suffix_values or regex_values")
        return self


class ValueMatcher(Value):
    """One of the values has to match."""

    unsupported = {"transformers": TRANSFORMERS}

    exact_values: tuple[HeaderText, ...] = Field((), max_length=64)
    regex_values: tuple[Regex, ...] = Field((), max_length=16)

    @model_validator(mode="after")
    def something_is_matched(self) -> Self:
        if not self.exact_values and not self.regex_values:
            raise ValueError("should have exact_values or regex_values")
        return self


class HeaderMatcher(Value):
    choices = (Choice("match", ("check_present", "check_not_present", "item", "presence"), required=True),)

    name: LookedUpHeaderName
    check_present: Empty | None = None
    check_not_present: Empty | None = None
    item: ValueMatcher | None = None
    presence: Flag | None = None
    """An older way to say `check_present`."""
    invert_matcher: Flag = False


class QueryMatcher(Value):
    choices = (Choice("match", ("check_present", "check_not_present", "item", "presence"), required=True),)
    unsupported = {"invert_matcher": "matchers of query parameters cannot be inverted"}

    key: LookedUpParameter
    check_present: Empty | None = None
    check_not_present: Empty | None = None
    item: ValueMatcher | None = None
    presence: Flag | None = None
    """An older way to say `check_present`."""


class MethodMatcher(Value):
    methods: tuple[HttpMethod, ...] = Field((), max_length=16)
    """`ANY`, or none at all, means every method."""
    invert_matcher: Flag = False


class DomainMatcher(Value):
    exact_values: tuple[DnsName, ...] = Field((), max_length=64)
    regex_values: tuple[Regex, ...] = Field((), max_length=16)

    @model_validator(mode="after")
    def something_is_matched(self) -> Self:
        if not self.exact_values and not self.regex_values:
            raise ValueError("should have exact_values or regex_values")
        return self


class RuleSpec(Value):
    """All conditions must hold; those that are absent hold always."""

    choices = (
        Choice(
            "client_choice",
            ("any_client", "client_name", "client_name_matcher", "client_selector"),
            default="any_client",
            refused={"ip_threat_category_list": "IP reputation is not supported"},
        ),
        Choice("ip_choice", ("any_ip", "ip_prefix_list"), default="any_ip", refused={"ip_matcher": SETS}),
        Choice("asn_choice", off=("any_asn",), refused={"asn_list": ASN, "asn_matcher": ASN, "asn_set": ASN}),
        Choice(
            "tls_fingerprint_choice",
            refused={"tls_fingerprint_matcher": FINGERPRINTS, "ja4_tls_fingerprint": FINGERPRINTS},
        ),
        Choice("country_choice", off=("any_country",), refused={"country_list": "countries are not supported"}),
    )
    unsupported = {
        "api_group_matcher": "API groups are not supported",
        "arg_matchers": BODIES,
        "body_matcher": BODIES,
        "bot_action": Unless("bot defense is not supported", ({"none": {}}, {"bot_skip_processing": {}})),
        "challenge_action": Unless("challenges are not supported", ("DEFAULT_CHALLENGE",)),
        "client_role": "roles of clients are not supported",
        "content_rewrite_action": "rewriting is not supported",
        "cookie_matchers": "is not supported: match the header cookie",
        "expiration_timestamp": "expiring rules are not supported",
        "forwarding_class": "forwarding classes are not supported",
        "goto_policy": "jumps between policies are not supported",
        "jwt_claims": "JWT validation is not supported",
        "l4_dest_matcher": "destinations are not matched",
        "label_matcher": "is not supported: give client_selector or client_pod_selector",
        "mum_action": Unless("malicious user mitigation is not supported", ({"default": {}}, {"skip_processing": {}})),
        "port_matcher": "ports are not matched",
        "rate_limiter": "rate limits are not supported",
        "request_constraints": "constraints on requests are not supported",
        "scheme": "schemes are not matched",
        "segment_policy": "network segments are not supported",
        "server_name": SERVERS,
        "server_name_matcher": SERVERS,
        "server_selector": SERVERS,
        "shape_protected_endpoint_action": "bot defense is not supported",
        "threat_mesh_action": "threat mesh is not supported",
        "url_matcher": "is not supported: give path and domain_matcher",
        "user_identity_matcher": "user identification is not supported",
        "virtual_host_matcher": SERVERS,
        "waf_action": Unless("WAF is not supported", ({"none": {}},)),
    }

    action: Action = "DENY"
    any_client: Empty | None = None
    client_name: Name | None = None
    """Name of the source site."""
    client_name_matcher: NameMatcher | None = None
    client_selector: LabelSelector | None = None
    """Over the labels of the source site."""
    client_pod_selector: LabelSelector | None = None
    """Over the labels of the source pod, and its namespace as `ves.io/namespace`. Unlike in the F5 XC API a field of its own, beside the
    choice of sites: whoever may label a pod cannot pass for another site."""
    any_ip: Empty | None = None
    ip_prefix_list: IpPrefixList | None = None
    path: PathMatcher | None = None
    headers: tuple[HeaderMatcher, ...] = Field((), max_length=16)
    query_params: tuple[QueryMatcher, ...] = Field((), max_length=16)
    http_method: MethodMatcher | None = None
    domain_matcher: DomainMatcher | None = None


class RuleMetadata(Value):
    unsupported = {"description_spec": "give description"}

    name: Name
    description: Text = Field("", max_length=1200)
    disable: Flag = False
    """The rule is passed over."""


class Rule(Value):
    metadata: RuleMetadata
    spec: RuleSpec


class RuleList(Value):
    rules: tuple[Rule, ...] = Field((), max_length=256)

    @model_validator(mode="after")
    def names_are_distinct(self) -> Self:
        names = [rule.metadata.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two rules are named {twice[0]}")
        return self


class PrefixList(Value):
    prefixes: tuple[Cidr, ...] = Field((), max_length=256)


class SourceList(Value):
    """Addresses of clients that an `allow_list` or `deny_list` names."""

    choices = (
        Choice(
            "default_action_choice",
            ("default_action_next_policy", "default_action_allow", "default_action_deny"),
            default="default_action_next_policy",
        ),
    )
    unsupported = {
        "asn_list": Unless(ASN, ({"as_numbers": []},)),
        "asn_set": ASN,
        "country_list": "countries are not supported",
        "ip_prefix_set": SETS,
        "ip_threat_category_list": "IP reputation is not supported",
        "tls_fingerprint_classes": FINGERPRINTS,
        "tls_fingerprint_values": FINGERPRINTS,
    }

    prefix_list: PrefixList = PrefixList()
    default_action_next_policy: Empty | None = None
    default_action_allow: Empty | None = None
    default_action_deny: Empty | None = None


class ServicePolicy(Resource):
    kind: ClassVar[str] = "service_policy"
    choices = (
        Choice("rule_choice", ("allow_all_requests", "deny_all_requests", "allow_list", "deny_list", "rule_list"), required=True),
        Choice(
            "server_choice",
            ("any_server",),
            default="any_server",
            refused=dict.fromkeys(("server_name", "server_name_matcher", "server_selector"), SERVERS),
        ),
    )
    unsupported = {"port_matcher": "ports are not matched"}

    algo: Algo = "FIRST_MATCH"
    allow_all_requests: Empty | None = None
    deny_all_requests: Empty | None = None
    allow_list: SourceList | None = None
    deny_list: SourceList | None = None
    rule_list: RuleList | None = None
    any_server: Empty | None = None
