"""How a site finds services in Kubernetes clusters other than the one in which its nodes run."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from controlplane.resources.base import Choice, Empty, Flag, Name, Resource, SiteRef, Value, VirtualSiteRef
from controlplane.resources.enumeration import Names
from controlplane.resources.scalars import DnsName, Port, Regex, ServiceName, is_port
from controlplane.resources.secrets import Secret
from controlplane.resources.tls import CertificateChain

NETWORKS = "only the site's own networks are supported"
INTERNET_VIP = "internet VIPs are not supported"
PUBLISHING = "publishing is not supported yet"

NetworkType = Annotated[
    Literal["VIRTUAL_NETWORK_SITE_LOCAL", "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE", "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE_OUTSIDE"],
    Names(
        "VIRTUAL_NETWORK_SITE_LOCAL",
        "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE",
        "VIRTUAL_NETWORK_PER_SITE",
        "VIRTUAL_NETWORK_PUBLIC",
        "VIRTUAL_NETWORK_GLOBAL",
        "VIRTUAL_NETWORK_SITE_SERVICE",
        "VIRTUAL_NETWORK_VER_INTERNAL",
        "VIRTUAL_NETWORK_SITE_LOCAL_INSIDE_OUTSIDE",
        "VIRTUAL_NETWORK_IP_AUTO",
        "VIRTUAL_NETWORK_VOLTADN_PRIVATE_NETWORK",
        "VIRTUAL_NETWORK_SRV6_NETWORK",
        "VIRTUAL_NETWORK_IP_FABRIC",
        "VIRTUAL_NETWORK_SEGMENT",
    ),
]


class _Place(Value):
    choices = (Choice("internet_vip_choice", off=("disable_internet_vip",), refused={"enable_internet_vip": INTERNET_VIP}),)

    network_type: NetworkType = "VIRTUAL_NETWORK_SITE_LOCAL"


class SitePlace(_Place):
    ref: tuple[SiteRef, ...] = Field(min_length=1, max_length=1)


class VirtualSitePlace(_Place):
    ref: tuple[VirtualSiteRef, ...] = Field(min_length=1, max_length=1)


class Where(Value):
    """Whose agents discover."""

    choices = (Choice("ref_or_selector", ("site", "virtual_site"), required=True, refused={"virtual_network": NETWORKS}),)

    site: SitePlace | None = None
    virtual_site: VirtualSitePlace | None = None


def _api_server(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not is_port(port) or re.search(r"[\s/@?#]", host):
        raise ValueError("should be host:port")
    return text


class TlsInfo(Value):
    unsupported = {"ca_certificate_objects": "certificate objects are not supported"}

    server_name: DnsName | None = None
    certificate: CertificateChain | None = None
    """Of the client."""
    key_url: Secret | None = None
    trusted_ca_url: CertificateChain | None = None


class ConnectionInfo(Value):
    api_server: Annotated[str, Field(max_length=262), AfterValidator(_api_server)]
    """`host:port`."""
    tls_info: TlsInfo | None = None


def _in_no_cluster(text: str) -> str:
    if ":" in text:
        raise ValueError("should be <service>.<namespace>: it is in the cluster that is discovered")
    return text


class IngressController(Value):
    service_name: Annotated[ServiceName, AfterValidator(_in_no_cluster)]
    """`service.namespace` of the controller's own Service."""
    port: Port = 80
    """Of that Service."""
    ingress_class: Name | None = None
    """Only Ingresses of this class say which hosts lead to which services; without it, all do."""


class AccessInfo(Value):
    choices = (
        Choice("config_type", ("kubeconfig_url", "connection_info", "in_cluster"), required=True),
        Choice("pod_network", ("isolated", "reachable", "cluster_ip", "ingress_controller"), default="isolated"),
    )

    kubeconfig_url: Secret | None = None
    connection_info: ConnectionInfo | None = None
    in_cluster: Flag | None = None
    isolated: Empty | None = None
    """Pods cannot be reached from the site, so services are called through their node ports."""
    reachable: Empty | None = None
    """Pods are called at their own addresses."""
    cluster_ip: Empty | None = None
    """Services are called at their cluster IPs, where those are routed to the cluster."""
    ingress_controller: IngressController | None = None
    """HTTP services are called through an ingress controller of the cluster, at its load balancer or node port, under the hosts of their Ingresses."""


class PublishInfo(Value):
    choices = (
        Choice(
            "publish_choice",
            ("disable",),
            default="disable",
            refused=dict.fromkeys(("publish", "publish_fqdns", "dns_delegation"), PUBLISHING),
        ),
    )

    disable: Empty | None = None


class NamespaceMap(Value):
    namespace_regex: Regex
    namespace: Name
    """Namespaces whose objects may use what was found where the expression matches."""


class NamespaceMapping(Value):
    items: tuple[NamespaceMap, ...] = Field(min_length=1, max_length=32)


class DiscoveryK8s(Value):
    choices = (Choice("namespace_mapping_choice", ("default_all", "namespace_mapping"), default="default_all"),)

    access_info: AccessInfo
    publish_info: PublishInfo | None = None
    default_all: Empty | None = None
    namespace_mapping: NamespaceMapping | None = None


class Discovery(Resource):
    kind: ClassVar[str] = "discovery"
    choices = (
        Choice(
            "discovery_choice",
            ("discovery_k8s",),
            required=True,
            refused={
                "discovery_consul": "Consul is not supported",
                "discovery_cbip": "BIG-IP is not supported",
                "discovery_third_party": "discovery by third parties is not supported",
            },
        ),
        Choice("cluster_identifier_choice", ("no_cluster_id", "cluster_id"), default="no_cluster_id"),
    )

    where: Where
    discovery_k8s: DiscoveryK8s | None = None
    no_cluster_id: Empty | None = None
    cluster_id: str | None = Field(None, max_length=63, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
    """Makes names of services unique: `service.namespace:cluster-id`."""
