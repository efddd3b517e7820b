"""What an API server does to an object before it stores it: defaults, allocations, and refusals that matter to discovery."""

import base64
import ipaddress
import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lab.kubernetes.refusal import invalid
from lab.kubernetes.resource import ENDPOINT_SLICE, SECRET, SERVICE, Resource
from lab.kubernetes.selector import Body

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_NODE_PORTS = range(30_000, 32_768)
_CLUSTER_IPS = ipaddress.ip_network("10.96.0.0/16")


@dataclass(frozen=True)
class Admission:
    allow_loopback: bool = True
    """A real API server refuses EndpointSlices with loopback addresses; pods of an unprivileged lab have no others."""

    def admit(self, resource: Resource, body: Body, previous: Body | None, others: Collection[Body]) -> Body:
        """The body as it is to be stored; `others` are the other services, for a service. Raises `Refusal`."""
        name = body["metadata"]["name"]
        if not (_SERVICE_NAME if resource is SERVICE else _NAME).fullmatch(name):
            raise invalid(resource.kind, name, f"metadata.name: {name!r} is not a valid name")
        if body["metadata"].get("finalizers"):
            raise invalid(resource.kind, name, "metadata.finalizers: not emulated")
        try:
            if resource is SERVICE:
                return {**body, "spec": _service(body.get("spec") or {}, (previous or {}).get("spec") or {}, others)}
            if resource is ENDPOINT_SLICE:
                return self._endpoint_slice(body, previous)
            if resource is SECRET:
                return _secret(body)
        except _Problem as problem:
            raise invalid(resource.kind, name, str(problem)) from None
        return body

    def _endpoint_slice(self, body: Body, previous: Body | None) -> Body:
        _check(body.get("addressType") in {"IPv4", "IPv6", "FQDN"}, "addressType: Required value")
        _check(previous is None or previous["addressType"] == body["addressType"], "addressType: field is immutable")
        endpoints, ports = body.get("endpoints") or [], body.get("ports") or []
        _check(len(endpoints) <= 1000, "endpoints: Too many: must have at most 1000 items")
        _check(len(ports) <= 100, "ports: Too many: must have at most 100 items")
        for endpoint in endpoints:
            _check(bool(endpoint.get("addresses")), "endpoints.addresses: Required value")
            for address in endpoint["addresses"]:
                self._address(address, body["addressType"])
        return {**body, "endpoints": endpoints, "ports": [{"name": "", "protocol": "TCP", **port} for port in ports]}

    def _address(self, text: str, family: str) -> None:
        if family == "FQDN":
            return
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise _Problem(f"endpoints.addresses: Invalid value: {text!r}: must be a valid IP address") from None
        _check(f"IPv{address.version}" == family, f"endpoints.addresses: Invalid value: {text!r}: must be an {family} address")
        _check(not address.is_unspecified, f"endpoints.addresses: Invalid value: {text!r}: may not be unspecified")
        _check(not address.is_link_local, f"endpoints.addresses: Invalid value: {text!r}: may not be in the link-local range")
        _check(not address.is_multicast, f"endpoints.addresses: Invalid value: {text!r}: may not be in the multicast range")
        loopback = address.is_loopback and not self.allow_loopback
        _check(not loopback, f"endpoints.addresses: Invalid value: {text!r}: may not be in the loopback range (127.0.0.0/8, ::1/128)")


def _secret(body: Body) -> Body:
    """What was written as text is read as base64."""
    written = {name: base64.b64encode(text.encode()).decode() for name, text in (body.get("stringData") or {}).items()}
    return {**{name: value for name, value in body.items() if name != "stringData"}, "data": {**(body.get("data") or {}), **written}}


class _Problem(Exception):
    """A field that cannot be as it is."""


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise _Problem(problem)


def _service(spec: Body, previous: Body, others: Collection[Body]) -> Body:
    spec = {"type": "ClusterIP", **spec}
    _check(spec["type"] in _SERVICE_TYPES, f"spec.type: Unsupported value: {spec['type']!r}")
    if spec["type"] == "ExternalName":
        _check(bool(spec.get("externalName")), "spec.externalName: Required value")
        return spec
    spec = {"ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", **spec}
    spec["clusterIP"] = spec.get("clusterIP") or previous.get("clusterIP") or _free_address(others)
    spec["clusterIPs"] = spec.get("clusterIPs") or [spec["clusterIP"]]
    exposed = spec["type"] != "ClusterIP"
    if exposed:
        spec.setdefault("externalTrafficPolicy", "Cluster")
    spec["ports"] = _ports(spec, previous, others, exposed=exposed)
    return spec


def _ports(spec: Body, previous: Body, others: Collection[Body], *, exposed: bool) -> list[dict[str, Any]]:
    ports = [{"protocol": "TCP", "targetPort": port.get("port"), **port} for port in spec.get("ports") or []]
    names = [port.get("name", "") for port in ports]
    _check(bool(ports) or spec["clusterIP"] == "None", "spec.ports: Required value")
    _check(len(ports) == 1 or all(names), "spec.ports.name: Required value")
    _check(len(set(names)) == len(names), "spec.ports.name: Duplicate value")
    for port in ports:
        _check(isinstance(port.get("port"), int) and 0 < port["port"] < 65_536, "spec.ports.port: must be between 1 and 65535, inclusive")
    if exposed:
        kept = {port["port"]: port["nodePort"] for port in previous.get("ports", ()) if "nodePort" in port}
        free = iter(_free_node_ports(others))
        ports = [{**port, "nodePort": port.get("nodePort") or kept.get(port["port"]) or next(free)} for port in ports]
    return ports


def _free_address(services: Collection[Body]) -> str:
    taken = {service["spec"].get("clusterIP") for service in services}
    candidates = (str(_CLUSTER_IPS[number]) for number in itertools.count(10))
    return next(address for address in candidates if address not in taken)


def _free_node_ports(services: Collection[Body]) -> list[int]:
    taken = {port.get("nodePort") for service in services for port in service["spec"].get("ports", ())}
    return [port for port in _NODE_PORTS if port not in taken]
