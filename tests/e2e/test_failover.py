"""How the failure matrix counts, and a few of its faults on real processes."""

import pytest

from bench.failover import markdown
from bench.failures import ROWS, Aim, Row, no_endpoints
from bench.load import Attempt
from bench.outage import Outage, outage
from bench.scenes import SCENES


def asked(began: float, took_s: float, error: str = "") -> Attempt:
    return Attempt(began, began + took_s, error)


def said(talk: int, began: float, took_s: float = 0.0, error: str = "") -> Attempt:
    return Attempt(began, began + took_s, error, talk)


def test_recovery_ends_with_the_last_bad_answer_and_staleness_with_the_last_that_was_sent_there() -> None:
    requests = [asked(8, 0.1), asked(9.5, 2.0), asked(10.5, 1.0, "503"), asked(12, 0.1), asked(30, 0.1)]
    found = outage(requests, [], began=10, mended=20)
    assert (found.requests, found.failed) == (4, 1)
    assert (found.stall_s, found.recovered_s, found.stale_s) == (2.0, 1.5, 0.5)


def test_what_still_fails_when_the_fault_ends_has_not_recovered() -> None:
    requests = [asked(10 + n, 0.1, "503") for n in range(11)]
    found = outage(requests, [], began=10, mended=20)
    assert found.recovered_s is None
    assert Aim(recovered_s=3).missed(found) == ["did not recover"]


def test_failures_after_the_fault_count_and_do_not_delay_recovery() -> None:
    found = outage([asked(11, 0.1), asked(21, 0.1, "503")], [], began=10, mended=20)
    assert (found.failed, found.recovered_s) == (1, 0.0)


def test_a_connection_breaks_once_however_often_a_new_one_is_refused() -> None:
    words = [said(1, 9.9, 0.2), said(1, 10.2, 0.1, "reset"), said(1, 10.4, 0.1, "refused"), said(1, 10.6, 0.1), said(2, 9.9, 1.5)]
    found = outage([], words, began=10, mended=20)
    assert found.broken == 1
    assert found.silence_s == pytest.approx(1.5)


def test_a_missed_aim_is_said_in_the_table() -> None:
    row = Row("origin gone", "mesh", "both", no_endpoints, Aim(failed=0, stall_s=1.5, recovered_s=3.0))
    found = Outage(100, 2, 4.0, 5.0, 4.5, 1, 5.0)
    table = markdown([(row, found), (row, "the fabric broke")], quick=True)
    assert "**missed**: 2 failed, stalled 4.0 s, took 5.0 s" in table
    assert "**no figures**: the fabric broke" in table


def test_every_row_has_a_name_of_its_own_and_a_scene() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.scene for row in ROWS} <= SCENES.keys()
