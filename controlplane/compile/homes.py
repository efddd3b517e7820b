"""Which two regional edges a customer edge is connected to. It stays with those that it has as long as they are good."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import asin, cos, inf, radians, sin, sqrt
from typing import Any

HOMES = 2
_BREAKER = 0.3
"""When more of all edges than these look lost at once, and more than one, it is more likely the one who looks that is."""


@dataclass(frozen=True)
class Candidate:
    """A regional edge as the control plane sees it."""

    id: str
    name: str
    coordinates: tuple[float, float] | None
    """Latitude and longitude, in degrees."""
    usable: bool
    """Heard of within its lease, with a live proxy and a gateway."""
    lost: bool
    """Known not to live."""
    draining: bool = False


def basis(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a site's spec decides. When it changes, its edges are chosen anew."""
    at = spec.get("coordinates") or {}
    primary = ((spec.get("re_select") or {}).get("specific_re") or {}).get("primary_re")
    return {"latitude": at.get("latitude"), "longitude": at.get("longitude"), "primary_re": primary}


def trusted(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """With nobody lost when too many look it."""
    lost = sum(edge.lost for edge in candidates)
    if lost > max(1, _BREAKER * len(candidates)):
        return tuple(replace(edge, lost=False) for edge in candidates)
    return tuple(candidates)


def choose(
    wanted: Mapping[str, Any], candidates: Iterable[Candidate], current: Sequence[str], connected: Collection[str]
) -> tuple[str, ...]:
    """Ids in the order of use. `wanted` is a `basis`; `current` what was chosen by the same one, `connected` to which tunnels are known to be up.

    An edge that has to be left, but lives, is left only when the others are connected: the new path is up before the old one closes.
    Where there are too few good ones, those that are not stay.
    """
    known = {edge.id: edge for edge in candidates}
    good = sorted(
        (edge for edge in known.values() if edge.usable and not edge.lost and not edge.draining), key=lambda edge: _rank(edge, wanted)
    )
    kept = [edge for edge in current if edge in known and not known[edge].lost and not known[edge].draining]
    primary = [edge.id for edge in good if edge.name == wanted["primary_re"]]
    chosen = tuple(dict.fromkeys((*primary, *kept, *(edge.id for edge in good))))[:HOMES]
    leaving = tuple(edge for edge in current if edge in known and edge not in chosen)
    if len(chosen) < HOMES:
        leaving = leaving[: HOMES - len(chosen)]
    elif all(edge in connected for edge in chosen):
        leaving = ()
    else:
        leaving = tuple(edge for edge in leaving if not known[edge].lost)[:HOMES]
    return chosen + leaving


def _rank(edge: Candidate, wanted: Mapping[str, Any]) -> tuple[float, str]:
    """Nearest first. Whoever is nowhere is as far from everybody as can be."""
    if edge.coordinates is None or wanted["latitude"] is None:
        return inf, edge.id
    return great_circle((wanted["latitude"], wanted["longitude"]), edge.coordinates), edge.id


def great_circle(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Between two places in degrees, as an angle in radians."""
    (one_latitude, one_longitude), (other_latitude, other_longitude) = (map(radians, place) for place in (one, other))
    across = sin((other_longitude - one_longitude) / 2) ** 2 * cos(one_latitude) * cos(other_latitude)
    return 2 * asin(min(1.0, sqrt(sin((other_latitude - one_latitude) / 2) ** 2 + across)))
