"""A place with nodes: a cluster, a machine outside clusters, or an edge of the operator. Its uid is the immutable id of the site."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from controlplane.resources.base import Choice, Empty, Flag, Name, Resource, Unless, Value, Whole
from controlplane.resources.enumeration import Names
from controlplane.resources.scalars import Ip, Text

SiteType = Annotated[Literal["REGIONAL_EDGE", "CUSTOMER_EDGE"], Names("INVALID", "REGIONAL_EDGE", "CUSTOMER_EDGE", "NGINX_ONE")]

TunnelType = Annotated[
    Literal["SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL", "SITE_TO_SITE_TUNNEL_IPSEC", "SITE_TO_SITE_TUNNEL_SSL"],
    Names("SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL", "SITE_TO_SITE_TUNNEL_IPSEC", "SITE_TO_SITE_TUNNEL_SSL"),
]
"""How sites may be joined directly. Between two, what both allow: IPsec if possible, otherwise TLS alone, which is in every tunnel in any case."""
ENCAPSULATIONS = {
    "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL": frozenset({"ipsec", "ssl"}),
    "SITE_TO_SITE_TUNNEL_IPSEC": frozenset({"ipsec"}),
    "SITE_TO_SITE_TUNNEL_SSL": frozenset({"ssl"}),
}
"""What each allows."""


class Coordinates(Value):
    latitude: float = Field(0, ge=-90, le=90)
    longitude: float = Field(0, ge=-180, le=180)


class SpecificRe(Value):
    primary_re: Name
    """Name of a regional edge."""


class ReSelect(Value):
    """Every customer edge is connected to two regional edges; this says how they are chosen."""

    choices = (Choice("re_selection_choice", ("geo_proximity", "specific_re"), default="geo_proximity"),)

    geo_proximity: Empty | None = None
    specific_re: SpecificRe | None = None
    """One of them is this one while it is healthy; the other is the nearest."""


class Site(Resource):
    kind: ClassVar[str] = "site"
    unsupported = {
        "site_subtype": Unless("is decided by the nodes", ("NO_SUBTYPE", "VES_IO_CE_IN_K8S")),
        "inside_nameserver": "name servers of sites are not supported",
        "inside_nameserver_v6": "name servers of sites are not supported",
        "outside_nameserver": "name servers of sites are not supported",
        "outside_nameserver_v6": "name servers of sites are not supported",
        "inside_vip_v6": "IPv6 VIPs are not supported",
        "outside_vip_v6": "IPv6 VIPs are not supported",
        "site_to_site_network_type": Unless("gateways are addressed by their nodes", ("VIRTUAL_NETWORK_SITE_LOCAL",)),
        "site_to_site_tunnel_ip": "gateways are addressed by their nodes",
        "ipsec_ssl_nodes_fqdn": "gateways are addressed by their nodes",
        "sm_connection_public_ip": "gateways are addressed by their nodes",
        "sm_connection_pvt_ip": "gateways are addressed by their nodes",
        "vip_vrrp_mode": Unless("VRRP is not supported", ("VIP_VRRP_INVALID", "VIP_VRRP_DISABLE")),
        "ce_site_mode": Unless("site modes are not supported", ("CE_SITE_MODE_INGRESS_EGRESS_GW",)),
        "bgp_peer_address": "BGP is not supported",
        "bgp_peer_address_v6": "BGP is not supported",
        "bgp_router_id": "BGP is not supported",
        "default_underlay_network": "underlay networks are not supported",
        "global_access_k8s_enabled": "a global Kubernetes API is not supported",
        "local_access_k8s_enabled": "a local Kubernetes API is not supported",
        "local_k8s_access_enabled": "a local Kubernetes API is not supported",
        "multus_enabled": "Multus is not supported",
        "vm_enabled": "virtual machines are not supported",
        "private_connectivity": "private connectivity is not supported",
        "desired_pool_count": "node pools are not supported",
        "volterra_software_overide": Unless("software is not managed from here", ("SITE_SOFTWARE_NOT_OVERRIDED",)),
        "operating_system_version": "software is not managed from here",
        "volterra_software_version": "software is not managed from here",
    }
    ignored = frozenset(
        {
            "connected_re",
            "connected_re_for_config",
            "main_nodes",
            "site_state",
        }
    )

    site_type: SiteType = "CUSTOMER_EDGE"
    address: Text = Field("", max_length=256)
    region: Text = Field("", max_length=256)
    coordinates: Coordinates | None = None
    inside_vip: Ip | None = None
    outside_vip: Ip | None = None
    tunnel_type: TunnelType = "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL"
    tunnel_dead_timeout: Whole = Field(0, ge=0, le=180_000)
    """Milliseconds; 0 means 10,000. For so long nothing is heard in an IPsec tunnel before it is given up and built anew."""
    re_select: ReSelect | None = None
    drain: Flag = False
    """Take traffic away without failing a request: from a regional edge, or from the services of a customer edge. Unlike in the F5 XC API."""

    @property
    def is_edge(self) -> bool:
        """Whether it is a regional edge: run by the operator, shared by tenants."""
        return self.site_type == "REGIONAL_EDGE"

    @model_validator(mode="after")
    def edges_are_not_connected_to_edges(self) -> Self:
        if self.is_edge and self.re_select is not None:
            raise ValueError("re_select is for customer edges: this is a regional edge")
        return self
