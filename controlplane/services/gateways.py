"""The ports of nodes' own gateways, on which no load balancer can listen.

Each node tells where its gateway listens. Of one that has not told yet nothing is known: then its agent refuses the listener.
"""

from collections.abc import Collection, Iterator
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.report import GatewayListener
from controlplane.compile.claims import claims
from controlplane.compile.snapshot import Condition
from controlplane.resources.base import Stored
from controlplane.resources.claim import Place
from controlplane.services.view import View
from controlplane.store import nodes

_EVERY = ("0.0.0.0", "::")  # noqa: S104 - to recognise them


async def taken(session: AsyncSession, tenant_id: UUID, wanted: Collection[Place]) -> dict[Place, str]:
    """Those of the places that some gateway has, with the name of its node."""
    if not wanted:
        return {}
    sites, ports = {UUID(place.site_id) for place in wanted}, {place.port for place in wanted}
    listening = await nodes.gateway_listeners(session, tenant_id, sites, ports)
    at_sites = {(site_id, name): GatewayListener.model_validate(listener) for site_id, name, listener in listening}
    return {
        place: name
        for place in wanted
        for (site_id, name), listener in at_sites.items()
        if site_id == place.site_id and _has(listener, place)
    }


def conflicts(load_balancer: Stored[Any], view: View) -> Iterator[Condition]:
    """Sites where a load balancer asks for the port of a gateway: it came there by a label, or the node after it."""
    told = view.fleet.gateway_listeners
    ports = {listener.port for by_node in told.values() for listener in by_node.values()}
    for place in sorted({claim.place for claim in claims(load_balancer, view.intent) if claim.port in ports}):
        for name, listener in told.get(place.site_id, {}).items():
            if _has(listener, place):
                message = f"at site {view.sites[place.site_id].metadata.name} {described(place, name)}"
                yield Condition(load_balancer.kind, load_balancer.key, "Conflicted", message, place.site_id)


def described(place: Place, node: str) -> str:
    """Who has a place."""
    return f"{place.network} port {place.port} belongs to the gateway of node {node}"


def _has(listener: GatewayListener, place: Place) -> bool:
    if listener.port != place.port:
        return False
    return listener.address in (place.address, *_EVERY) if place.address else place.network in listener.networks
