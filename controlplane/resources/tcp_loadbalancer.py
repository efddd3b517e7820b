"""What applications call by TCP: a port, pools, and where it is advertised."""

from typing import ClassVar

from pydantic import Field

from controlplane.resources.advertise import ADVERTISE_CHOICE, AdvertiseCustom
from controlplane.resources.base import Choice, Empty, Resource, Whole
from controlplane.resources.http_loadbalancer import DNS, SERVICE_POLICY_CHOICE, ActiveServicePolicies
from controlplane.resources.lost_sites import LOST_SITES_CHOICE
from controlplane.resources.route import RETRACTION, PoolWithWeight
from controlplane.resources.scalars import Domain, Port, PortRanges

SNI = "SNI is not supported for TCP load balancers"
TLS = "TLS is not supported for TCP load balancers"


class TcpLoadBalancer(Resource):
    kind: ClassVar[str] = "tcp_loadbalancer"
    choices = (
        Choice("port_choice", ("listen_port", "port_ranges"), required=True),
        Choice("sni_choice", ("no_sni",), default="no_sni", refused={"sni": SNI, "default_lb_with_sni": SNI}),
        Choice("loadbalancer_type", ("tcp",), default="tcp", refused={"tls_tcp": TLS, "tls_tcp_auto_cert": TLS}),
        ADVERTISE_CHOICE,
        Choice(
            "hash_policy_choice",
            (
                "hash_policy_choice_round_robin",
                "hash_policy_choice_least_active",
                "hash_policy_choice_random",
                "hash_policy_choice_source_ip_stickiness",
            ),
            default="hash_policy_choice_round_robin",
        ),
        Choice("cluster_retract_choice", ("retract_cluster",), default="retract_cluster", refused={"do_not_retract_cluster": RETRACTION}),
        SERVICE_POLICY_CHOICE,
        LOST_SITES_CHOICE,
    )
    unsupported = {"dns_volterra_managed": DNS, "origin_pools": "give origin_pools_weights"}
    ignored = frozenset(
        {
            "auto_cert_info",
            "cert_state",
            "dns_info",
            "downstream_tls_certificate_expiration_timestamps",
            "host_name",
            "internet_vip_info",
            "state",
        }
    )

    domains: tuple[Domain, ...] = Field((), max_length=32)
    """Names under which clients know it; a connection carries none."""
    listen_port: Port | None = None
    port_ranges: PortRanges | None = None
    no_sni: Empty | None = None
    tcp: Empty | None = None
    advertise_custom: AdvertiseCustom | None = None
    advertise_on_public_default_vip: Empty | None = None
    """On all regional edges."""
    do_not_advertise: Empty | None = None
    origin_pools_weights: tuple[PoolWithWeight, ...] = Field(min_length=1, max_length=16)
    hash_policy_choice_round_robin: Empty | None = None
    hash_policy_choice_least_active: Empty | None = None
    hash_policy_choice_random: Empty | None = None
    hash_policy_choice_source_ip_stickiness: Empty | None = None
    retract_cluster: Empty | None = None
    service_policies_from_namespace: Empty | None = None
    no_service_policies: Empty | None = None
    active_service_policies: ActiveServicePolicies | None = None
    deprioritize_lost_sites: Empty | None = None
    """Origins at sites of which nothing is heard are used where no others are left; `evict_lost_sites`: not at all, `keep_lost_sites`: as ever."""
    evict_lost_sites: Empty | None = None
    keep_lost_sites: Empty | None = None
    idle_timeout: Whole = Field(0, ge=0, le=86_400_000)
    """Milliseconds; 0 means 3,600,000."""
