"""Where peers may dial this node, which may change while it runs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from agent.control import source_address
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
    gateways: tuple[Gateway, ...] | None = field(default=None, init=False)
    """None: not known yet."""

    async def run(self) -> NoReturn:
        while True:
            try:
                self.gateways = await self._found()
                self.changed()
            except Unreachable as error:
                log.debug("no gateway to advertise", reason=str(error))
            await asyncio.sleep(_SOON_S if self.gateways is None else _AGAIN_S)

    async def _found(self) -> tuple[Gateway, ...]:
        if self.settings.advertised_gateway == NOWHERE:
            return ()
        host, port = await self._address()
        return (Gateway(node_id=self.node_id, host=host, port=port, workers=self.settings.concurrency),)

    async def _address(self) -> tuple[str, int]:
        listening = host_and_port(self.settings.gateway_address)
        if self.settings.advertised_gateway is not None:
            return host_and_port(self.settings.advertised_gateway, listening[1])
        return (await source_address(self.url()), listening[1]) if listening[0] in _ANY else listening
