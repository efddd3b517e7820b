"""The control plane's REST API as a user's script sees it."""

import ssl
from pathlib import Path
from typing import Any

import httpx

NAMESPACE = "lab"
"""Where the lab's objects go unless said otherwise."""
SLUGS = {"namespace": "web", "token": "register"}
SYSTEM_KINDS = frozenset({"site", "site_mesh_group", "token"})


class Refused(Exception):
    """The API answered with an error; `status` and `body` are what it said."""

    def __init__(self, answer: httpx.Response) -> None:
        self.status = answer.status_code
        self.body = answer.json() if "json" in answer.headers.get("content-type", "") else answer.text
        super().__init__(f"{answer.request.method} {answer.request.url.path}: {self.status} {self.body}")


class Api:
    """Objects by kind and name; each call raises `Refused` unless the answer is 2xx."""

    def __init__(self, url: str, ca: Path, token: str) -> None:
        self.client = httpx.AsyncClient(
            base_url=url,
            verify=ssl.create_default_context(cafile=str(ca)),
            headers={"authorization": f"APIToken {token}"},
            timeout=60,
            trust_env=False,
        )

    async def close(self) -> None:
        await self.client.aclose()

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.client.request(method, path, json=body)
        if not answer.is_success:
            raise Refused(answer)
        return answer.json()

    async def create(
        self, kind: str, name: str, spec: dict[str, Any], *, namespace: str | None = None, labels: dict[str, str] | None = None
    ) -> Any:
        """The created object, with its `revision`."""
        space = _space(kind, namespace)
        return await self.request("POST", _path(kind, space), _body(name, space, spec, labels))

    async def replace(
        self, kind: str, name: str, spec: dict[str, Any], *, namespace: str | None = None, labels: dict[str, str] | None = None
    ) -> Any:
        space = _space(kind, namespace)
        return await self.request("PUT", f"{_path(kind, space)}/{name}", _body(name, space, spec, labels))

    async def get(self, kind: str, name: str, *, namespace: str | None = None) -> Any:
        return await self.request("GET", f"{_path(kind, _space(kind, namespace))}/{name}")

    async def delete(self, kind: str, name: str, *, namespace: str | None = None) -> Any:
        return await self.request("DELETE", f"{_path(kind, _space(kind, namespace))}/{name}")

    async def status(self, kind: str, name: str, *, namespace: str | None = None) -> Any:
        return await self.request("GET", f"{_path(kind, _space(kind, namespace))}/{name}/status")

    async def manifest(self, site: str) -> str:
        """YAML that installs an agent of a site in a cluster."""
        answer = await self.client.post(f"{_path('token', 'system')}/{site}/manifest")
        if not answer.is_success:
            raise Refused(answer)
        return answer.text

    async def applied(
        self, kind: str, name: str, *, namespace: str | None = None, revision: int | None = None, offline: str = "fail", timeout_s: int = 30
    ) -> Any:
        """The status once every site concerned has the object at `revision`; `Refused` with 504 when that takes too long."""
        query = f"wait=applied&timeout={timeout_s}s&offline={offline}" + (f"&revision={revision}" if revision else "")
        return await self.request("GET", f"{_path(kind, _space(kind, namespace))}/{name}/status?{query}")


def _space(kind: str, namespace: str | None) -> str:
    if kind == "namespace":
        return ""
    return namespace or ("system" if kind in SYSTEM_KINDS else NAMESPACE)


def _path(kind: str, namespace: str) -> str:
    slug = SLUGS.get(kind, "config")
    return f"/api/{slug}/namespaces" if kind == "namespace" else f"/api/{slug}/namespaces/{namespace}/{kind}s"


def _body(name: str, namespace: str, spec: dict[str, Any], labels: dict[str, str] | None) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "labels": labels or {}}, "spec": spec}
