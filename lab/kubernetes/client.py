"""What a lab and tests do to a cluster. It works on any API server, except for `fault`, which only the emulator understands."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from lightkube.config.client_adapter import user_auth

from agent.discovery.kubeconfig import from_kubeconfig
from lab.kubernetes import objects
from lab.kubernetes.objects import Body
from lab.kubernetes.resource import RESOURCES

_MERGE = {"Content-Type": "application/merge-patch+json"}
_BY_KIND = {resource.kind: resource for resource in RESOURCES}


@dataclass(frozen=True)
class Client:
    """All methods raise `httpx2.HTTPStatusError`."""

    http: httpx2.AsyncClient

    async def create(self, body: Body) -> Body:
        return await self._send("POST", _collection(body["kind"], body["metadata"].get("namespace", "")), body)

    async def apply(self, body: Body) -> Body:
        """Create, or replace whatever is there."""
        response = await self.http.put(_path(body), json=body)
        return await self.create(body) if response.status_code == httpx2.codes.NOT_FOUND else _checked(response)

    async def replace(self, body: Body) -> Body:
        return await self._send("PUT", _path(body), body)

    async def get(self, kind: str, name: str, namespace: str = "") -> Body:
        return await self._send("GET", f"{_collection(kind, namespace)}/{name}")

    async def patch(self, kind: str, name: str, patch: Body, namespace: str = "") -> Body:
        response = await self.http.patch(f"{_collection(kind, namespace)}/{name}", json=patch, headers=_MERGE)
        return _checked(response)

    async def delete(self, kind: str, name: str, namespace: str = "", **options: Any) -> None:
        await self._send("DELETE", f"{_collection(kind, namespace)}/{name}", options or None)

    async def list(self, kind: str, namespace: str = "", **query: str) -> Body:
        """All namespaces if none is given."""
        return _checked(await self.http.get(_collection(kind, namespace), params=query))

    async def watch(self, kind: str, namespace: str = "", **query: str) -> AsyncGenerator[Body, None]:
        """Events, until the server or the caller ends it."""
        params = {"watch": "true", **query}
        async with self.http.stream("GET", _collection(kind, namespace), params=params, timeout=httpx2.Timeout(10, read=60)) as response:
            if response.is_error:
                await response.aread()
            response.raise_for_status()
            async for line in response.aiter_lines():
                yield json.loads(line)

    async def token(self, account: str, namespace: str) -> str:
        """For a service account."""
        body = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": {"expirationSeconds": 600}}
        made = await self._send("POST", f"{_collection('ServiceAccount', namespace)}/{account}/token", body)
        return str(made["status"]["token"])

    async def set_endpoints(self, service: str, namespace: str, addresses: Sequence[str | Mapping[str, Any]], port: int = 8080) -> Body:
        """Replace the first slice of a service."""
        return await self.apply(objects.endpoint_slice(service, namespace, addresses, port))

    async def fault(self, name: str, **body: Any) -> Body:
        """`disconnect`, `compact`, `pause`, `resume` or `rules` of the emulator."""
        return await self._send("POST", f"/lab/{name}", body)

    async def _send(self, method: str, path: str, body: Body | None = None) -> Body:
        return _checked(await self.http.request(method, path, json=body))


@asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Client]:
    access = from_kubeconfig(await asyncio.to_thread(kubeconfig.read_bytes), kubeconfig.parent)
    async with access.transport() as transport:
        auth = user_auth(access.user)
        yield Client(httpx2.AsyncClient(base_url=access.server, transport=transport, auth=auth, timeout=10, trust_env=False))


def _collection(kind: str, namespace: str) -> str:
    resource = _BY_KIND[kind]
    return f"{resource.base}/namespaces/{namespace}/{resource.plural}" if namespace else f"{resource.base}/{resource.plural}"


def _path(body: Body) -> str:
    return f"{_collection(body['kind'], body['metadata'].get('namespace', ''))}/{body['metadata']['name']}"


def _checked(response: httpx2.Response) -> Body:
    response.raise_for_status()
    body: Body = response.json()
    return body
