"""Where a load balancer listens."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from controlplane.resources.base import Choice, Empty, SiteRef, Value, VirtualSiteRef, chosen
from controlplane.resources.enumeration import Names
from controlplane.resources.scalars import Ipv4, Port, PortRanges

PUBLIC_IPS = "public_ip objects are not supported: give advertise_on_public_default_vip, or a site or virtual_site of regional edges"
INTERNET_VIP = "internet VIPs are not supported"

SiteNetwork = Annotated[
    Literal["SITE_NETWORK_INSIDE_AND_OUTSIDE", "SITE_NETWORK_INSIDE", "SITE_NETWORK_OUTSIDE", "SITE_NETWORK_SERVICE"],
    Names(
        "SITE_NETWORK_INSIDE_AND_OUTSIDE",
        "SITE_NETWORK_INSIDE",
        "SITE_NETWORK_OUTSIDE",
        "SITE_NETWORK_SERVICE",
        "SITE_NETWORK_OUTSIDE_WITH_INTERNET_VIP",
        "SITE_NETWORK_INSIDE_AND_OUTSIDE_WITH_INTERNET_VIP",
        "SITE_NETWORK_IP_FABRIC",
        refused={
            "SITE_NETWORK_OUTSIDE_WITH_INTERNET_VIP": INTERNET_VIP,
            "SITE_NETWORK_INSIDE_AND_OUTSIDE_WITH_INTERNET_VIP": INTERNET_VIP,
        },
    ),
]
VipNetwork = Annotated[
    Literal["SITE_NETWORK_SPECIFIED_VIP_OUTSIDE", "SITE_NETWORK_SPECIFIED_VIP_INSIDE"],
    Names("SITE_NETWORK_SPECIFIED_VIP_OUTSIDE", "SITE_NETWORK_SPECIFIED_VIP_INSIDE"),
]


class AdvertiseSite(Value):
    site: SiteRef
    network: SiteNetwork = "SITE_NETWORK_INSIDE_AND_OUTSIDE"
    ip: Ipv4 | None = None
    """A VIP of that network."""


class AdvertiseVirtualSite(Value):
    virtual_site: VirtualSiteRef
    network: SiteNetwork = "SITE_NETWORK_INSIDE_AND_OUTSIDE"


class AdvertiseVirtualSiteWithVip(Value):
    virtual_site: VirtualSiteRef
    ip: Ipv4
    network: VipNetwork = "SITE_NETWORK_SPECIFIED_VIP_OUTSIDE"


class AdvertiseVk8sService(Value):
    """A service of the cluster in which the sites' nodes run."""

    choices = (Choice("choice", ("site", "virtual_site"), required=True),)

    site: SiteRef | None = None
    virtual_site: VirtualSiteRef | None = None


class Publish(Value):
    """A Service that leads to the load balancer, in the clusters in which the sites' nodes run: pods then call it by an ordinary name."""

    service: str = Field(max_length=63, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    namespace: str = Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """Of the cluster; it has to be there."""

    def is_named_by(self, domain: str) -> bool:
        """Whether a pod may say this domain when it means the Service."""
        names = (self.service, f"{self.service}.{self.namespace}", f"{self.service}.{self.namespace}.svc")
        if domain.startswith("*"):
            return any(name.endswith(domain[1:]) and name != domain[1:] for name in names)
        return domain in names or domain.startswith(f"{names[-1]}.")


class AdvertiseWhere(Value):
    choices = (
        Choice(
            "choice",
            ("site", "virtual_site", "virtual_site_with_vip", "vk8s_service"),
            required=True,
            refused={
                "virtual_network": "virtual networks are not supported",
                "advertise_on_public": PUBLIC_IPS,
                "segment": "network segments are not supported",
                "site_segment": "network segments are not supported",
                "virtual_site_segment": "network segments are not supported",
                "cloud_edge_segment": "network segments are not supported",
            },
        ),
        Choice("port_choice", ("use_default_port", "port", "port_ranges"), default="use_default_port"),
    )

    site: AdvertiseSite | None = None
    virtual_site: AdvertiseVirtualSite | None = None
    virtual_site_with_vip: AdvertiseVirtualSiteWithVip | None = None
    vk8s_service: AdvertiseVk8sService | None = None
    use_default_port: Empty | None = None
    """The port that the load balancer itself names."""
    port: Port | None = None
    port_ranges: PortRanges | None = None
    publish: Publish | None = None

    @model_validator(mode="after")
    def is_published_from_the_service_network(self) -> Self:
        name, place = chosen(self, "choice")
        if self.publish and name != "vk8s_service" and (place.network != "SITE_NETWORK_SERVICE" or getattr(place, "ip", None)):
            raise ValueError("publish needs SITE_NETWORK_SERVICE without an ip, or vk8s_service")
        return self


class AdvertiseCustom(Value):
    advertise_where: tuple[AdvertiseWhere, ...] = Field(min_length=1, max_length=32)

    def nameless(self, domains: Iterable[str]) -> Publish | None:
        """What is published under a name that is none of these."""
        every = (where.publish for where in self.advertise_where if where.publish)
        return next((each for each in every if not any(each.is_named_by(domain) for domain in domains)), None)


ADVERTISE_CHOICE = Choice(
    "advertise_choice",
    ("advertise_custom", "advertise_on_public_default_vip", "do_not_advertise"),
    required=True,
    refused={"advertise_on_public": PUBLIC_IPS},
)
