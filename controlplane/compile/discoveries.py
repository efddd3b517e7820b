"""Discoveries as items, and the sites that watch."""

from functools import lru_cache
from typing import Any, Literal

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.intent import CACHE
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem
from controlplane.compile.tls import inline_text, secret_ref
from controlplane.resources.base import Stored
from controlplane.resources.discovery import AccessInfo, ConnectionInfo, Discovery, IngressController, TlsInfo


def watching(discovery: Stored[Discovery], topology: Topology) -> frozenset[str]:
    """Ids of the sites."""
    where = discovery.spec.where
    return frozenset[str]().union(
        *(topology.located(ref, None) for ref in (where.site.ref if where.site else ())),
        *(topology.located(None, ref) for ref in (where.virtual_site.ref if where.virtual_site else ())),
    )


@lru_cache(CACHE)
def discovery_item(stored: Stored[Discovery]) -> CompiledItem | None:
    """None when it says nothing to discover."""
    kubernetes = stored.spec.discovery_k8s
    if kubernetes is None:
        return None
    access = kubernetes.access_info
    mapping = kubernetes.namespace_mapping
    body = items.Discovery(
        kubeconfig=secret_ref(access.kubeconfig_url) if access.kubeconfig_url else None,
        in_cluster=bool(access.in_cluster),
        cluster_id=stored.spec.cluster_id or "",
        delivery=_delivery(access),
        ingress_controller=_controller(access.ingress_controller) if access.ingress_controller else None,
        namespace_mapping=tuple(
            items.NamespaceMapping(namespace_regex=item.namespace_regex, namespace=item.namespace)
            for item in (mapping.items if mapping else ())
        ),
    )
    if access.connection_info:
        body = body.model_copy(update=_connection(access.connection_info))
    return CompiledItem.of(ItemKind.DISCOVERY, str(stored.key), body)


def _delivery(access: AccessInfo) -> Literal["isolated", "reachable", "cluster_ip", "ingress_controller"]:
    if access.ingress_controller:
        return "ingress_controller"
    return "reachable" if access.reachable else "cluster_ip" if access.cluster_ip else "isolated"


def _controller(controller: IngressController) -> items.IngressController:
    return items.IngressController(service=controller.service_name, port=controller.port, ingress_class=controller.ingress_class or "")


def _connection(connection: ConnectionInfo) -> dict[str, Any]:
    tls = connection.tls_info or TlsInfo()
    return {
        "api_server": connection.api_server,
        "server_name": tls.server_name or "",
        "certificate_pem": inline_text(tls.certificate) if tls.certificate else "",
        "client_key": secret_ref(tls.key_url) if tls.key_url else None,
        "trusted_ca_pem": inline_text(tls.trusted_ca_url) if tls.trusted_ca_url else "",
    }
