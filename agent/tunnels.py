"""What Envoy's statistics say of tunnels: how they are encrypted, and how many this node keeps to each regional edge."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.envoy.bootstrap import DIALLED_TUNNELS

FILTER = rf"^(cluster\.(site|path|edge)\|.*\.ssl\.(versions|ciphers|curves)\.|{DIALLED_TUNNELS}\.worker_.*\.cluster\.tunnels)"
"""Of the statistics that are read here."""
_ENCRYPTION = re.compile(
    r"^cluster\.(site\|(?P<only>[^|.]+)|path\|(?P<site>[^|.]+)\|(?P<path>[^|.]+)|edge\|(?P<edge>[^|.]+))"
    r"\.ssl\.(?P<what>versions|ciphers|curves)\.(?P<name>[^:]+): (?P<count>\d+)$",
    re.MULTILINE,
)
_ORDER = ("versions", "ciphers", "curves")
_DIALLED = re.compile(rf"^{DIALLED_TUNNELS}\.worker_\d+\.cluster\.tunnels\|(?P<site>[^|.]+)\.connected: (?P<count>\d+)$", re.MULTILINE)
_OF_ANY_PATH = "*"
"""Where there is one path alone, Envoy has no cluster of its own for it."""


@dataclass(frozen=True)
class Tunnels:
    """To one regional edge."""

    count: int
    since: float
    """Unix seconds: for so long there are some, or none."""


@dataclass(frozen=True)
class Encryption:
    """TLS version, cipher and key exchange, each the one that was negotiated most often."""

    found: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def of(self, site: str, path: str) -> str:
        """Of a path to a peer, or of an edge by the path without a name; empty if it is not known."""
        return self.found.get((site, path)) or (self.found.get((site, _OF_ANY_PATH), "") if path == "direct" else "")


def encryption(text: str) -> Encryption:
    counts: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for match in _ENCRYPTION.finditer(text):
        site = match["only"] or match["site"] or match["edge"]
        key = (site, _OF_ANY_PATH if match["only"] else match["path"] or "")
        if count := int(match["count"]):
            counts.setdefault(key, {}).setdefault(match["what"], {})[match["name"]] = count
    return Encryption({key: " ".join(_most(found[what]) for what in _ORDER if what in found) for key, found in counts.items()})


def _most(counts: Mapping[str, int]) -> str:
    return max(counts, key=counts.__getitem__)


def dialled(text: str, before: Mapping[str, Tunnels], now: float) -> dict[str, Tunnels]:
    """By site, of all of Envoy's workers."""
    counts: Counter[str] = Counter()
    for match in _DIALLED.finditer(text):
        counts[match["site"]] += int(match["count"])
    return {site: Tunnels(count, _since(count, before.get(site), now)) for site, count in counts.items()}


def _since(count: int, before: Tunnels | None, now: float) -> float:
    return before.since if before is not None and bool(before.count) == bool(count) else now
