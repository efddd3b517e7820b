"""Why one site reaches another as it does, and what would make it direct: in words. Pure."""

from dataclasses import dataclass

from controlplane.services.topology import DOWN, UNKNOWN, UP, Between, Link

DIRECT, REVERSE = "direct", "reverse"
IPSEC = "ipsec"


@dataclass(frozen=True)
class Answer:
    path: str
    """`direct`, `reverse`, the name of a regional edge, `mixed` if the nodes of the site differ; empty: none."""
    direct: bool
    why: str
    to_be_direct: str
    """What would make it direct; empty if it is."""


def explain(between: Between) -> Answer:
    used = [link for link in between.links if link.report.in_use and link.status != UNKNOWN]
    names = sorted({named(link) for link in used})
    path = "" if not names else names[0] if len(names) == 1 else "mixed"
    direct = bool(used) and all(not link.edge for link in used)
    why = _why(between, used) + (f"; site {between.destination.metadata.name} counts as lost" if between.lost else "")
    return Answer(path, direct, why, "" if direct else _remedy(between))


def named(link: Link) -> str:
    return link.edge or link.report.path


def _why(between: Between, used: list[Link]) -> str:
    source, destination = between.source.metadata.name, between.destination.metadata.name
    if used:
        said = {(named(link), link.report.reason or "it is in use") for link in used}
        return "; ".join(f"{name}: {reason}" for name, reason in sorted(said))
    if between.silent:
        return f"unknown: {between.silent}"
    if not between.called:
        return f"no path is kept: no load balancer at {source} has origins at {destination}, or the other way round"
    if between.links and all(link.status == DOWN for link in between.links):
        return "; ".join(f"{named(link)} is down: {link.report.error or 'no answer'}" for link in between.links)
    if stale := next((link.stale for link in between.links if link.stale), ""):
        return f"unknown: {stale}"
    if between.links:
        return "no path has answered yet"
    if between.encapsulations == {IPSEC} and between.no_ipsec:
        return f"the tunnel must be IPsec, and {between.no_ipsec}"
    if between.meshes or between.at_edges:
        return f"{source} has not told of any path to {destination} yet"
    return f"there is none: no site mesh group joins both, and {destination} has no regional edge"


def _remedy(between: Between) -> str:
    """The first obstacle."""
    source, destination = between.source.metadata.name, between.destination.metadata.name
    if not between.meshes:
        if between.together:
            spokes = between.together[0]
            return f"both are spokes of site mesh group {spokes}, which reach each other through regional edges: make one a hub, or join both in a full_mesh"
        return f"no site mesh group joins {source} and {destination}: select both in the virtual_site of one"
    if not between.encapsulations:
        return f"the tunnel types of {source}, {destination} and their site mesh group have nothing in common: change one of them"
    only_ipsec = between.encapsulations == {IPSEC}
    if only_ipsec and between.no_ipsec:
        return f"the tunnel must be IPsec, and {between.no_ipsec}"
    direct = [link for link in between.links if link.report.path == (IPSEC if only_ipsec else DIRECT)]
    if down := next((link for link in direct if link.status == DOWN), None):
        end = "IKE daemon" if only_ipsec else "gateway"
        return f"the direct path fails ({down.report.error or 'no answer'}): let {source} reach the {end} of {destination}"
    if held := next((link for link in direct if link.status == UP and not link.report.in_use), None):
        return f"the direct path answers; {held.report.reason or 'it is used again soon'}"
    if not between.has_gateway and not only_ipsec:
        return f"{destination} tells no address at which it can be dialled: give its nodes an advertised gateway, or let them dial {source}"
    return between.silent or f"nothing is in the way: group {between.meshes[0]} joins both"
