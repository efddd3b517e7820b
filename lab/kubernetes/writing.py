"""Create, replace, patch and delete."""

import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lab.kubernetes.admission import Admission
from lab.kubernetes.refusal import already_exists, bad_request, conflict
from lab.kubernetes.resource import NAMESPACE, SERVICE, Resource
from lab.kubernetes.selector import Body
from lab.kubernetes.store import Key, Object, Store

_KEPT = ("uid", "creationTimestamp", "generation")


@dataclass(frozen=True)
class Writer:
    """Every change of an object passes here. All methods raise `Refusal`."""

    store: Store
    admission: Admission

    def create(self, resource: Resource, namespace: str, body: Body) -> Object:
        given = body["metadata"]
        key = Key(namespace, given.get("name") or f"{given.get('generateName', '')}{uuid.uuid4().hex[:5]}")
        if given.get("resourceVersion"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        if resource.namespaced:
            self.store.get(NAMESPACE, Key("", namespace))
        if key in self.store.collections[resource].objects:
            raise already_exists(resource.plural, key.name)
        if resource.is_custom and resource.has_status:
            body = {name: value for name, value in body.items() if name != "status"}
        return self._put(resource, key, body, None)

    def replace(self, resource: Resource, key: Key, body: Body) -> Object:
        previous = self.store.get(resource, key)
        if resource.has_status:
            body = {**body, "status": previous.body.get("status", {})}
        return self._put(resource, key, body, previous)

    def patch(self, resource: Resource, key: Key, patch: Body) -> Object:
        previous = self.store.get(resource, key)
        return self.replace(resource, key, _expecting(patch, merged(previous.body, patch)))

    def replace_status(self, resource: Resource, key: Key, body: Body) -> Object:
        previous = self.store.get(resource, key)
        return self._put(resource, key, _expecting(body, {**previous.body, "status": body.get("status", {})}), previous)

    def patch_status(self, resource: Resource, key: Key, patch: Body) -> Object:
        previous = self.store.get(resource, key)
        status = merged(previous.body.get("status", {}), patch.get("status", {}))
        return self._put(resource, key, _expecting(patch, {**previous.body, "status": status}), previous)

    def delete(self, resource: Resource, key: Key, preconditions: Body) -> None:
        metadata = self.store.get(resource, key).body["metadata"]
        if any(metadata.get(name) != value for name, value in preconditions.items()):
            raise conflict(resource.plural, key.name)
        self.store.delete(resource, key)
        if resource is NAMESPACE:
            self._empty(key.name)

    def _empty(self, namespace: str) -> None:
        for resource, collection in self.store.collections.items():
            for key in [key for key in collection.objects if key.namespace == namespace]:
                self.store.delete(resource, key)

    def _put(self, resource: Resource, key: Key, body: Body, previous: Object | None) -> Object:
        """Admit and store; a version in the body must be that of what is stored."""
        before: Body = previous.body["metadata"] if previous else {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 1}
        metadata = {**body["metadata"], "name": key.name, **{name: before[name] for name in _KEPT}}
        if resource.namespaced:
            metadata["namespace"] = key.namespace
        expected = metadata.pop("resourceVersion", None)
        whole = {"kind": resource.kind, "apiVersion": resource.api_version, **body, "metadata": metadata}
        others = [other.body for at, other in self.store.collections[resource].objects.items() if at != key] if resource is SERVICE else []
        admitted = self.admission.admit(resource, whole, previous.body if previous else None, others)
        if previous and admitted.get("spec") != previous.body.get("spec"):
            metadata["generation"] = before["generation"] + 1
        return self.store.put(resource, key, admitted, expected=expected)


def merged(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def _expecting(source: Body, body: Body) -> Body:
    """`body` with the version that the writer gave in `source`, or with none."""
    metadata = {name: value for name, value in body["metadata"].items() if name != "resourceVersion"}
    if version := (source.get("metadata") or {}).get("resourceVersion"):
        metadata["resourceVersion"] = version
    return {**body, "metadata": metadata}


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
