"""Where traffic may go."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from controlplane.resources.base import Choice, Empty, Flag, HealthcheckRef, Resource, SiteRef, Unless, Value, VirtualSiteRef, Whole
from controlplane.resources.enumeration import Names
from controlplane.resources.scalars import DnsName, Ip, Port, RefreshInterval, ServiceName
from controlplane.resources.tls import CertificateChain, OriginTlsConfig, TlsCertificate

Algorithm = Annotated[
    Literal["ROUND_ROBIN", "LEAST_REQUEST", "RING_HASH", "RANDOM", "LB_OVERRIDE"],
    Names("ROUND_ROBIN", "LEAST_REQUEST", "RING_HASH", "RANDOM", "LB_OVERRIDE"),
]
EndpointSelection = Annotated[
    Literal["DISTRIBUTED", "LOCAL_ONLY", "LOCAL_PREFERRED"], Names("DISTRIBUTED", "LOCAL_ONLY", "LOCAL_PREFERRED")
]
Priority = Annotated[Literal["DEFAULT", "HIGH"], Names("DEFAULT", "HIGH")]

SUBSETS = "endpoint subsets are not supported"
PROXY_PROTOCOL = "the PROXY protocol is not supported"
SEGMENTS = "network segments are not supported"
VIRTUAL_NETWORKS = "virtual networks are not supported"
SNAT = Unless("SNAT pools are not supported", ({"no_snat_pool": {}}, {"no_snat_pool": {}, "snat_pool": {}}))


class SiteLocator(Value):
    choices = (Choice("choice", ("site", "virtual_site"), required=True),)

    site: SiteRef | None = None
    virtual_site: VirtualSiteRef | None = None


class K8sService(Value):
    """A service of the Kubernetes clusters that the site discovered."""

    choices = (
        Choice("network_choice", ("inside_network", "outside_network", "vk8s_networks"), default="inside_network"),
        Choice("service_info", ("service_name",), required=True, refused={"service_selector": "give the service's name"}),
    )
    unsupported = {
        "protocol": Unless("only TCP is supported", ("PROTOCOL_TCP",)),
        "snat_pool": SNAT,
    }

    service_name: ServiceName | None = None
    """`<service>.<namespace>` or `<service>.<namespace>:<cluster id>`."""
    site_locator: SiteLocator
    inside_network: Empty | None = None
    outside_network: Empty | None = None
    vk8s_networks: Empty | None = None
    """The service network of the cluster in which the site's nodes run."""


class PrivateIp(Value):
    """An address that the site can reach."""

    choices = (
        Choice("network_choice", ("inside_network", "outside_network"), default="inside_network", refused={"segment": SEGMENTS}),
        Choice("private_ip_choice", ("ip",), required=True, refused={"ipv6": "give the address as ip"}),
    )
    unsupported = {"snat_pool": SNAT}

    ip: Ip | None = None
    site_locator: SiteLocator
    inside_network: Empty | None = None
    outside_network: Empty | None = None


class PrivateName(Value):
    """A name that the site can resolve."""

    choices = (Choice("network_choice", ("inside_network", "outside_network"), default="inside_network", refused={"segment": SEGMENTS}),)
    unsupported = {"snat_pool": SNAT}

    dns_name: DnsName
    refresh_interval: RefreshInterval = 0
    site_locator: SiteLocator
    inside_network: Empty | None = None
    outside_network: Empty | None = None


class PublicIp(Value):
    """An address that every site can reach."""

    choices = (Choice("public_ip_choice", ("ip",), required=True, refused={"ipv6": "give the address as ip"}),)

    ip: Ip | None = None


class PublicName(Value):
    dns_name: DnsName
    refresh_interval: RefreshInterval = 0


class OriginServer(Value):
    choices = (
        Choice(
            "choice",
            ("k8s_service", "private_ip", "private_name", "public_ip", "public_name"),
            required=True,
            refused={
                "consul_service": "Consul is not supported",
                "custom_endpoint_object": "endpoint objects are not supported",
                "vn_private_ip": VIRTUAL_NETWORKS,
                "vn_private_name": VIRTUAL_NETWORKS,
                "cbip_service": "BIG-IP services are not supported",
                "srv6_private_ip": VIRTUAL_NETWORKS,
                "srv6_private_name": VIRTUAL_NETWORKS,
                "third_party_service": "services discovered by third parties are not supported",
            },
        ),
    )

    k8s_service: K8sService | None = None
    private_ip: PrivateIp | None = None
    private_name: PrivateName | None = None
    public_ip: PublicIp | None = None
    public_name: PublicName | None = None
    labels: dict[str, str] = Field({}, max_length=16)
    """Shown to readers; subsets are not supported."""


class UseServerVerification(Value):
    choices = (
        Choice(
            "trusted_ca_choice",
            ("trusted_ca_url",),
            required=True,
            refused={"trusted_ca": "trusted_ca_list objects are not supported: give trusted_ca_url"},
        ),
    )

    trusted_ca_url: CertificateChain | None = None


class UseMtls(Value):
    tls_certificates: tuple[TlsCertificate, ...] = Field(min_length=1, max_length=1)


class UseTls(Value):
    """TLS from the site to the origin server."""

    choices = (
        Choice("sni_choice", ("use_host_header_as_sni", "sni", "disable_sni"), default="use_host_header_as_sni"),
        Choice(
            "server_validation_choice",
            ("volterra_trusted_ca", "skip_server_verification", "use_server_verification"),
            default="volterra_trusted_ca",
        ),
        Choice(
            "mtls_choice",
            ("no_mtls", "use_mtls"),
            default="no_mtls",
            refused={"use_mtls_obj": "certificate objects are not supported: give use_mtls"},
        ),
        Choice(
            "max_session_keys_type",
            off=("default_session_key_caching",),
            refused={
                "disable_session_key_caching": "session keys are always cached",
                "max_session_keys": "the number of cached session keys cannot be set",
            },
        ),
    )

    tls_config: OriginTlsConfig
    use_host_header_as_sni: Empty | None = None
    sni: DnsName | None = None
    disable_sni: Empty | None = None
    volterra_trusted_ca: Empty | None = None
    """The public authorities that the node's system trusts."""
    skip_server_verification: Empty | None = None
    use_server_verification: UseServerVerification | None = None
    no_mtls: Empty | None = None
    use_mtls: UseMtls | None = None


class CircuitBreaker(Value):
    """Limits of each site; absent ones stay at the proxy's default."""

    connection_limit: Whole | None = Field(None, ge=0, le=32_768)
    max_requests: Whole | None = Field(None, ge=0, le=32_768)
    pending_requests: Whole | None = Field(None, ge=0, le=32_768)
    retries: Whole | None = Field(None, ge=0, le=32_768)
    priority: Priority = "DEFAULT"


class OutlierDetection(Value):
    consecutive_5xx: Whole = Field(5, ge=0, le=1024)
    consecutive_gateway_failure: Whole = Field(5, ge=0, le=1024)
    interval: Whole = Field(10_000, ge=1, le=1_800_000)
    """Milliseconds, as is `base_ejection_time`."""
    base_ejection_time: Whole = Field(30_000, ge=1, le=1_800_000)
    max_ejection_percent: Whole = Field(10, ge=0, le=100)


class Http1Config(Value):
    unsupported = {
        "header_transformation": Unless(
            "header transformations are not supported",
            ({"default_header_transformation": {}}, {"legacy_header_transformation": {}}),
        )
    }


class Http2Options(Value):
    enabled: Flag = False


class AdvancedOptions(Value):
    choices = (
        Choice(
            "circuit_breaker_choice",
            ("default_circuit_breaker", "circuit_breaker", "disable_circuit_breaker"),
            default="default_circuit_breaker",
        ),
        Choice("outlier_detection_choice", ("disable_outlier_detection", "outlier_detection"), default="disable_outlier_detection"),
        Choice("panic_threshold_type", ("no_panic_threshold", "panic_threshold"), default="no_panic_threshold"),
        Choice("subset_choice", off=("disable_subsets",), refused={"enable_subsets": SUBSETS}),
        Choice("http_protocol_type", ("auto_http_config", "http1_config", "http2_options"), default="auto_http_config"),
        Choice(
            "proxy_protocol_choice",
            off=("disable_proxy_protocol",),
            refused={"proxy_protocol_v1": PROXY_PROTOCOL, "proxy_protocol_v2": PROXY_PROTOCOL},
        ),
        Choice(
            "lb_source_ip_persistance_choice",
            off=("disable_lb_source_ip_persistance", "disable_lb_source_ip_persistence"),
            refused={
                "enable_lb_source_ip_persistance": "source address persistence is not supported",
                "enable_lb_source_ip_persistence": "source address persistence is not supported",
            },
        ),
    )
    unsupported = {"header_transformation_type": "header transformations are not supported"}

    connection_timeout: Whole = Field(0, ge=0, le=1_800_000)
    """Milliseconds; 0 means 2,000."""
    http_idle_timeout: Whole = Field(0, ge=0, le=600_000)
    """Milliseconds; 0 means 300,000."""
    default_circuit_breaker: Empty | None = None
    circuit_breaker: CircuitBreaker | None = None
    disable_circuit_breaker: Empty | None = None
    disable_outlier_detection: Empty | None = None
    outlier_detection: OutlierDetection | None = None
    no_panic_threshold: Empty | None = None
    panic_threshold: Whole | None = Field(None, ge=1, le=100)
    """Percent."""
    auto_http_config: Empty | None = None
    http1_config: Http1Config | None = None
    http2_options: Http2Options | None = None


class ConnPoolReuse(Value):
    choices = (Choice("upstream_conn_pool_reuse", ("enable_conn_pool_reuse", "disable_conn_pool_reuse"), default="enable_conn_pool_reuse"),)

    enable_conn_pool_reuse: Empty | None = None
    disable_conn_pool_reuse: Empty | None = None


class OriginPool(Resource):
    kind: ClassVar[str] = "origin_pool"
    choices = (
        Choice(
            "port_choice",
            ("port",),
            required=True,
            refused={
                "automatic_port": "automatic ports are not supported: give port",
                "lb_port": "the load balancer's port is not supported: give port",
            },
        ),
        Choice("health_check_port_choice", ("same_as_endpoint_port", "health_check_port"), default="same_as_endpoint_port"),
        Choice("tls_choice", ("no_tls", "use_tls"), default="no_tls"),
    )
    unsupported = {"view_internal": "is not supported"}

    origin_servers: tuple[OriginServer, ...] = Field(min_length=1, max_length=32)
    port: Port | None = None
    loadbalancer_algorithm: Algorithm = "ROUND_ROBIN"
    endpoint_selection: EndpointSelection = "DISTRIBUTED"
    healthcheck: tuple[HealthcheckRef, ...] = Field((), max_length=4)
    same_as_endpoint_port: Empty | None = None
    health_check_port: Port | None = None
    no_tls: Empty | None = None
    use_tls: UseTls | None = None
    upstream_conn_pool_reuse_type: ConnPoolReuse | None = None
    advanced_options: AdvancedOptions | None = None

    @model_validator(mode="after")
    def origin_servers_are_distinct(self) -> Self:
        if len({server.model_dump_json(exclude={"labels"}) for server in self.origin_servers}) < len(self.origin_servers):
            raise ValueError("origin_servers lists the same one twice")
        return self

    @property
    def names_certificates(self) -> bool:
        """Whether it is known without a Host header whose certificates origin servers have to show, if they have to show any."""
        tls = self.use_tls
        by_name = all(server.private_name or server.public_name for server in self.origin_servers)
        return tls is None or tls.skip_server_verification is not None or tls.sni is not None or by_name
