"""What a load balancer needs to be called from the public, at regional edges that tenants share."""

from collections.abc import Collection, Iterable, Iterator

from controlplane.compile.listeners import Placement
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import Condition
from controlplane.resources.claim import Claim

SHARED_PORTS = {"http": 80, "https": 443}
"""Where all tenants' names are served by protocol. Any other port has to belong to the tenant, as a name does."""


def needed(claims: Iterable[Claim]) -> frozenset[str]:
    """Names that must belong to whoever claims this on an edge: domains without `*.`, and ports, written `:8443`."""
    return frozenset(name for claim in claims for name in _needed(claim))


def covers(owned: Collection[str], name: str) -> bool:
    """Whether the name belongs to who owns these: itself, or with what it is under."""
    labels = name.split(".")
    return any(".".join(labels[start:]) in owned for start in range(len(labels)))


def missing(claims: Iterable[Claim], owned: Collection[str]) -> tuple[str, ...]:
    """Sorted."""
    return tuple(sorted(name for name in needed(claims) if not covers(owned, name)))


def barred(placement: Placement, topology: Topology, owned: frozenset[str]) -> Condition | None:
    """Why a load balancer may not be on regional edges."""
    if topology.edges.isdisjoint(placement.claims):
        return None
    claims = [claim for site_id in placement.claims.keys() & topology.edges for claim in placement.claims[site_id]]
    names = missing(claims, owned)
    if not names:
        return None
    message = f"not on regional edges, as {', '.join(names)} does not belong to this tenant"
    return Condition(*placement.target, "NotYours", message)


def _needed(claim: Claim) -> Iterator[str]:
    if claim.port != SHARED_PORTS.get(claim.protocol):
        yield f":{claim.port}"
    if claim.domain:
        yield claim.domain.removeprefix("*.")
