"""What this node says to the control plane: heartbeats, small and often; reports, when there is something new."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import uniform
from typing import Any, NoReturn, Protocol

from agent.backoff import backoff
from agent.errors import AgentError, Refused
from agent.log import log
from agent.protocol.items import Gateway
from agent.protocol.report import (
    MOST_REJECTED,
    MOST_WARNINGS,
    DiscoveryReport,
    EdgeHealth,
    EdgeMetrics,
    GatewayListener,
    Heartbeat,
    HeartbeatAnswer,
    IpsecAbility,
    MetricsReport,
    MultiClusterServices,
    OriginHealth,
    PeerHealth,
    Rejection,
    Report,
)
from agent.proxy import ProxyState
from agent.reconcile import Verdict
from agent.tasks import woken

_FIRST_PACE_S = 3.0
_LOOK_EVERY_S = 1.0
"""For something to report."""
_PATHS_AGAIN_S = 15.0
"""Round-trip times change at every probe; they are reported so often, and states at once."""
_REASONS_LENGTH = 16_384
"""Characters of all reasons in one heartbeat, which the server takes up to 256 KiB of."""
_WARNING_LENGTH = 1_000
_TWIN_RESENDS = 3
_TWIN_WITHIN_S = 120.0
_METRICS_PACES = 2
"""Heartbeats from one report of metrics to the next: a large fleet is asked to slow down, and does so with these, too."""
_MOST_EDGES = 20_000
_EDGES_PER_REPORT = 5_000
"""Some 3 MB; the server takes 8 MiB."""
_LARGEST_DISCOVERIES = 6 << 20
"""Characters of all of them."""
_UNFIT = frozenset({400, 413})
"""Statuses that speak of what was sent, and not of who sent it."""
_UNFIT_AGAIN_S = 300.0
"""What was refused is sent again when it is different, or so much later: the control plane may be another one by then."""


class Listener(Protocol):
    """The part of `control.ControlPlane` that is needed here."""

    async def heartbeat(self, body: Heartbeat) -> HeartbeatAnswer: ...
    async def report(self, body: Report) -> None: ...


class Signs(Protocol):
    """What there is to say."""

    @property
    def verdict(self) -> Verdict: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    @property
    def proxy(self) -> ProxyState: ...
    @property
    def gateways(self) -> tuple[Gateway, ...] | None: ...
    @property
    def gateway_listener(self) -> GatewayListener: ...
    @property
    def ipsec(self) -> IpsecAbility | None: ...
    @property
    def discoveries(self) -> tuple[DiscoveryReport, ...]: ...
    @property
    def multi_cluster_services(self) -> MultiClusterServices | None: ...
    @property
    def origins(self) -> tuple[OriginHealth, ...] | None: ...
    @property
    def peers(self) -> tuple[PeerHealth, ...]: ...
    @property
    def edges(self) -> tuple[EdgeHealth, ...]: ...
    @property
    def issuer(self) -> str: ...
    @property
    def pace_s(self) -> float:
        """Between two heartbeats."""


@dataclass
class Heartbeats:
    """At the server's pace, and at once after `beat`."""

    control: Listener
    signs: Signs
    boot_id: str
    version: str
    on_resend: Callable[[], None]
    on_renew: Callable[[], None]
    on_return: Callable[[], None]
    """The control plane answers again."""
    pace_s: float = field(default=_FIRST_PACE_S, init=False)
    last_error: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._wake = asyncio.Event()
        self._sequence = 0
        self._resends: deque[float] = deque(maxlen=_TWIN_RESENDS)

    @property
    def warning(self) -> str | None:
        """The control plane forgets this boot again and again only when another boot of the node speaks in between."""
        often = len(self._resends) == _TWIN_RESENDS and _now() - self._resends[0] < _TWIN_WITHIN_S
        return "another agent runs with a copy of this state directory" if often else None

    def beat(self) -> None:
        self._wake.set()

    async def run(self) -> NoReturn:
        while True:
            self._wake.clear()
            pause = uniform(0.8, 1.0) * self.pace_s
            try:
                answer = await self.control.heartbeat(self._heartbeat())
            except AgentError as error:
                self.last_error = str(error)
                pause = max(pause, error.retry_after_s)
            else:
                if self.last_error:
                    self.on_return()
                self.last_error, self.pace_s = "", max(answer.pace_s, 0.1)
                if answer.resend:
                    self._resends.append(_now())
                    self.on_resend()
                if answer.renew:
                    self.on_renew()
            await woken(self._wake, pause)

    def _heartbeat(self) -> Heartbeat:
        verdict = self.signs.verdict
        self._sequence += 1
        return Heartbeat(
            boot_id=self.boot_id,
            sequence=self._sequence,
            sent_at=time.time(),
            applied_hash=verdict.applied_hash if len(verdict.rejected) <= MOST_REJECTED else None,
            applied_revision=verdict.applied_revision,
            rejected=_shortened(verdict.rejected),
            proxy=self.signs.proxy,
            warnings=tuple(warning[:_WARNING_LENGTH] for warning in self.signs.warnings[:MOST_WARNINGS]),
            version=self.version,
            issuer=self.signs.issuer,
        )


@dataclass
class Reports:
    """Sections that changed since they were last sent. What cannot be sent stays to be sent; only the latest is kept.

    A section that is refused holds back no other.
    """

    control: Listener
    signs: Signs
    boot_id: str
    metrics: "Metrics"

    def __post_init__(self) -> None:
        self._wake = asyncio.Event()
        self._sent: dict[str, Any] = {}

    def resend(self) -> None:
        """The server knows nothing of this boot."""
        self._sent.clear()
        self._wake.set()

    def look(self) -> None:
        self._wake.set()

    async def run(self) -> NoReturn:
        delays = backoff(1.0, 30.0)
        while True:
            self._wake.clear()
            try:
                await self.step()
            except AgentError as error:
                if isinstance(error, Refused):
                    log.warning("a report is refused", reason=str(error))
                await asyncio.sleep(max(next(delays), error.retry_after_s))
            else:
                delays = backoff(1.0, 30.0)
                await woken(self._wake, _LOOK_EVERY_S)

    async def step(self) -> None:
        """Send what is new, if there is any."""
        sections = self._sections()
        told = {name: _told(name, value) for name, value in sections.items()}
        changed = {name: value for name, value in sections.items() if name not in self._sent or self._sent[name] != told[name]}
        if "discoveries" in changed:
            changed["discoveries"] = _fitting(changed["discoveries"])
        metrics = self.metrics.due(_METRICS_PACES * self.signs.pace_s)
        if metrics is not None:
            changed["metrics"] = metrics
        if not changed:
            return
        try:
            await self._send(changed, told)
        except Refused as error:
            if error.status not in _UNFIT:
                raise
            await self._send_one_by_one(changed, told)

    async def _send(self, sections: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        await self.control.report(Report(boot_id=self.boot_id, **sections))
        self._settle(sections, told)

    async def _send_one_by_one(self, sections: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        for name, value in sections.items():
            try:
                await self._send({name: value}, told)
            except Refused as error:
                if error.status not in _UNFIT:
                    raise
                log.warning("a report is refused", section=name, reason=str(error))
                self._settle((name,), told)
                asyncio.get_running_loop().call_later(_UNFIT_AGAIN_S, self._sent.pop, name, None)

    def _settle(self, names: Collection[str], told: Mapping[str, Any]) -> None:
        """They need no more care while they stay the same."""
        self._sent |= {name: told[name] for name in names if name in told}
        if "metrics" in names:
            self.metrics.delivered()

    def _sections(self) -> Mapping[str, Any]:
        """All that is known."""
        sections = {
            "gateways": self.signs.gateways,
            "gateway_listener": self.signs.gateway_listener,
            "ipsec": self.signs.ipsec,
            "discoveries": self.signs.discoveries,
            "multi_cluster_services": self.signs.multi_cluster_services,
            "origins": self.signs.origins,
            "peers": self.signs.peers,
            "edges": self.signs.edges,
        }
        return {name: value for name, value in sections.items() if value is not None}


_KEPT = {
    "peers": ("site_id", "path", "state", "since", "in_use", "tls"),
    "edges": ("site_id", "state", "since", "tunnels"),
}


def _told(name: str, value: Sequence[Any]) -> Any:
    """What makes a section worth sending again."""
    if name not in _KEPT:
        return value
    states = tuple((*(getattr(it, field) for field in _KEPT[name]), bool(it.error)) for it in value)
    return states, int(_now() / _PATHS_AGAIN_S) if states else 0


def _fitting(reports: tuple[DiscoveryReport, ...]) -> tuple[DiscoveryReport, ...]:
    """With only the first services of each, if all of them are too much for one report."""
    fitting, share = reports, 1.0
    while (size := sum(len(report.model_dump_json(exclude_none=True)) for report in fitting)) > _LARGEST_DISCOVERIES and share > 0.001:
        share *= 0.9 * _LARGEST_DISCOVERIES / size
        fitting = tuple(_with_first(report, share) for report in reports)
    return fitting


def _with_first(report: DiscoveryReport, share: float) -> DiscoveryReport:
    services = report.services or ()
    if not services:
        return report
    first = services[: int(share * len(services))]
    reason = f"only {len(first)} of {len(services)} services are listed, for all clusters together have too many; {report.reason}"
    return report.model_copy(update={"services": first, "reason": reason.rstrip("; ")})


def _now() -> float:
    return asyncio.get_running_loop().time()


class Metrics:
    """Differences of Envoy's counters, added up until the control plane has them.

    A report that may have been lost is sent again as it was, under its sequence; meanwhile the rest adds up, one entry for each
    load balancer and destination.
    """

    def __init__(self) -> None:
        self._gathered: dict[tuple[str, str, str], EdgeMetrics] = {}
        self._since = _now()
        self._pending: MetricsReport | None = None
        self._sequence = 0

    def add(self, edges: Sequence[EdgeMetrics]) -> None:
        for edge in edges:
            key = (edge.load_balancer, edge.protocol, edge.destination)
            held = self._gathered.get(key)
            if held is not None or len(self._gathered) < _MOST_EDGES:
                self._gathered[key] = edge if held is None else _sum(held, edge)

    def due(self, every_s: float) -> MetricsReport | None:
        """The report that is to be sent now."""
        now = _now()
        if self._pending is None and self._gathered and now - self._since >= every_s:
            self._sequence += 1
            keys = sorted(self._gathered)[:_EDGES_PER_REPORT]
            edges = tuple(self._gathered.pop(key) for key in keys)
            self._pending = MetricsReport(sequence=self._sequence, edges=edges)
            self._since = now
        return self._pending

    def delivered(self) -> None:
        """The pending report needs no more care: the server has it, or will never take it."""
        self._pending = None


def _sum(one: EdgeMetrics, other: EdgeMetrics) -> EdgeMetrics:
    return one.model_copy(
        update={
            "requests": _added(one.requests, other.requests),
            "latency_ms": _added(one.latency_ms, other.latency_ms),
            "latency_sum_ms": one.latency_sum_ms + other.latency_sum_ms,
            "bytes_sent": one.bytes_sent + other.bytes_sent,
            "bytes_received": one.bytes_received + other.bytes_received,
        }
    )


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in [*one, *(name for name in other if name not in one)]}


def _shortened(rejected: Sequence[Rejection]) -> tuple[Rejection, ...]:
    """As many as can be told, their reasons short enough to fit together."""
    told = rejected[:MOST_REJECTED]
    length = _REASONS_LENGTH // max(len(told), 1)
    return tuple(rejection.model_copy(update={"reason": rejection.reason[:length]}) for rejection in told)
