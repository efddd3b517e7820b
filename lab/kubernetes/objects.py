"""Bodies of the objects that a lab creates, as short as they can be."""

from collections.abc import Mapping, Sequence
from typing import Any

Body = dict[str, Any]


def namespace(name: str) -> Body:
    return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}}


def service(
    name: str,
    namespace: str,
    port: int = 80,
    target_port: int | str | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    ports: Sequence[Mapping[str, Any]] = (),
    **spec: Any,
) -> Body:
    """With one TCP port, or `ports` as Kubernetes writes them; `spec` adds or replaces any other field."""
    only = [{"port": port, "protocol": "TCP", "targetPort": target_port or port}]
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {})},
        "spec": {"type": "ClusterIP", "ports": [dict(port) for port in ports] or only, **spec},
    }


def service_export(name: str, namespace: str) -> Body:
    return {"kind": "ServiceExport", "apiVersion": "multicluster.x-k8s.io/v1alpha1", "metadata": {"name": name, "namespace": namespace}}


def endpoint_slice(
    service: str,
    namespace: str,
    endpoints: Sequence[str | Mapping[str, Any]],
    port: int = 8080,
    *,
    name: str = "",
    family: str = "IPv4",
    ports: Sequence[Mapping[str, Any]] = (),
) -> Body:
    """Addresses stand for ready endpoints. The slice is called `<service>-1` unless it has a name of its own."""
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": name or f"{service}-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "ports": [dict(port) for port in ports] or [{"name": "", "port": port, "protocol": "TCP"}],
        "endpoints": [endpoint(one) if isinstance(one, str) else dict(one) for one in endpoints],
    }


def endpoint(address: str, *, ready: bool = True, serving: bool | None = None, terminating: bool = False, node: str = "") -> Body:
    """`serving` follows `ready` unless given."""
    conditions = {"ready": ready, "serving": ready if serving is None else serving, "terminating": terminating}
    return {"addresses": [address], "conditions": conditions, **({"nodeName": node} if node else {})}


def node(name: str, *addresses: str, ready: bool = True) -> Body:
    """`addresses` are its InternalIPs."""
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": name},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address} for address in addresses] + [{"type": "Hostname", "address": name}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def ingress(
    name: str, namespace: str, hosts: Mapping[str, tuple[str, int | str]], *, path: str = "/", ingress_class: str = "nginx"
) -> Body:
    """Each host leads to a port, by number or name, of a service."""
    rules = []
    for host, (service, port) in hosts.items():
        backend = {"service": {"name": service, "port": {"number" if isinstance(port, int) else "name": port}}}
        rules.append({"host": host, "http": {"paths": [{"path": path, "pathType": "Prefix", "backend": backend}]}})
    return {
        "kind": "Ingress",
        "apiVersion": "networking.k8s.io/v1",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"ingressClassName": ingress_class, "rules": rules},
    }


def account(name: str, namespace: str) -> Body:
    return {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": name, "namespace": namespace}}


def granted(account: str, namespace: str, *rules: Body, everywhere: bool = False) -> tuple[Body, Body]:
    """A role of the account's own with these rules, and its binding: in its namespace, or in the whole cluster."""
    prefix, api = "Cluster" if everywhere else "", "rbac.authorization.k8s.io"
    metadata = {"name": f"{namespace}-{account}"} if everywhere else {"name": account, "namespace": namespace}
    head: Body = {"apiVersion": f"{api}/v1", "metadata": metadata}
    reference = {"apiGroup": api, "kind": f"{prefix}Role", "name": metadata["name"]}
    subjects = [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
    role = {**head, "kind": f"{prefix}Role", "rules": list(rules)}
    return role, {**head, "kind": f"{prefix}RoleBinding", "roleRef": reference, "subjects": subjects}


def rule(group: str, resource: str, *verbs: str, **more: Any) -> Body:
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs), **more}


def pod(name: str, namespace: str, address: str, labels: Mapping[str, str] | None = None, *, phase: str = "Running", **spec: Any) -> Body:
    """As its kubelet reports it; without an address if that is empty."""
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {})},
        "spec": {"containers": [{"name": "main", "image": "none"}], **spec},
        "status": {"phase": phase, **({"podIP": address, "podIPs": [{"ip": address}]} if address else {})},
    }
