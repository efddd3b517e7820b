"""Who may ask for what, and how the API can be made to fail."""

import asyncio
import secrets
from dataclasses import dataclass, field

from lab.kubernetes.rbac import Account, Request, allows
from lab.kubernetes.refusal import forbidden, unauthorized
from lab.kubernetes.store import Store


@dataclass
class Access:
    tokens: set[str] = field(default_factory=set)
    """Bearer tokens of administrators; none: everybody is one who is no service account."""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """(plural or `*`, namespace; empty for what belongs to no namespace), whoever asks."""
    running: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared while the API is frozen: connections are accepted and nothing is answered."""
    accounts: dict[str, Account] = field(default_factory=dict)
    """By bearer token. They may do what roles say."""

    def __post_init__(self) -> None:
        self.running.set()

    def issue(self, account: Account) -> str:
        """A token, good until the emulator ends."""
        token = secrets.token_urlsafe(32)
        self.accounts[token] = account
        return token

    def authenticate(self, authorization: str, *, certified: bool) -> Account | None:
        """None is an administrator: by a certificate of ours or by token. Raises `Refusal` (401)."""
        token = authorization.removeprefix("Bearer ")
        if token in self.accounts:
            return self.accounts[token]
        if self.tokens and not certified and token not in self.tokens:
            raise unauthorized()
        return None

    def authorise(self, store: Store, account: Account | None, request: Request) -> None:
        """Raise `Refusal` (403). There are no exceptions: who may not read one namespace may not read all of them at once."""
        mine = {place for plural, place in self.forbidden if plural in {"*", request.resource.plural}}
        everywhere = request.resource.namespaced and not request.namespace
        if request.namespace in mine or (everywhere and mine - {""}) or (account and not allows(store, account, request)):
            where = f'in the namespace "{request.namespace}"' if request.namespace else "at the cluster scope"
            what = f'resource "{request.plural}" in API group "{request.resource.group}"'
            user = account.user if account else "lab"
            raise forbidden(f'{request.plural} is forbidden: User "{user}" cannot {request.verb} {what} {where}')


def rule(text: str) -> tuple[str, str]:
    """`services@shop`, `*@shop`, `nodes@`."""
    plural, separator, namespace = text.partition("@")
    if not plural or not separator:
        raise ValueError(f"{text!r} is not PLURAL@NAMESPACE")
    return plural, namespace
