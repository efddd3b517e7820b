"""An agent as a pod of its own cluster: what the control plane hands out is applied with kubectl, and run by as much of a kubelet as that takes.

The pod has its volumes as directories, its service account's token, and the network of its site.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.cluster import Cluster
from lab.kubernetes.client import Client
from lab.network import Place
from lab.process import BIN, Process, environment, with_files

NAMESPACE = "isthmus"
POD = "isthmus-0"
NODE_PORT = 31443
_ACCOUNT = "secrets/kubernetes.io/serviceaccount"
Json = dict[str, Any]


async def apply(cluster: Cluster, manifest: str) -> str:
    """What kubectl says, from within the site's network; raises `RuntimeError`."""
    command = cluster.place.command(["kubectl", f"--kubeconfig={cluster.kubeconfig}", "apply", "-f", "-"])
    pipe = asyncio.subprocess.PIPE
    env = environment(cluster.directory)
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=env)
    said, _ = await process.communicate(manifest.encode())
    if process.returncode != 0:
        raise RuntimeError(f"kubectl: {said.decode()}")
    return said.decode()


@dataclass
class Kubelet:
    """Runs the first pod of what was applied."""

    place: Place
    cluster: Cluster
    directory: Path
    mark: str

    async def pod(self, api: Client) -> Process:
        """Not started yet."""
        spec = (await api.get("StatefulSet", "isthmus", NAMESPACE))["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        volumes = [volume async for volume in self._volumes(api, spec, container)]
        await self._account(api, spec["serviceAccountName"])
        env = dict(self._variables(container, dict(volumes)))
        argv = with_files([str(BIN / "isthmus-agent"), *container["args"]], {"/run": self.directory / "run"})
        return Process("agent", argv, self.place, self.directory, self.mark, env)

    async def _volumes(self, api: Client, spec: Json, container: Json) -> AsyncIterator[tuple[str, str]]:
        """Where each is mounted, and where it really is: the claimed one is this directory."""
        declared = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            volume = declared.get(mount["name"])
            directory = self.directory / mount["name"] if volume else self.directory
            directory.mkdir(parents=True, exist_ok=True)
            if volume and "secret" in volume:
                secret = await api.get("Secret", volume["secret"]["secretName"], NAMESPACE)
                for name, value in secret["data"].items():
                    (directory / name).write_bytes(base64.b64decode(value))
            yield mount["mountPath"], str(directory)

    async def _account(self, api: Client, name: str) -> None:
        directory = self.directory / "run" / _ACCOUNT
        directory.mkdir(parents=True, exist_ok=True)
        config = json.loads(self.cluster.kubeconfig.read_text())
        authority = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"])
        for file, data in (
            ("token", (await api.token(name, NAMESPACE)).encode()),
            ("ca.crt", authority),
            ("namespace", NAMESPACE.encode()),
        ):
            (directory / file).write_bytes(data)

    def _variables(self, container: Json, volumes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        about = {
            "metadata.name": POD,
            "spec.nodeName": self.place.name,
            "status.podIP": self.place.inside,
            "status.hostIP": self.place.underlay,
        }
        host, _, port = self.cluster.address.rpartition(":")
        known = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port, "AGENT_DRAIN_S": "0.5", "AGENT_IPSEC": "off"}
        for variable in container["env"]:
            value = variable.get("value") or about[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            value = re.sub(r"\$\(([A-Z_]+)\)", lambda found: known[found[1]], value)
            mounted = next((path for path in volumes if value.startswith(f"{path}/")), "")
            if mounted:
                value = volumes[mounted] + value.removeprefix(mounted)
            known[variable["name"]] = value
        yield from known.items()
