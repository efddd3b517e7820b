"""Where a Service can be dialled from outside its cluster: at its load balancer, or at a machine and the Service's node port."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lightkube.core.generic_client import ALL_NS, GenericAsyncClient
from lightkube.models import core_v1
from lightkube.resources.core_v1 import Node, Service

from agent.discovery.kubeconfig import ClusterAccess
from agent.discovery.reflector import ReadFailed, Reflector, pauses
from agent.errors import Misconfigured
from agent.log import log

PORT_NAME = "gateway"
"""Of the Service's port that matters, if it has several."""


@dataclass(frozen=True)
class Exposed:
    """What a Service says about the ways to it. Ports are None where there is no such way."""

    balancer: str
    """IP address or DNS name; empty if there is none, or none yet."""
    port: int | None
    node_port: int | None


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster may be offered to peers under the address that the cloud gives it, else under its own."""

    address: str


class Exposure:
    """Follows one Service while `run` runs, and the machine in front of it if it is named. `changed` is called, in the event loop, when
    `known`, `address` or `reason` are others.
    """

    def __init__(
        self, load: Callable[[], ClusterAccess], service: str, changed: Callable[[], None], *, host: str = "", host_name: str = ""
    ) -> None:
        """The Service is in the namespace that `load` names. `host` is the address of the machine for node ports, as long as none is read
        from the machine called `host_name`.
        """
        self.known = False
        """Whether the Service was read once."""
        self.address: tuple[str, int] | None = None
        """The last that was found. None: nobody outside can dial it."""
        self.reason = "not connected yet"
        """Why it is unknown or there is none, or why changes are not seen now."""
        self._load, self._service, self._changed = load, service, changed
        self._host, self._host_name = host, host_name
        self._of_service: Reflector[Exposed] | None = None
        self._of_machine: Reflector[Machine] | None = None
        self._said: tuple[Any, ...] | None = None

    async def run(self) -> NoReturn:
        """Keep following, whatever goes wrong."""
        delays = pauses()
        while True:
            try:
                access = self._load()
                async with access.connect() as client, asyncio.TaskGroup() as group:
                    for reflector in self._reflectors(client, access.namespace):
                        group.create_task(reflector.run())
            except* (ReadFailed, Misconfigured) as failed:
                self._say(self.address, "; ".join(str(error) for error in failed.exceptions))
            if self._of_service and self._of_service.listed:
                delays = pauses()
            await asyncio.sleep(next(delays))

    def _reflectors(self, client: GenericAsyncClient, namespace: str) -> Iterable[Reflector[Any]]:
        self._of_service = Reflector(client, Service, _exposed, self._look, namespace, self._service)
        yield self._of_service
        if self._host_name:
            self._of_machine = Reflector(client, Node, _machine, self._look, ALL_NS, self._host_name)
            yield self._of_machine

    def _look(self, _: Sequence[Any]) -> None:
        """Say what there is, as soon as all that is asked for was read or cannot be read."""
        service, machine = self._of_service, self._of_machine
        assert service is not None
        failures = "; ".join(str(one.failure) for one in (service, machine) if one and one.failure)
        if not service.listed or (machine and not machine.listed and not machine.failure):
            self._say(self.address, failures or self.reason)
            return
        self.known = True
        address, why = self._found(next(iter(service.objects.values()), None))
        self._say(address, "; ".join(filter(None, (failures, why))))

    def _found(self, exposed: Exposed | None) -> tuple[tuple[str, int] | None, str]:
        """Where, and if nowhere, why."""
        if exposed is None:
            return None, f"there is no Service {self._service}"
        if exposed.balancer and exposed.port:
            return (exposed.balancer, exposed.port), ""
        machine = next((one.address for one in self._of_machine.objects.values()), "") if self._of_machine else ""
        host = machine or self._host
        if exposed.node_port and host:
            return (host, exposed.node_port), ""
        if exposed.node_port:
            return None, f"the Service {self._service} has a node port, but no address of this machine is known"
        return None, f"the Service {self._service} has neither a load balancer with an address nor a node port that leads to the gateway"

    def _say(self, address: tuple[str, int] | None, reason: str) -> None:
        if (address, reason, self.known) != self._said:
            log.info("gateway's service", service=self._service, address=address and f"{address[0]}:{address[1]}", reason=reason)
            self.address, self.reason, self._said = address, reason, (address, reason, self.known)
            self._changed()


def _exposed(body: Service) -> Exposed:
    spec = body.spec or core_v1.ServiceSpec()
    status = body.status.loadBalancer if body.status else None
    port = _port(spec.ports or ())
    first = next(iter(status.ingress or ()), None) if status and spec.type == "LoadBalancer" else None
    balancer = (first.ip or first.hostname or "") if first else ""
    return Exposed(balancer, port.port if port else None, port.nodePort if port else None)


def _port(ports: Sequence[core_v1.ServicePort]) -> core_v1.ServicePort | None:
    named = [port for port in ports if port.name == PORT_NAME]
    return named[0] if named else ports[0] if len(ports) == 1 else None


def _machine(body: Node) -> Machine | None:
    addresses = body.status.addresses or () if body.status else ()
    for kind in ("ExternalIP", "InternalIP"):
        for one in addresses:
            if one.type == kind:
                return Machine(one.address)
    return None
