"""Intent for tests: bodies as users write them, and builders of such bodies with good defaults."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5
from weakref import ref

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from agent.protocol.items import Gateway
from agent.protocol.report import ServiceExport
from controlplane.compile.intent import Intent, Observations, Tenant
from controlplane.compile.multicluster import with_imports
from controlplane.resources.base import Key, Resource, Stored
from controlplane.resources.registry import parse
from controlplane.resources.secrets import secrets_in, with_refs

Body = dict[str, Any]

TENANT = Tenant(
    id="11111111-1111-4111-8111-111111111111", name="acme", trust_domain="fabric.test", peer_anchor_pem="<the tenant's intermediate>"
)
_THEN = datetime(2026, 1, 1, tzinfo=UTC)


def stored(body: Body, *, created_revision: int = 1) -> Stored[Any]:
    """An object as it is kept: secrets sealed, the uid that `system_metadata` names or one that follows from kind and key.

    Compilers remember by uid and version, so whatever differs has another version, also in other tests.
    """
    kind, metadata = body["kind"], body["metadata"]
    namespace = metadata.get("namespace", "system" if kind == "site" else "shop")
    parsed = parse(kind, {"metadata": metadata, "spec": body["spec"]}, namespace=namespace)
    spec = with_refs(parsed.spec, _refs(parsed.spec))
    named = body.get("system_metadata", {}).get("uid")
    uid = UUID(named) if named else uuid5(NAMESPACE_URL, f"{kind}/{namespace}/{metadata['name']}")
    version = int.from_bytes(sha256(repr((parsed, created_revision)).encode()).digest()[:7])
    return Stored(kind, uid, parsed.metadata, spec, version, created_revision, created_revision, _THEN, _THEN)


def _refs(spec: Resource) -> dict[str, str]:
    return {path: f"secret:{uuid5(NAMESPACE_URL, path)}:1" for path, secret in secrets_in(spec) if secret.ref is None}


def intent_of(objects: Iterable[Stored[Any]], names: frozenset[str] = frozenset()) -> Intent:
    """As a tenant that is not the operator's has it."""
    kinds: dict[str, dict[Key, Stored[Any]]] = {}
    for each in objects:
        kinds.setdefault(each.kind, {})[each.key] = each
    sites = kinds.pop("site", {})
    edges = {key: site for key, site in sites.items() if site.spec.is_edge}
    customers = {key: site for key, site in sites.items() if key not in edges}
    return Intent(TENANT, {**kinds, "site": customers} if customers else kinds, edges, names)


def intent(*bodies: Body) -> Intent:
    """Created one after the other. Bodies of kind `public_name` are names of the tenant, of kind `exports` what a site's cluster exports."""
    names = frozenset(body["name"] for body in bodies if body["kind"] == "public_name")
    exported = {
        id_of(body["site"]): tuple(map(ServiceExport.model_validate, body["services"])) for body in bodies if body["kind"] == "exports"
    }
    objects = (body for body in bodies if body["kind"] not in {"public_name", "exports"})
    made = intent_of((stored(body, created_revision=number) for number, body in enumerate(objects, start=1)), names)
    return with_imports(made, exported)


def written(before: Intent, after: Intent) -> Intent:
    """`after`, as a write to `before` makes it: they share what is equal."""
    shared = {kind: before.of(kind) if before.of(kind) == of_kind else of_kind for kind, of_kind in after.objects.items()}
    kinds = before.objects.keys() | shared.keys()
    touched = {(kind, key) for kind in kinds for key in _differing(before.of(kind), shared.get(kind, {}))}
    return replace(after, objects=shared, before=ref(before), touched=frozenset(touched))


def _differing(before: Mapping[Key, Stored[Any]], after: Mapping[Key, Stored[Any]]) -> set[Key]:
    return {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}


def read_intent(text: str) -> Intent:
    """YAML documents, one for each object."""
    return intent(*yaml.safe_load_all(text))


def id_of(site: str) -> str:
    """That `site(name)` gives."""
    return f"00000000-0000-4000-8000-{site.encode().hex():0>12}"


def observations_of(intent: Intent) -> Observations:
    """One gateway for each site, and the first two edges as homes of each customer edge."""
    sites = {**intent.of("site"), **intent.edges}
    gateways = {str(site.uid): (Gateway(node_id=f"node-{key.name}", host=f"{key.name}.test", port=15443),) for key, site in sites.items()}
    homes = tuple(str(intent.edges[key].uid) for key in sorted(intent.edges)[:2])
    return Observations(gateways, {str(site.uid): homes for site in intent.of("site").values()} if homes else {})


def body(kind: str, name: str, spec: Mapping[str, Any], namespace: str = "shop", **metadata: Any) -> Body:
    return {"kind": kind, "metadata": {"name": name, "namespace": namespace, **metadata}, "spec": spec}


def site(name: str, labels: Mapping[str, str] | None = None, **spec: Any) -> Body:
    """`name` has at most six letters."""
    return {**body("site", name, spec, "system", labels=labels or {}), "system_metadata": {"uid": id_of(name)}}


def virtual_site(name: str, selector: str, namespace: str = "shared") -> Body:
    return body("virtual_site", name, {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": [selector]}}, namespace)


def full_mesh(name: str, virtual_site: str) -> Body:
    return body("site_mesh_group", name, {"full_mesh": {}, "virtual_site": [{"namespace": "shared", "name": virtual_site}]}, "system")


def at(place: str) -> Body:
    """A locator: `b`, or `*name` for a virtual site of namespace `shared`."""
    if place.startswith("*"):
        return {"virtual_site": {"namespace": "shared", "name": place[1:]}}
    return {"site": {"namespace": "system", "name": place}}


def pool(name: str, *places: str, **spec: Any) -> Body:
    """A service at each of the places."""
    servers = [{"k8s_service": {"service_name": f"{name}.shop", "site_locator": at(place)}} for place in places]
    return body("origin_pool", name, {"origin_servers": servers, "port": 8080, **spec})


def advertised(*places: str, **port: Any) -> Body:
    """On the inside network of each of the places."""
    where = [{next(iter(at(place))): {"network": "SITE_NETWORK_INSIDE", **at(place)}, **port} for place in places]
    return {"advertise_custom": {"advertise_where": where}}


def weighted(pools: Sequence[str]) -> list[Body]:
    return [{"pool": {"name": name}, "weight": 1, "priority": 1} for name in pools]


def http(name: str, pools: Sequence[str], places: Sequence[str], **spec: Any) -> Body:
    listener = {} if "https" in spec else {"http": {"port": 80}}
    defaults = {"domains": [f"{name}.test"], **listener, "default_route_pools": weighted(pools), **advertised(*places)}
    return body("http_loadbalancer", name, {**defaults, **spec})


def tcp(name: str, pools: Sequence[str], places: Sequence[str], port: int = 5432, **spec: Any) -> Body:
    return body("tcp_loadbalancer", name, {"listen_port": port, "origin_pools_weights": weighted(pools), **advertised(*places), **spec})


def policy(name: str, **spec: Any) -> Body:
    return body("service_policy", name, spec)
