"""What Envoy counted: its admin output into cumulative counters, and the difference of two readings into what is reported."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.envoy.access import PREFIX
from agent.envoy.names import Protocol
from agent.protocol.report import EdgeMetrics

PATH = rf"/stats/prometheus?filter=^({PREFIX}\.|server\.uptime$)"
"""Of Envoy's admin interface; its answer is what `parse` reads."""

_SAMPLE = re.compile(rf"^envoy_{PREFIX}_(?P<protocol>http|tcp)_(?P<what>\w+)\{{(?P<labels>.*)\}} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_UPTIME = re.compile(r"^envoy_server_uptime\{[^}]*\} (\d+)$", re.MULTILINE)
_ABSENT = "-"
"""What Envoy writes for a value that there is none of."""
_CLIENT_LEFT = "4xx"
"""Class of requests that got no response because the client did not wait for it."""


class EdgeKey(NamedTuple):
    protocol: Protocol
    load_balancer: str
    destination: str
    """Id of the site that served; empty when none did."""


@dataclass(frozen=True)
class Edge:
    """Cumulative, from Envoy's start."""

    requests: Mapping[str, int] = field(default_factory=dict)
    latency_ms: Mapping[str, int] = field(default_factory=dict)
    latency_sum_ms: float = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True)
class Reading:
    uptime_s: int
    edges: Mapping[EdgeKey, Edge]


@dataclass
class _Draft:
    requests: dict[str, int] = field(default_factory=dict)
    latency_ms: dict[str, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def finished(self, protocol: Protocol) -> Edge:
        if protocol == "tcp":
            failed = int(self.totals.get("failed", 0))
            self.requests = {"ok": int(self.totals.get("connections", 0)) - failed, "failed": failed}
        return Edge(
            self.requests,
            self.latency_ms,
            self.totals.get("ms_sum", 0),
            int(self.totals.get("sent", 0)),
            int(self.totals.get("received", 0)),
        )


def parse(text: str) -> Reading:
    """Of the answer to a GET of `PATH`; lines that are not about us are skipped."""
    drafts: dict[EdgeKey, _Draft] = {}
    for sample in _SAMPLE.finditer(text):
        labels = dict(_LABEL.findall(sample["labels"]))
        site = "" if labels["site"] == _ABSENT else labels["site"]
        key = EdgeKey("http" if sample["protocol"] == "http" else "tcp", labels["lb"], site)
        _add(drafts.setdefault(key, _Draft()), sample["what"], labels, float(sample["value"]))
    uptime = _UPTIME.search(text)
    return Reading(int(uptime[1]) if uptime else 0, {key: draft.finished(key.protocol) for key, draft in sorted(drafts.items())})


def _add(draft: _Draft, what: str, labels: Mapping[str, str], value: float) -> None:
    if what == "requests":
        status_class = _CLIENT_LEFT if labels["class"] == _ABSENT else f"{labels['class']}xx"
        draft.requests[status_class] = draft.requests.get(status_class, 0) + int(value)
    elif what == "ms_bucket":
        draft.latency_ms["inf" if labels["le"] == "+Inf" else labels["le"]] = int(value)
    else:
        draft.totals[what] = value


def difference(old: Reading | None, new: Reading) -> tuple[EdgeMetrics, ...]:
    """What was counted between two readings, edges without any change left out.

    Nothing without an earlier reading, for whoever took that may have reported it. After a restart of Envoy everything counts from zero.
    """
    if old is None:
        return ()
    before = old.edges if new.uptime_s >= old.uptime_s else {}
    found = (_edge(key, before.get(key, Edge()), edge) for key, edge in new.edges.items())
    return tuple(edge for edge in found if _counted(edge))


def _edge(key: EdgeKey, old: Edge, new: Edge) -> EdgeMetrics:
    if _went_back(old, new):
        old = Edge()
    return EdgeMetrics(
        load_balancer=key.load_balancer,
        protocol=key.protocol,
        destination=key.destination,
        requests=_grown(old.requests, new.requests),
        latency_ms={bound: count - old.latency_ms.get(bound, 0) for bound, count in new.latency_ms.items()},
        latency_sum_ms=new.latency_sum_ms - old.latency_sum_ms,
        bytes_sent=new.bytes_sent - old.bytes_sent,
        bytes_received=new.bytes_received - old.bytes_received,
    )


def _went_back(old: Edge, new: Edge) -> bool:
    """Envoy forgets what was counted when the last listener that counted it goes."""
    return any(after < before for before, after in _pairs(old, new))


def _pairs(old: Edge, new: Edge) -> Iterable[tuple[float, float]]:
    yield old.bytes_sent, new.bytes_sent
    yield old.bytes_received, new.bytes_received
    for name, before in old.requests.items():
        yield before, new.requests.get(name, 0)
    for bound, before in old.latency_ms.items():
        yield before, new.latency_ms.get(bound, 0)


def _grown(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, int]:
    return {name: count - old.get(name, 0) for name, count in new.items() if count > old.get(name, 0)}


def _counted(edge: EdgeMetrics) -> bool:
    return bool(edge.requests or edge.bytes_sent or edge.bytes_received or edge.latency_ms.get("inf"))
