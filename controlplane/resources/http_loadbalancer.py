"""What applications call by HTTP: domains, routes, pools, and where it is advertised."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from controlplane.resources.advertise import ADVERTISE_CHOICE, AdvertiseCustom
from controlplane.resources.base import Choice, Empty, Flag, Resource, ServicePolicyRef, Unless, Value, Whole
from controlplane.resources.headers import UNSUPPORTED_COOKIES, HeaderEdits
from controlplane.resources.lost_sites import LOST_SITES_CHOICE
from controlplane.resources.route import CookieForHashing, HashPolicies, PoolWithWeight, Route
from controlplane.resources.scalars import Domain, Port, PortRanges
from controlplane.resources.tls import TlsCertificate, TlsConfig

DNS = "DNS is not managed from here"
MTLS = "client certificates are not supported"
WAF = "WAF is not supported"
BOTS = "bot defense is not supported"
API_SECURITY = "API security is not supported"
CHALLENGES = "challenges are not supported"
DDOS = "DDoS mitigation is not supported"
MALICIOUS_USERS = "malicious user detection is not supported"
RATE_LIMITS = "rate limits are not supported"


class Http(Value):
    choices = (Choice("port_choice", ("port", "port_ranges"), default="port", value=80),)
    unsupported = {"dns_volterra_managed": DNS}

    port: Port | None = None
    port_ranges: PortRanges | None = None


class TlsParameters(Value):
    choices = (Choice("mtls_choice", off=("no_mtls",), refused={"use_mtls": MTLS}),)

    tls_certificates: tuple[TlsCertificate, ...] = Field(min_length=1, max_length=16)
    tls_config: TlsConfig = TlsConfig(default_security=Empty())


class Https(Value):
    choices = (
        Choice("port_choice", ("port", "port_ranges"), default="port", value=443),
        Choice(
            "tls_certificates_choice",
            ("tls_parameters",),
            required=True,
            refused={"tls_cert_params": "certificate objects are not supported: give tls_parameters"},
        ),
        Choice(
            "server_header_choice",
            off=("default_header",),
            refused=dict.fromkeys(("server_name", "append_server_name", "pass_through"), "the Server header cannot be set"),
        ),
        Choice("path_normalize_choice", off=("enable_path_normalize",), refused={"disable_path_normalize": "paths are always normalised"}),
        Choice("default_lb_choice", off=("non_default_loadbalancer",), refused={"default_loadbalancer": "give the domain * instead"}),
    )
    unsupported = {
        "connection_idle_timeout": Unless("is not supported: give more_option.idle_timeout", (120_000,)),
        "http_protocol_options": Unless("HTTP/1.1 and HTTP/2 are always offered", ({"http_protocol_enable_v1_v2": {}},)),
        "coalescing_options": Unless("coalescing cannot be changed", ({"default_coalescing": {}},)),
    }

    port: Port | None = None
    port_ranges: PortRanges | None = None
    http_redirect: Flag = False
    """Port 80 of the same places redirects here."""
    add_hsts: Flag = False
    tls_parameters: TlsParameters | None = None


class DefaultPoolList(Value):
    pools: tuple[PoolWithWeight, ...] = Field((), max_length=8)


class ActiveServicePolicies(Value):
    policies: tuple[ServicePolicyRef, ...] = Field(min_length=1, max_length=16)
    """In the order of evaluation."""


SERVICE_POLICY_CHOICE = Choice(
    "service_policy_choice",
    ("service_policies_from_namespace", "no_service_policies", "active_service_policies"),
    default="service_policies_from_namespace",
)


class MoreOption(HeaderEdits):
    choices = (
        Choice("path_normalize_choice", off=("enable_path_normalize",), refused={"disable_path_normalize": "paths are always normalised"}),
    )
    unsupported = {
        **UNSUPPORTED_COOKIES,
        "custom_errors": "custom error pages are not supported",
        "buffer_policy": "buffering is not supported",
        "compression_params": "compression is not supported",
        "cookies_to_modify": "edits of cookies are not supported",
        "javascript_info": "JavaScript challenges are not supported",
    }
    ignored = frozenset({"disable_default_error_pages"})

    max_request_header_size: Whole = Field(0, ge=0, le=96)
    """KiB; 0 means 60."""
    idle_timeout: Whole = Field(0, ge=0, le=3_600_000)
    """Milliseconds without activity after which a request is given up; 0 means the proxy's default."""


class SingleLbApp(Value):
    """That nothing is learned from traffic."""

    choices = (
        Choice("api_discovery_choice", off=("disable_discovery",), refused={"enable_discovery": API_SECURITY}),
        Choice("ddos_detection_choice", off=("disable_ddos_detection",), refused={"enable_ddos_detection": DDOS}),
        Choice(
            "malicious_user_detection_choice",
            off=("disable_malicious_user_detection",),
            refused={"enable_malicious_user_detection": MALICIOUS_USERS},
        ),
    )


class HttpLoadBalancer(Resource):
    kind: ClassVar[str] = "http_loadbalancer"
    choices = (
        Choice(
            "loadbalancer_type",
            ("http", "https"),
            required=True,
            refused={"https_auto_cert": "automatic certificates are not supported: give https with tls_parameters"},
        ),
        ADVERTISE_CHOICE,
        Choice(
            "hash_policy_choice",
            ("round_robin", "least_active", "random", "source_ip_stickiness", "cookie_stickiness", "ring_hash"),
            default="round_robin",
        ),
        Choice(
            "origin_pool_choice",
            ("default_route_pools", "default_pool_list"),
            refused={"default_pool": "inline pools are not supported: create an origin_pool and give default_route_pools"},
        ),
        SERVICE_POLICY_CHOICE,
        LOST_SITES_CHOICE,
        Choice("waf_choice", off=("disable_waf",), refused={"app_firewall": WAF}),
        Choice("rate_limit_choice", off=("disable_rate_limit",), refused={"rate_limit": RATE_LIMITS, "api_rate_limit": RATE_LIMITS}),
        Choice(
            "challenge_type",
            off=("no_challenge",),
            refused=dict.fromkeys(("js_challenge", "captcha_challenge", "policy_based_challenge", "enable_challenge"), CHALLENGES),
        ),
        Choice("user_id_choice", off=("user_id_client_ip",), refused={"user_identification": "user identification is not supported"}),
        Choice("api_discovery_choice", off=("disable_api_discovery",), refused={"enable_api_discovery": API_SECURITY}),
        Choice("api_definition_choice", off=("disable_api_definition",), refused={"api_specification": API_SECURITY}),
        Choice("api_testing_choice", off=("disable_api_testing",), refused={"api_testing": API_SECURITY}),
        Choice("bot_defense_choice", off=("disable_bot_defense",), refused={"bot_defense": BOTS, "bot_defense_advanced": BOTS}),
        Choice("cache_options", off=("disable_caching",), refused={"caching_policy": "caching is not supported"}),
        Choice(
            "client_side_defense_choice",
            off=("disable_client_side_defense",),
            refused={"client_side_defense": "client-side defense is not supported"},
        ),
        Choice("ip_reputation_choice", off=("disable_ip_reputation",), refused={"enable_ip_reputation": "IP reputation is not supported"}),
        Choice(
            "malicious_user_detection_choice",
            off=("disable_malicious_user_detection",),
            refused={"enable_malicious_user_detection": MALICIOUS_USERS},
        ),
        Choice(
            "malware_protection",
            off=("disable_malware_protection",),
            refused={"malware_protection_settings": "malware protection is not supported"},
        ),
        Choice("threat_mesh_choice", off=("disable_threat_mesh",), refused={"enable_threat_mesh": "threat mesh is not supported"}),
        Choice(
            "trust_client_ip_headers_choice",
            off=("disable_trust_client_ip_headers",),
            refused={"enable_trust_client_ip_headers": "addresses in headers of clients are not trusted"},
        ),
        Choice(
            "slow_ddos_mitigation_choice",
            off=("system_default_timeouts",),
            refused={"slow_ddos_mitigation": DDOS},
        ),
        Choice(
            "l7_ddos_auto_mitigation_action",
            off=("l7_ddos_action_default",),
            refused=dict.fromkeys(("l7_ddos_action_block", "l7_ddos_action_js_challenge"), DDOS),
        ),
        Choice("ml_config_choice", ("single_lb_app",), off=("multi_lb_app",)),
        Choice(
            "sensitive_data_policy_choice",
            off=("default_sensitive_data_policy",),
            refused={"sensitive_data_policy": "sensitive data policies are not supported"},
        ),
    )
    unsupported = {
        "cors_policy": "CORS policies are not supported",
        "csrf_policy": "CSRF policies are not supported",
        "graphql_rules": API_SECURITY,
        "api_protection_rules": API_SECURITY,
        "data_guard_rules": WAF,
        "waf_exclusion_rules": WAF,
        "waf_exclusion": WAF,
        "ddos_mitigation_rules": DDOS,
        "l7_ddos_protection": DDOS,
        "blocked_clients": "is not supported: give active_service_policies",
        "trusted_clients": "is not supported: give active_service_policies",
        "protected_cookies": "protection of cookies is not supported",
        "jwt_validation": "JWT validation is not supported",
        "origin_server_subset_rule_list": "endpoint subsets are not supported",
        "sensitive_data_disclosure_rules": "sensitive data policies are not supported",
        "proxy": "is not supported",
    }
    ignored = frozenset(
        {
            "add_location",
            "auto_cert_error_msg",
            "auto_cert_info",
            "auto_cert_state",
            "auto_cert_subject",
            "auto_cert_issuer",
            "auto_cert_expiry",
            "cert_state",
            "dns_info",
            "downstream_tls_certificate_expiration_timestamps",
            "host_name",
            "internet_vip_info",
            "state",
        }
    )

    domains: tuple[Domain, ...] = Field(min_length=1, max_length=32)
    http: Http | None = None
    https: Https | None = None
    advertise_custom: AdvertiseCustom | None = None
    advertise_on_public_default_vip: Empty | None = None
    """On all regional edges."""
    do_not_advertise: Empty | None = None
    default_route_pools: tuple[PoolWithWeight, ...] | None = Field(None, max_length=8)
    """Where requests go that no route matches; `default_pool_list` is another way to say it."""
    default_pool_list: DefaultPoolList | None = None
    routes: tuple[Route, ...] = Field((), max_length=256)
    """The first one that matches is taken."""
    round_robin: Empty | None = None
    least_active: Empty | None = None
    random: Empty | None = None
    source_ip_stickiness: Empty | None = None
    cookie_stickiness: CookieForHashing | None = None
    ring_hash: HashPolicies | None = None
    service_policies_from_namespace: Empty | None = None
    """Namespaces have no active policies, so none applies."""
    no_service_policies: Empty | None = None
    active_service_policies: ActiveServicePolicies | None = None
    deprioritize_lost_sites: Empty | None = None
    """Origins at sites of which nothing is heard are used where no others are left; `evict_lost_sites`: not at all, `keep_lost_sites`: as ever."""
    evict_lost_sites: Empty | None = None
    keep_lost_sites: Empty | None = None
    single_lb_app: SingleLbApp | None = None
    more_option: MoreOption | None = None

    @model_validator(mode="after")
    def domains_are_distinct(self) -> Self:
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("domains lists the same name twice")
        return self

    @model_validator(mode="after")
    def is_published_under_its_domains(self) -> Self:
        if self.advertise_custom and (lost := self.advertise_custom.nameless(self.domains)):
            name = f"{lost.service}.{lost.namespace}"
            raise ValueError(f"domains has no name by which pods call what is published, such as {name} or {name}.svc.cluster.local")
        return self

    @property
    def default_pools(self) -> tuple[PoolWithWeight, ...]:
        """In whichever way they were given."""
        return self.default_pool_list.pools if self.default_pool_list else self.default_route_pools or ()
