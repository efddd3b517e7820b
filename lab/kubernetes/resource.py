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
    version: str = "v1"
    is_custom: bool = False
    """It is served while there is a CustomResourceDefinition for it."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def base(self) -> str:
        """Path of the group and version."""
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"

    @property
    def definition(self) -> str:
        """Name of its CustomResourceDefinition."""
        return f"{self.plural}.{self.group}"


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

DEFINITION = Resource("apiextensions.k8s.io", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False, has_status=True)
SERVICE_EXPORT, SERVICE_IMPORT = (
    Resource("multicluster.x-k8s.io", f"{kind.lower()}s", kind, has_status=True, version="v1alpha1", is_custom=True)
    for kind in ("ServiceExport", "ServiceImport")
)

READ = (NAMESPACE, NODE, SERVICE, POD, ENDPOINT_SLICE, LEASE, INGRESS, SERVICE_EXPORT, SERVICE_IMPORT)
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
    DEFINITION,
)
"""What manifests consist of besides."""
RESOURCES = (*READ, *APPLIED)
