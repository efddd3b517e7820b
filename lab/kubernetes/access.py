"""Who may ask for what, and how the API can be made to fail."""

import asyncio
from dataclasses import dataclass, field

from lab.kubernetes.refusal import forbidden, unauthorized
from lab.kubernetes.resource import Resource


@dataclass
class Access:
    tokens: set[str] = field(default_factory=set)
    """Bearer tokens that are accepted; none: everybody is."""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """(plural or `*`, namespace; empty for what belongs to no namespace)."""
    running: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while the API is frozen: connections are accepted and nothing is answered."""

    def __post_init__(self) -> None:
        self.running.set()

    def authenticate(self, authorization: str, *, certified: bool) -> None:
        """Raise `Refusal` (401) unless the caller has a certificate of ours, or one of the tokens where there are any."""
        if self.tokens and not certified and authorization.removeprefix("Bearer ") not in self.tokens:
            raise unauthorized()

    def authorise(self, verb: str, resource: Resource, namespace: str) -> None:
        """Raise `Refusal` (403). RBAC has no exceptions: who may not read one namespace may not read all of them at once."""
        mine = {place for plural, place in self.forbidden if plural in {"*", resource.plural}}
        everywhere = resource.namespaced and not namespace
        if namespace in mine or (everywhere and mine - {""}):
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            what = f'resource "{resource.plural}" in API group "{resource.group}"'
            raise forbidden(f'{resource.plural} is forbidden: User "lab" cannot {verb} {what} {where}')


def rule(text: str) -> tuple[str, str]:
    """`services@shop`, `*@shop`, `nodes@`."""
    plural, separator, namespace = text.partition("@")
    if not plural or not separator:
        raise ValueError(f"{text!r} is not PLURAL@NAMESPACE")
    return plural, namespace
