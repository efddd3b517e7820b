"""As much of a Kubernetes API as `kubectl apply` talks to: its documents about itself, and objects that are created and read.

It keeps to order: what belongs to a namespace is refused before the namespace is there. Fields are checked elsewhere, against the API's models.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiohttp import web

Json = dict[str, Any]


class Kind(NamedTuple):
    group: str
    kind: str
    plural: str
    namespaced: bool = True


KINDS = (
    Kind("", "Namespace", "namespaces", namespaced=False),
    Kind("", "Secret", "secrets"),
    Kind("", "Service", "services"),
    Kind("", "ServiceAccount", "serviceaccounts"),
    Kind("rbac.authorization.k8s.io", "Role", "roles"),
    Kind("rbac.authorization.k8s.io", "RoleBinding", "rolebindings"),
    Kind("apps", "Deployment", "deployments"),
    Kind("apps", "StatefulSet", "statefulsets"),
    Kind("batch", "Job", "jobs"),
    Kind("policy", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("rbac.authorization.k8s.io", "ClusterRole", "clusterroles", namespaced=False),
    Kind("rbac.authorization.k8s.io", "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
)


@dataclass
class Cluster:
    server: str = ""
    objects: dict[str, Json] = field(default_factory=dict)
    """By path."""
    order: list[str] = field(default_factory=list)
    """Kinds, as they were created."""

    def named(self, kind: str, name: str) -> Json:
        return next(it for it in self.objects.values() if (it["kind"], it["metadata"]["name"]) == (kind, name))

    async def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """What it prints; fails unless it succeeds."""
        process = await asyncio.create_subprocess_exec(
            "kubectl",
            f"--server={self.server}",
            "--kubeconfig=/dev/null",
            "--cache-dir=/dev/null",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate(stdin.encode())
        assert process.returncode == 0, said.decode()
        return said.decode()

    async def answer(self, request: web.Request) -> web.Response:
        path = request.path.rstrip("/")
        if (document := _about_itself(path)) is not None:
            return web.json_response(document)
        if request.method == "GET":
            found = self.objects.get(path)
            return web.json_response(found) if found else _refused(404, "NotFound", path)
        if request.method == "POST":
            return self._create(path, await request.json())
        return _refused(405, "MethodNotAllowed", path)

    def _create(self, collection: str, body: Json) -> web.Response:
        namespace, _, rest = collection.partition("/namespaces/")[2].partition("/")
        if rest and f"/api/v1/namespaces/{namespace}" not in self.objects:
            return _refused(404, "NotFound", f"namespace {namespace}")
        self.order.append(body["kind"])
        self.objects[f"{collection}/{body['metadata']['name']}"] = body
        return web.json_response(body, status=201)


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.server = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield made
    finally:
        await runner.cleanup()


def _about_itself(path: str) -> Json | None:
    groups = sorted({kind.group for kind in KINDS} - {""})
    versions = {group: {"groupVersion": f"{group}/v1", "version": "v1"} for group in groups}
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [{"name": group, "versions": [it], "preferredVersion": it} for group, it in versions.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/api/v1":
        return _resources("", "v1")
    group = path.removeprefix("/apis/").removesuffix("/v1")
    return _resources(group, f"{group}/v1") if group in versions else None


def _resources(group: str, version: str) -> Json:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    found = [
        {"name": it.plural, "singularName": it.kind.lower(), "namespaced": it.namespaced, "kind": it.kind, "verbs": verbs}
        for it in KINDS
        if it.group == group
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": found}


def _refused(code: int, reason: str, message: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": message}
    return web.json_response(status, status=code)
