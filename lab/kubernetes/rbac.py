"""Role-based access control as an API server decides it: by the roles and bindings that are stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lab.kubernetes.resource import CLUSTER_ROLE, CLUSTER_ROLE_BINDING, ROLE, ROLE_BINDING, Resource
from lab.kubernetes.store import Key, Store

_Rule = dict[str, Any]


class Account(NamedTuple):
    """A service account."""

    namespace: str
    name: str

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{self.name}"


@dataclass(frozen=True)
class Request:
    """What somebody asks for."""

    verb: str
    resource: Resource
    namespace: str = ""
    """Empty: all of them, or none."""
    name: str = ""
    """Empty: many. Lists and watches have one if their field selector says so."""
    subresource: str = ""

    @property
    def plural(self) -> str:
        return f"{self.resource.plural}/{self.subresource}" if self.subresource else self.resource.plural


def allows(store: Store, account: Account, request: Request) -> bool:
    return any(_covers(rule, request) for rule in _rules(store, account, request.namespace))


def _rules(store: Store, account: Account, namespace: str) -> Iterator[_Rule]:
    """Those that hold for an account in a namespace."""
    for resource in (CLUSTER_ROLE_BINDING, ROLE_BINDING):
        for key, binding in store.collections[resource].objects.items():
            if key.namespace in {"", namespace} and _is_bound(binding.body, account):
                yield from _role(store, key.namespace, binding.body["roleRef"])


def _is_bound(binding: dict[str, Any], account: Account) -> bool:
    subjects = binding.get("subjects") or ()
    return any((one["kind"], one.get("namespace"), one["name"]) == ("ServiceAccount", *account) for one in subjects)


def _role(store: Store, namespace: str, reference: dict[str, Any]) -> list[_Rule]:
    """Of a role that is not there, none."""
    resource, key = (ROLE, Key(namespace, reference["name"])) if reference["kind"] == "Role" else (CLUSTER_ROLE, Key("", reference["name"]))
    role = store.collections[resource].objects.get(key)
    return list(role.body.get("rules") or ()) if role else []


def _covers(rule: _Rule, request: Request) -> bool:
    wanted = (("apiGroups", request.resource.group), ("resources", request.plural), ("verbs", request.verb))
    if not all({value, "*"} & {*rule.get(field, ())} for field, value in wanted):
        return False
    return not rule.get("resourceNames") or request.name in rule["resourceNames"]
