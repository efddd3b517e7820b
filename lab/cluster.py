"""A sample Kubernetes cluster: an API emulator, and pods that are real processes on addresses of their own."""

import asyncio
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lab.network import Place
from lab.process import Process
from lab.wait import until

API_PORT = 6443
NAMESPACE = "shop"
"""The Kubernetes namespace of the sample services."""
_ADMINISTRATOR = "administrator"
"""Its bearer token."""
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"


@dataclass(frozen=True)
class Pod:
    name: str
    address: str
    process: Process


@dataclass
class Service:
    """A Kubernetes service and its pods, oldest first."""

    name: str
    argv: Sequence[str]
    """The program; each pod adds `--listen ADDRESS:PORT --pod NAME`."""
    port: int
    env: Mapping[str, str]
    pods: list[Pod] = field(default_factory=list)
    names: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def endpoint_slice(self) -> dict[str, Any]:
        """What the control loops of a real cluster would write once these pods are ready."""
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": f"{self.name}-1", "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": self.name}},
            "addressType": "IPv4",
            "ports": [{"name": "main", "port": self.port, "protocol": "TCP"}],
            "endpoints": [
                {
                    "addresses": [pod.address],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "targetRef": {"kind": "Pod", "name": pod.name, "namespace": NAMESPACE},
                }
                for pod in self.pods
            ],
        }


@dataclass
class Cluster:
    """One cluster at one place. `reach` turns an address in that place into one for the lab itself."""

    place: Place
    directory: Path
    mark: str
    secured: bool = False
    """Whether the API has TLS, and roles for all but its administrator. kubectl shows credentials to no other."""
    services: dict[str, Service] = field(default_factory=dict)
    url: str = ""
    """Of the API, for the lab, once it has started."""
    _addresses: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _api: httpx.AsyncClient | None = None

    def __post_init__(self) -> None:
        argv = [sys.executable, "-m", "lab.kubernetes", "--listen", self.address, "--kubeconfig-out", str(self.kubeconfig)]
        argv += ["--state", "objects", *(("--tls", "--token", _ADMINISTRATOR) if self.secured else ())]
        self.emulator = Process("kubernetes", argv, self.place, self.directory, self.mark)

    @property
    def address(self) -> str:
        """Of the API, in the cluster's own network."""
        return f"{self.place.cluster}:{API_PORT}"

    @property
    def connection(self) -> dict[str, Any]:
        """Arguments of an HTTP client of the lab's, as an administrator; the certificate is for the address in the cluster's network."""
        headers = {"Authorization": f"Bearer {_ADMINISTRATOR}"} if self.secured else {}
        return {"base_url": self.url, "headers": headers, "verify": False, "timeout": 10, "trust_env": False}

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    async def start(self, reached: str) -> None:
        """Start the API; `reached` is `host:port` at which the lab does."""
        await self.emulator.start()
        self.url = f"{'https' if self.secured else 'http'}://{reached}"
        self._api = httpx.AsyncClient(**self.connection)
        await until(self._answers, f"the Kubernetes API of {self.place.name}")
        await self._post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})

    async def stop(self) -> None:
        """At once: nobody calls any more."""
        await asyncio.gather(*(pod.process.kill() for service in self.services.values() for pod in service.pods))
        if self._api:
            await self._api.aclose()
        await self.emulator.stop()

    async def deploy(
        self, name: str, argv: Sequence[str], *, port: int = 8080, replicas: int = 1, env: Mapping[str, str] | None = None
    ) -> Service:
        """Create the service and start its pods."""
        service = self.services[name] = Service(name, argv, port, env or {})
        await self._post(f"/api/v1/namespaces/{NAMESPACE}/services", self._service(service))
        await self._post(SLICES, service.endpoint_slice())
        await self.scale(name, replicas)
        return service

    async def scale(self, name: str, replicas: int) -> None:
        """Start or stop pods. Pods that go are taken out of the endpoints first, then asked to end, as in a real cluster."""
        service = self.services[name]
        new = [self._pod(service) for _ in range(replicas - len(service.pods))]
        await asyncio.gather(*(self._start(pod, service.port) for pod in new))
        gone = service.pods[replicas:]
        service.pods = [*service.pods[:replicas], *new]
        await self.publish(name)
        await asyncio.gather(*(pod.process.stop() for pod in gone))

    async def publish(self, name: str) -> None:
        """Write the endpoints of a service as its pods are now."""
        service = self.services[name]
        await self._put(f"{SLICES}/{name}-1", service.endpoint_slice())

    def _pod(self, service: Service) -> Pod:
        name, address = f"{service.name}-{self.place.name}-{next(service.names)}", f"{self.place.pods}{next(self._addresses)}"
        argv = [*service.argv, "--listen", f"{address}:{service.port}", "--pod", name]
        return Pod(name, address, Process(name, argv, self.place, self.directory, self.mark, service.env))

    async def _start(self, pod: Pod, port: int) -> None:
        """Ready is a pod that accepts connections, and has not ended."""
        await pod.process.start()

        async def accepts() -> bool:
            pod.process.check()
            probe = self.place.socket()
            with probe:
                await asyncio.get_running_loop().sock_connect(probe, (pod.address, port))
            return True

        await until(accepts, f"pod {pod.name} to listen")

    def _service(self, service: Service) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service.name, "namespace": NAMESPACE, "labels": {"app": service.name}},
            "spec": {"type": "ClusterIP", "clusterIP": "None", "ports": [{"name": "main", "port": service.port, "protocol": "TCP"}]},
        }

    async def _answers(self) -> bool:
        self.emulator.check()
        assert self._api is not None
        if not self.kubeconfig.exists():
            return False
        try:
            return (await self._api.get("/version")).is_success
        except httpx.TransportError as error:
            raise ConnectionError(str(error)) from error

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        assert self._api is not None
        (await self._api.post(path, json=body)).raise_for_status()

    async def _put(self, path: str, body: dict[str, Any]) -> None:
        assert self._api is not None
        (await self._api.put(path, json=body)).raise_for_status()
