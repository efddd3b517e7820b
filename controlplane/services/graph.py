"""The service graph: who called what where, how often, with what success and how fast. Pure, over rollups."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from math import inf

from controlplane.store.telemetry import Rollup

GROUPINGS = ("NONE", "NAMESPACE", "SITE", "SERVICE", "VHOST")
VHOST_PREFIX = {"http": "ves-io-http-loadbalancer-", "tcp": "ves-io-tcp-loadbalancer-"}
OUTSIDE = "N:public"
"""The service name of who calls a load balancer."""

Id = tuple[tuple[str, str], ...]
"""Of a node of the graph: (word of the API, value), sorted."""


@dataclass
class Sums:
    """Counts of some time."""

    requests: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    latency_ms: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    latency_sum_ms: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    connections: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of TCP load balancers: `ok` and `failed`."""

    def add(self, rollup: Rollup) -> None:
        counted = self.requests if rollup.protocol == "http" else self.connections
        for name, count in rollup.requests.items():
            counted[name] += count
        for bound, count in rollup.latency_ms.items():
            self.latency_ms[bound] += count
        self.latency_sum_ms += rollup.latency_sum_ms
        self.bytes_sent += rollup.bytes_sent
        self.bytes_received += rollup.bytes_received

    @property
    def total(self) -> int:
        return sum(self.requests.values())


def percentile(histogram: Mapping[str, int], share: float) -> float | None:
    """In ms, from cumulative counts by upper bound; linear inside a bucket, and the last finite bound beyond it. None without requests."""
    bounds = sorted((float(bound), count) for bound, count in histogram.items())
    if not bounds or not bounds[-1][1]:
        return None
    wanted = share * bounds[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0), *bounds]):
        if count >= wanted:
            return low if high == inf else low + (high - low) * (wanted - below) / max(count - below, 1)
    return bounds[-1][0]


def _average_latency(sums: Sums, _: float) -> float | None:
    return sums.latency_sum_ms / sums.total if sums.total else None


def _errors(*classes: str) -> Callable[[Sums, float], float | None]:
    return lambda sums, seconds: sum(sums.requests[name] for name in classes) / seconds


def _latency(share: float) -> Callable[[Sums, float], float | None]:
    return lambda sums, _: percentile(sums.latency_ms, share)


_RATE, _MS, _BITS = "UNIT_REQUESTS_PER_SECOND", "UNIT_MILLISECONDS", "UNIT_BITS_PER_SECOND"
METRICS: Mapping[str, tuple[str, Callable[[Sums, float], float | None]]] = {
    "HTTP_REQUEST_RATE": (_RATE, lambda sums, seconds: sums.total / seconds),
    "HTTP_ERROR_RATE": (_RATE, _errors("4xx", "5xx")),
    "HTTP_ERROR_RATE_4XX": (_RATE, _errors("4xx")),
    "HTTP_ERROR_RATE_5XX": (_RATE, _errors("5xx")),
    "HTTP_RESPONSE_LATENCY": (_MS, _average_latency),
    "HTTP_RESPONSE_LATENCY_PERCENTILE_50": (_MS, _latency(0.50)),
    "HTTP_RESPONSE_LATENCY_PERCENTILE_90": (_MS, _latency(0.90)),
    "HTTP_RESPONSE_LATENCY_PERCENTILE_99": (_MS, _latency(0.99)),
    "REQUEST_THROUGHPUT": (_BITS, lambda sums, seconds: 8 * sums.bytes_received / seconds),
    "RESPONSE_THROUGHPUT": (_BITS, lambda sums, seconds: 8 * sums.bytes_sent / seconds),
    "TCP_CONNECTION_RATE": (_RATE, lambda sums, seconds: sum(sums.connections.values()) / seconds),
    "TCP_ERROR_RATE": (_RATE, lambda sums, seconds: sums.connections["failed"] / seconds),
}
"""Unit, and the value for sums over so many seconds; None where there is nothing to say. Latencies are those of the load balancer."""


@dataclass(frozen=True)
class Span:
    """The time that a graph shows, in steps of equal length."""

    start: datetime
    end: datetime
    step: timedelta

    def step_of(self, at: datetime) -> datetime:
        return self.start + (at - self.start) // self.step * self.step


Series = dict[datetime, Sums]


@dataclass
class Graph:
    """Sums by step. A node's `downstream` is what arrives at it, its `upstream` what it sends on."""

    downstream: defaultdict[Id, Series] = field(default_factory=lambda: defaultdict(dict))
    upstream: defaultdict[Id, Series] = field(default_factory=lambda: defaultdict(dict))
    edges: defaultdict[tuple[Id, Id], Series] = field(default_factory=lambda: defaultdict(dict))

    @property
    def nodes(self) -> list[Id]:
        return sorted(self.downstream.keys() | self.upstream.keys())


def graph(rollups: Iterable[Rollup], span: Span, group_by: Sequence[str], names: Mapping[str, str]) -> Graph:
    """`names` of sites by id; a site that is gone keeps its id."""
    made = Graph()
    for rollup in rollups:
        step = span.step_of(rollup.bucket)
        source, destination = _source(rollup, group_by, names), _destination(rollup, group_by, names)
        for series in (made.upstream[source], made.downstream[destination], made.edges[source, destination]):
            series.setdefault(step, Sums()).add(rollup)
    return made


def _source(rollup: Rollup, group_by: Sequence[str], names: Mapping[str, str]) -> Id:
    site = names.get(rollup.source_site, rollup.source_site)
    return _chosen({"SITE": ("site", site), "SERVICE": ("service", OUTSIDE), "VHOST": ("service", OUTSIDE)}, group_by)


def _destination(rollup: Rollup, group_by: Sequence[str], names: Mapping[str, str]) -> Id:
    namespace, _, name = rollup.load_balancer.partition("/")
    words = {
        "NAMESPACE": ("namespace", namespace),
        "SITE": ("site", names.get(rollup.destination_site, rollup.destination_site)),
        "SERVICE": ("service", f"S:{name}"),
        "VHOST": ("vhost", VHOST_PREFIX[rollup.protocol] + name),
    }
    return _chosen(words, group_by)


def _chosen(words: Mapping[str, tuple[str, str]], group_by: Sequence[str]) -> Id:
    return tuple(sorted({words[group] for group in group_by if group in words}))
