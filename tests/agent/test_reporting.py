"""What a node says and when, in virtual time, to a control plane that keeps what it hears."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from agent.errors import AgentError, Busy, Refused, Unreachable
from agent.protocol.items import Gateway, ItemKind
from agent.protocol.report import (
    MOST_REJECTED,
    DiscoveredService,
    DiscoveryReport,
    EdgeHealth,
    EdgeMetrics,
    GatewayListener,
    Heartbeat,
    HeartbeatAnswer,
    IpsecAbility,
    MultiClusterServices,
    OriginHealth,
    PeerHealth,
    Rejection,
    Report,
)
from agent.proxy import ProxyState
from agent.reconcile import Verdict
from agent.reporting import Heartbeats, Metrics, Reports

pytestmark = pytest.mark.looptime
EDGE = EdgeMetrics(
    load_balancer="n/lb",
    protocol="http",
    destination="there",
    requests={"2xx": 3},
    latency_ms={"5": 2, "inf": 3},
    latency_sum_ms=9.0,
    bytes_sent=10,
)


@dataclass
class Hearer:
    beats: list[tuple[float, Heartbeat]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    failure: AgentError | None = None
    refuses: str = ""
    """Name of a section."""
    loses_answers: bool = False
    answer: HeartbeatAnswer = field(default_factory=lambda: HeartbeatAnswer(pace_s=3, now=0))

    async def heartbeat(self, body: Heartbeat) -> HeartbeatAnswer:
        self.beats.append((asyncio.get_running_loop().time(), body))
        if self.failure is not None:
            raise self.failure
        return self.answer

    async def report(self, body: Report) -> None:
        if self.failure is not None:
            raise self.failure
        if self.refuses in body.model_fields_set:
            raise Refused("400: the body is too large", 400)
        self.reports.append(body)
        if self.loses_answers:
            raise Unreachable("the answer got lost")


@dataclass
class Said:
    verdict: Verdict = field(default_factory=lambda: Verdict(applied_hash="h", applied_revision=7))
    warnings: tuple[str, ...] = ()
    proxy: ProxyState = "live"
    gateways: tuple[Gateway, ...] | None = None
    gateway_listener: GatewayListener = field(default_factory=lambda: GatewayListener(address="0.0.0.0", port=15443))
    ipsec: IpsecAbility | None = None
    discoveries: tuple[DiscoveryReport, ...] = ()
    multi_cluster_services: MultiClusterServices | None = None
    origins: tuple[OriginHealth, ...] | None = None
    peers: tuple[PeerHealth, ...] = ()
    edges: tuple[EdgeHealth, ...] = ()
    issuer: str = "ab"
    pace_s: float = 5


@asynccontextmanager
async def running(loop: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(loop)
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def heartbeats(hearer: Hearer, said: Said, resent: list[int] | None = None) -> Heartbeats:
    again = [] if resent is None else resent
    return Heartbeats(hearer, said, "boot", "0", lambda: again.append(1), lambda: None, lambda: None)


def reports(hearer: Hearer, said: Said) -> Reports:
    return Reports(hearer, said, "boot", Metrics())


async def test_a_heartbeat_stays_short_and_claims_nothing_that_it_cannot_tell() -> None:
    hearer, reason = Hearer(), "because " * 500
    for count, told, applied in ((1, 1, "h"), (MOST_REJECTED, MOST_REJECTED, "h"), (MOST_REJECTED + 1, MOST_REJECTED, None)):
        rejected = tuple(
            Rejection(kind=ItemKind.HTTP_LOADBALANCER, key=f"n/{number:0>298}", hash="0" * 32, reason=reason) for number in range(count)
        )
        said = Said(verdict=Verdict(applied_hash="h", applied_revision=7, rejected=rejected), warnings=("careful " * 500,) * 20)
        async with running(heartbeats(hearer, said).run()):
            await asyncio.sleep(0.1)
        beat = Heartbeat.model_validate_json(hearer.beats[-1][1].model_dump_json())
        assert (len(beat.rejected), beat.applied_hash) == (told, applied)
        assert len(beat.model_dump_json()) < 256 << 10


async def test_the_first_heartbeat_goes_at_once_and_others_at_the_servers_pace() -> None:
    hearer = Hearer(answer=HeartbeatAnswer(pace_s=10, now=0))
    async with running(heartbeats(hearer, Said()).run()):
        assert len(hearer.beats) == 1
        await asyncio.sleep(100)
    assert 10 <= len(hearer.beats) <= 13
    assert [beat.sequence for _, beat in hearer.beats] == list(range(1, len(hearer.beats) + 1))


async def test_a_new_verdict_is_told_at_once() -> None:
    hearer, said = Hearer(), Said()
    beating = heartbeats(hearer, said)
    async with running(beating.run()):
        await asyncio.sleep(0.5)
        rejected = (Rejection(kind=ItemKind.ORIGIN_POOL, key="n/p", hash="x", reason="no"),)
        said.verdict = Verdict(applied_hash="i", applied_revision=8, rejected=rejected)
        beating.beat()
        await asyncio.sleep(0.001)
        at, last = hearer.beats[-1]
    assert at < 0.6
    assert (last.applied_hash, last.applied_revision, last.rejected) == ("i", 8, rejected)


async def test_an_outage_is_met_with_patience_and_ends_with_the_next_beat() -> None:
    hearer = Hearer(failure=Unreachable("gone"))
    beating = heartbeats(hearer, Said())
    async with running(beating.run()):
        await asyncio.sleep(600)
        assert len(hearer.beats) < 300
        assert beating.last_error == "gone"
        hearer.failure = None
        await asyncio.sleep(3.1)
        assert beating.last_error == ""


async def test_who_is_asked_to_wait_waits() -> None:
    hearer = Hearer(failure=Busy("too many", retry_after_s=30))
    async with running(heartbeats(hearer, Said()).run()):
        await asyncio.sleep(29)
    assert len(hearer.beats) == 1


async def test_a_server_that_knows_nothing_of_this_boot_gets_everything_again() -> None:
    hearer, said = Hearer(), Said(origins=(OriginHealth(pool="n/p", healthy=1, total=2),))
    reporting = reports(hearer, said)
    beating = Heartbeats(hearer, said, "boot", "0", reporting.resend, lambda: None, lambda: None)
    async with running(reporting.run()), running(beating.run()):
        await asyncio.sleep(10)
        assert len(hearer.reports) == 1
        hearer.answer = HeartbeatAnswer(pace_s=3, now=0, resend=True)
        await asyncio.sleep(4)
    assert len(hearer.reports) >= 2
    assert hearer.reports[-1] == hearer.reports[0]


async def test_only_what_changed_is_reported() -> None:
    hearer, said = Hearer(), Said(gateways=(Gateway(node_id="n", host="10.0.0.1", port=15443),))
    async with running(reports(hearer, said).run()):
        await asyncio.sleep(60)
        assert [report.gateways for report in hearer.reports] == [said.gateways]
        said.origins = (OriginHealth(pool="n/p", healthy=1, total=2),)
        await asyncio.sleep(2)
    assert hearer.reports[-1].origins == said.origins
    assert hearer.reports[-1].gateways is None
    assert len(hearer.reports) == 2


async def test_round_trip_times_are_told_now_and_then_and_states_at_once() -> None:
    hearer, said = Hearer(), Said()
    async with running(reports(hearer, said).run()):
        for rtt_ms in range(60):
            said.peers = (PeerHealth(site_id="there", state="UP", since=0.0, rtt_ms=rtt_ms),)
            await asyncio.sleep(1)
        assert 4 <= len(hearer.reports) <= 7
        said.peers = (PeerHealth(site_id="there", state="DOWN", since=60.0),)
        await asyncio.sleep(1.5)
    assert hearer.reports[-1].peers == said.peers


async def test_what_could_not_be_reported_is_still_to_be_reported() -> None:
    hearer, said = Hearer(failure=Unreachable("gone")), Said(origins=())
    async with running(reports(hearer, said).run()):
        await asyncio.sleep(300)
        assert hearer.reports == []
        said.origins = (OriginHealth(pool="n/p", healthy=1, total=1),)
        hearer.failure = None
        await asyncio.sleep(31)
    assert [report.origins for report in hearer.reports] == [said.origins]


async def test_a_refused_report_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with running(reports(Hearer(failure=Refused("400: gateways[0]", 400)), Said()).run()):
        await asyncio.sleep(300)
    logs = [record for record in caplog.records if record.name == "isthmus"]
    assert 1 <= len(logs) < 100
    assert "gateways[0]" in logs[0].__dict__["fields"]["reason"]


async def test_a_section_that_is_refused_holds_back_no_other_and_is_told_later(caplog: pytest.LogCaptureFixture) -> None:
    hearer, metrics = Hearer(refuses="discoveries"), Metrics()
    metrics.add([EDGE])
    await asyncio.sleep(30)
    said = Said(gateways=(Gateway(node_id="n", host="192.0.2.1", port=1),), ipsec=IpsecAbility(able=True))
    async with running(Reports(hearer, said, "boot", metrics).run()):
        await asyncio.sleep(60)
        told = [name for report in hearer.reports for name in sorted(report.model_fields_set - {"boot_id"})]
        assert sorted(told) == ["edges", "gateway_listener", "gateways", "ipsec", "metrics", "peers"]
        assert {record.__dict__["fields"]["section"] for record in caplog.records if record.name == "isthmus"} == {"discoveries"}
        hearer.refuses = ""
        await asyncio.sleep(400)
    assert [report.discoveries for report in hearer.reports[-1:]] == [()]


async def test_services_of_many_clusters_are_left_out_where_they_are_too_many_for_a_report() -> None:
    services = tuple(DiscoveredService(namespace="shop", name=f"s{number:04}", labels={"l" * 300: "v" * 250}) for number in range(5_000))
    small = DiscoveryReport(discovery="n/small", connected=True, services=services[:10])
    discoveries = (*(DiscoveryReport(discovery=f"n/{n}", connected=True, reason="slow", services=services) for n in range(3)), small)
    hearer = Hearer()
    async with running(reports(hearer, Said(discoveries=discoveries)).run()):
        await asyncio.sleep(60)
    (report,) = hearer.reports
    assert 3 << 20 < len(report.model_dump_json()) < 8 << 20
    first, *_, last = report.discoveries or ()
    assert first.services == services[: len(first.services or ())]
    assert first.reason.startswith(f"only {len(first.services or ())} of 5000 services are listed")
    assert first.reason.endswith("; slow")
    assert last.services


async def test_counters_are_added_up_until_they_are_due() -> None:
    hearer, metrics = Hearer(), Metrics()
    async with running(Reports(hearer, Said(), "boot", metrics).run()):
        for _ in range(4):
            metrics.add([EDGE])
            await asyncio.sleep(2)
        assert all(report.metrics is None for report in hearer.reports)
        await asyncio.sleep(5)
    (sent,) = [report.metrics for report in hearer.reports if report.metrics is not None]
    assert sent.sequence == 1
    (edge,) = sent.edges
    assert edge.requests == {"2xx": 12}
    assert edge.latency_ms == {"5": 8, "inf": 12}
    assert (edge.latency_sum_ms, edge.bytes_sent) == (36.0, 40)


async def test_metrics_come_as_often_as_the_fleet_allows() -> None:
    hearer, metrics, said = Hearer(), Metrics(), Said(pace_s=3)
    async with running(Reports(hearer, said, "boot", metrics).run()):
        for pace_s, reports_per_minute in ((3, 9), (30, 1)):
            said.pace_s = pace_s
            hearer.reports.clear()
            for _ in range(60):
                metrics.add([EDGE])
                await asyncio.sleep(1)
            assert len(hearer.reports) == pytest.approx(reports_per_minute, abs=1)


async def test_a_report_whose_answer_was_lost_is_sent_again_as_it_was() -> None:
    hearer, metrics = Hearer(loses_answers=True), Metrics()
    async with running(Reports(hearer, Said(), "boot", metrics).run()):
        metrics.add([EDGE])
        await asyncio.sleep(60)
        metrics.add([EDGE])
        hearer.loses_answers = False
        await asyncio.sleep(60)
    sent = [report.metrics for report in hearer.reports if report.metrics is not None]
    first = [metrics for metrics in sent if metrics.sequence == 1]
    assert len(first) > 1
    assert len(set(map(repr, first))) == 1
    assert [metrics.edges for metrics in sent if metrics.sequence == 2] == [(EDGE,)]


async def test_counters_stay_bounded_while_nobody_hears() -> None:
    metrics = Metrics()
    edges = [EDGE.model_copy(update={"load_balancer": f"n/{index}"}) for index in range(20_500)]
    metrics.add(edges)
    metrics.add(edges)
    await asyncio.sleep(20)
    told: list[EdgeMetrics] = []
    while (due := metrics.due(10)) is not None:
        assert len(due.edges) <= 5_000
        told += due.edges
        metrics.delivered()
        await asyncio.sleep(10)
    assert len(told) == 20_000
    assert told[0].requests == {"2xx": 6}


async def test_counters_that_are_refused_do_not_hold_back_what_comes_after() -> None:
    hearer, metrics = Hearer(failure=Refused("400: metrics", 400)), Metrics()
    async with running(Reports(hearer, Said(), "boot", metrics).run()):
        metrics.add([EDGE])
        await asyncio.sleep(60)
        hearer.failure = None
        await asyncio.sleep(60)
        assert all(report.metrics is None for report in hearer.reports)
        metrics.add([EDGE])
        await asyncio.sleep(60)
    assert [report.metrics.sequence for report in hearer.reports if report.metrics is not None] == [2]


async def test_who_signed_the_certificate_is_told_and_the_wish_to_renew_heard() -> None:
    hearer, renewals = Hearer(answer=HeartbeatAnswer(pace_s=3, now=0, renew=True)), list[int]()
    beating = Heartbeats(hearer, Said(), "boot", "0", lambda: None, lambda: renewals.append(1), lambda: None)
    async with running(beating.run()):
        await asyncio.sleep(1)
    assert (hearer.beats[0][1].issuer, renewals) == ("ab", [1])


async def test_the_return_of_the_control_plane_is_noticed_once() -> None:
    hearer, returns = Hearer(), list[int]()
    beating = Heartbeats(hearer, Said(), "boot", "0", lambda: None, lambda: None, lambda: returns.append(1))
    async with running(beating.run()):
        await asyncio.sleep(10)
        hearer.failure = Unreachable("away")
        await asyncio.sleep(60)
        assert returns == []
        hearer.failure = None
        await asyncio.sleep(30)
    assert returns == [1]


async def test_being_forgotten_again_and_again_means_a_twin() -> None:
    hearer = Hearer(answer=HeartbeatAnswer(pace_s=3, now=0, resend=True))
    beating = heartbeats(hearer, Said())
    async with running(beating.run()):
        await asyncio.sleep(4)
        assert beating.warning is None, "a control plane that was restored forgets once"
        await asyncio.sleep(10)
        assert "copy of this state directory" in str(beating.warning)
        hearer.answer = HeartbeatAnswer(pace_s=3, now=0)
        await asyncio.sleep(130)
    assert beating.warning is None


async def test_tunnels_to_edges_are_told_when_they_change() -> None:
    hearer, said = Hearer(), Said(edges=(EdgeHealth(site_id="e", state="UP", since=1.0, tunnels=3, rtt_ms=1.0),))
    async with running(reports(hearer, said).run()):
        await asyncio.sleep(3)
        said.edges = (said.edges[0].model_copy(update={"rtt_ms": 2.0}),)
        await asyncio.sleep(3)
        said.edges = (said.edges[0].model_copy(update={"tunnels": 2}),)
        await asyncio.sleep(2)
    told = [report.edges[0].tunnels for report in hearer.reports if report.edges]
    assert (told[0], told[-1]) == (3, 2)
    assert len(told) <= 3, "round-trip times alone are told seldom"
