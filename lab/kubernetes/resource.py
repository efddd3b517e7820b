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

INGRESS = Resource("networking.k8s.io", "ingresses", "Ingress", has_status=True)
SECRET = Resource("", "secrets", "Secret")
SERVICE_ACCOUNT = Resource("", "serviceaccounts", "ServiceAccount")
ROLE = Resource("rbac.authorization.k8s.io", "roles", "Role")
ROLE_BINDING = Resource("rbac.authorization.k8s.io", "rolebindings", "RoleBinding")
CLUSTER_ROLE = Resource("rbac.authorization.k8s.io", "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_ROLE_BINDING = Resource("rbac.authorization.k8s.io", "clusterrolebindings", "ClusterRoleBinding", namespaced=False)
STATEFUL_SET = Resource("apps", "statefulsets", "StatefulSet", has_status=True)
DEPLOYMENT = Resource("apps", "deployments", "Deployment", has_status=True)
JOB = Resource("batch", "jobs", "Job", has_status=True)
DISRUPTION_BUDGET = Resource("policy", "poddisruptionbudgets", "PodDisruptionBudget", has_status=True)

READ = (NAMESPACE, NODE, SERVICE, POD, ENDPOINT_SLICE, LEASE, INGRESS)
"""What agents read and write."""
APPLIED = (
    SECRET,
    SERVICE_ACCOUNT,
    ROLE,
    ROLE_BINDING,
    CLUSTER_ROLE,
    CLUSTER_ROLE_BINDING,
    STATEFUL_SET,
    DEPLOYMENT,
    JOB,
    DISRUPTION_BUDGET,
)
"""What manifests consist of besides."""
RESOURCES = (*READ, *APPLIED)
