"""Where peers may dial this node, which may change while it runs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from agent.control import source_address
from agent.discovery.exposure import Exposure
from agent.discovery.kubeconfig import ClusterAccess
from agent.errors import Unreachable
from agent.log import log
from agent.protocol.items import Gateway
from agent.settings import NOWHERE, Settings, host_and_port

_AGAIN_S = 60.0
_SOON_S = 1.0
"""While none is known."""
_ANY = ("0.0.0.0", "::")  # noqa: S104  # to recognise them


@dataclass
class Advertiser:
    """Keeps `gateways` right, and calls `changed` when they were looked up."""

    settings: Settings
    node_id: str
    url: Callable[[], str]
    """Of the control plane: the way there shows the node's own address."""
    changed: Callable[[], None]
    cluster: Callable[[], ClusterAccess] | None
    """Where the Service is that the settings name, if they name one."""
    gateways: tuple[Gateway, ...] | None = field(default=None, init=False)
    """None: not known yet."""
    warning: str | None = field(default=None, init=False)

    async def run(self) -> NoReturn:
        if self.settings.gateway_service and self.cluster:
            await self._follow(self.settings.gateway_service, self.cluster)
        while True:
            try:
                self.gateways = await self._found()
                self.changed()
            except Unreachable as error:
                log.debug("no gateway to advertise", reason=str(error))
            await asyncio.sleep(_SOON_S if self.gateways is None else _AGAIN_S)

    async def _follow(self, service: str, cluster: Callable[[], ClusterAccess]) -> NoReturn:
        host, host_name = self.settings.host_address, self.settings.host_name

        def told() -> None:
            if exposure.known:
                self.gateways = (self._gateway(*exposure.address),) if exposure.address else ()
            self.warning = f"the gateway's address: {exposure.reason}" if exposure.reason else None
            self.changed()

        exposure = Exposure(cluster, service, told, host=str(host) if host else "", host_name=host_name or "")
        await exposure.run()

    async def _found(self) -> tuple[Gateway, ...]:
        if self.settings.advertised_gateway == NOWHERE:
            return ()
        return (self._gateway(*await self._address()),)

    def _gateway(self, host: str, port: int) -> Gateway:
        return Gateway(node_id=self.node_id, host=host, port=port, workers=self.settings.concurrency)

    async def _address(self) -> tuple[str, int]:
        listening = host_and_port(self.settings.gateway_address)
        if self.settings.advertised_gateway is not None:
            return host_and_port(self.settings.advertised_gateway, listening[1])
        return (await source_address(self.url()), listening[1]) if listening[0] in _ANY else listening
