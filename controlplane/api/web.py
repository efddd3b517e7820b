"""What lives under `/api/web` besides the five verbs: deleting namespaces, and credentials."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from controlplane.api.deps import CurrentCaller, JsonBody, NameInPath, NamespaceInPath, Now, OptionalJsonBody, Session
from controlplane.api.description import asked, described
from controlplane.api.requests import agree, read
from controlplane.errors import Invalid
from controlplane.resources.base import Choice, Empty, Flag, Name, Value, Whole
from controlplane.resources.enumeration import Names
from controlplane.services import credentials, resources
from controlplane.store.credentials import Credential

Json = dict[str, Any]

router = APIRouter(prefix="/api/web/namespaces")

_ONLY_TOKENS = "only API tokens are supported"

CredentialType = Annotated[
    Literal["API_TOKEN", "SERVICE_API_TOKEN"],
    Names(
        "API_CERTIFICATE",
        "KUBE_CONFIG",
        "API_TOKEN",
        "SERVICE_API_TOKEN",
        "SERVICE_API_CERTIFICATE",
        "SERVICE_KUBE_CONFIG",
        "SITE_GLOBAL_KUBE_CONFIG",
        "SCIM_API_TOKEN",
        "SERVICE_SITE_GLOBAL_KUBE_CONFIG",
        refused=dict.fromkeys(
            (
                "API_CERTIFICATE",
                "KUBE_CONFIG",
                "SERVICE_API_CERTIFICATE",
                "SERVICE_KUBE_CONFIG",
                "SITE_GLOBAL_KUBE_CONFIG",
                "SCIM_API_TOKEN",
                "SERVICE_SITE_GLOBAL_KUBE_CONFIG",
            ),
            _ONLY_TOKENS,
        ),
    ),
]


class CredentialSpec(Value):
    unsupported = {
        "password": _ONLY_TOKENS,
        "virtual_k8s_name": "virtual Kubernetes is not supported",
        "virtual_k8s_namespace": "virtual Kubernetes is not supported",
    }

    type: CredentialType


class NewApiCredential(Value):
    name: Name
    namespace: Literal["system", ""] = "system"
    expiration_days: Whole = Field(0, ge=0, le=credentials.LONGEST_LIFE_DAYS)
    """0: the default."""
    spec: CredentialSpec


class NewServiceCredential(Value):
    choices = (
        Choice(
            "credential_choice",
            ("api_token",),
            required=True,
            refused=dict.fromkeys(("api_certificate", "site_kubeconfig", "vk8s_kubeconfig"), _ONLY_TOKENS),
        ),
    )
    unsupported = {
        "namespace_roles": "roles are not supported: a credential may do everything in its tenant",
        "namespace_access": "roles are not supported: a credential may do everything in its tenant",
        "user_group_names": "user groups are not supported",
    }

    name: Name
    namespace: Literal["system", ""] = "system"
    expiration_days: Whole = Field(0, ge=0, le=credentials.LONGEST_LIFE_DAYS)
    api_token: Empty | None = None


class CredentialRequest(Value):
    name: Name
    namespace: str = ""
    expiration_days: Whole = Field(0, ge=0, le=credentials.LONGEST_LIFE_DAYS)
    active: Flag = True


@router.post(
    "/{name}/cascade_delete",
    tags=["namespace"],
    operation_id="ves.io.schema.namespace.CustomAPI.CascadeDelete",
    openapi_extra=described("/{name}"),
)
async def cascade_delete(name: NameInPath, body: OptionalJsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
    """Delete a namespace and everything in it; refused, as a whole, while something outside refers to something inside."""
    agree(body, name=name)
    gone = await resources.delete_namespace(session, caller, name, now=now)
    items = [{"object_type": json.kind, "object_name": json.name, "object_uid": str(json.uid), "error_message": ""} for json in gone]
    return {"items": items}


class CredentialRoutes:
    """Of the one or the other kind of credential: those of persons, and those of services."""

    def __init__(self, *, service: bool) -> None:
        self.service = service
        self.collection = "service_credentials" if service else "api_credentials"

    async def create(self, namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
        """Create an API token. `data` is the token; it is shown this once."""
        _only_system(namespace)
        wanted = read(NewServiceCredential, body) if self.service else read(NewApiCredential, body)
        made, token = await credentials.create(
            session,
            caller,
            wanted.name,
            namespace=namespace,
            type=wanted.spec.type if isinstance(wanted, NewApiCredential) else "SERVICE_API_TOKEN",
            service=self.service,
            days=wanted.expiration_days,
            now=now,
        )
        return {"name": made.name, "data": token, "active": made.active, "expiration_timestamp": _time(made.expires_at)}

    async def list(self, namespace: NamespaceInPath, caller: CurrentCaller, session: Session) -> Json:
        """List credentials, by name; never their tokens."""
        _only_system(namespace)
        found = await credentials.list_all(session, caller, service=self.service)
        return {"items": [_shown(credential) for credential in found]}

    async def get(self, namespace: NamespaceInPath, name: NameInPath, caller: CurrentCaller, session: Session) -> Json:
        """Read a credential; never its token."""
        _only_system(namespace)
        return {"object": _shown(await credentials.get(session, caller, name, service=self.service))}

    async def revoke(self, namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
        """Withdraw a credential: from now on nobody can use it."""
        wanted = _request(namespace, body)
        await credentials.revoke(session, caller, wanted.name, service=self.service, now=now)
        return {"status": True}

    async def renew(self, namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
        """Let a credential expire `expiration_days` from now."""
        wanted = _request(namespace, body)
        await credentials.renew(session, caller, wanted.name, service=self.service, days=wanted.expiration_days, now=now)
        return {"status": True}

    async def activate(self, namespace: NamespaceInPath, body: JsonBody, caller: CurrentCaller, session: Session, now: Now) -> Json:
        """Let a credential be used again, or with `active: false` suspend it."""
        wanted = _request(namespace, body)
        await credentials.activate(session, caller, wanted.name, service=self.service, active=wanted.active, now=now)
        return {"status": True}


def _add(routes: CredentialRoutes) -> None:
    many, operations = f"/{{namespace}}/{routes.collection}", f"ves.io.schema.{routes.collection[:-1]}.CustomAPI"
    new = asked(NewServiceCredential if routes.service else NewApiCredential)
    for verb, method, path, endpoint, body in (
        ("Create", "POST", many, routes.create, new),
        ("List", "GET", many, routes.list, {}),
        ("Get", "GET", f"{many}/{{name}}", routes.get, {}),
        ("Revoke", "POST", f"/{{namespace}}/revoke/{routes.collection}", routes.revoke, asked(CredentialRequest)),
        ("Renew", "POST", f"/{{namespace}}/renew/{routes.collection}", routes.renew, asked(CredentialRequest)),
        ("Activate", "POST", f"/{{namespace}}/activate/{routes.collection}", routes.activate, asked(CredentialRequest)),
    ):
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            operation_id=f"{operations}.{verb}",
            tags=["credential"],
            openapi_extra=described(path) | body,
        )


_add(CredentialRoutes(service=False))
_add(CredentialRoutes(service=True))


def _request(namespace: str, body: Any) -> CredentialRequest:
    _only_system(namespace)
    return read(CredentialRequest, body, namespace)


def _only_system(namespace: str) -> None:
    if namespace != "system":
        raise Invalid("credentials are in namespace system")


def _shown(credential: Credential) -> Json:
    return {
        "name": credential.name,
        "namespace": credential.namespace,
        "type": credential.type,
        "active": credential.active,
        "create_timestamp": _time(credential.created_at),
        "expiry_timestamp": _time(credential.expires_at),
        "uid": str(credential.id),
    }


def _time(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
