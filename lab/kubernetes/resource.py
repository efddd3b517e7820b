"""The kinds that the emulator knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    group: str
    """Empty for the core group."""
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False
    """Its status is a subresource: writes of the object leave it alone."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def base(self) -> str:
        """Path of the group and version."""
        return f"/apis/{self.group}/v1" if self.group else "/api/v1"


NAMESPACE = Resource("", "namespaces", "Namespace", namespaced=False)
NODE = Resource("", "nodes", "Node", namespaced=False, has_status=True)
SERVICE = Resource("", "services", "Service", has_status=True)
POD = Resource("", "pods", "Pod", has_status=True)
ENDPOINT_SLICE = Resource("discovery.k8s.io", "endpointslices", "EndpointSlice")
LEASE = Resource("coordination.k8s.io", "leases", "Lease")

RESOURCES = (NAMESPACE, NODE, SERVICE, POD, ENDPOINT_SLICE, LEASE)
