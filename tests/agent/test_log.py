"""Lines that people read and tools parse."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from agent import log as logs
from agent.log import Log, configure


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Apart from the one that other tests look at."""
    monkeypatch.setattr(logs, "_NAME", "isthmus.test")
    monkeypatch.setattr(logs, "_FLUSH_S", 30.0)
    yield Log("isthmus.test")
    flush()


def flush() -> None:
    for handler in logging.getLogger("isthmus.test").handlers:
        handler.flush()


def test_an_event_is_one_line_of_keys_and_values(log: Log, capfd: pytest.CaptureFixture[str]) -> None:
    configure("info")
    log.info("envoy ended", pid=7, reason='said "no"\nand went', empty=None, site="a=b")
    log.debug("not told")
    flush()
    (line,) = capfd.readouterr().err.splitlines()
    timestamp, _, rest = line.partition(" ")
    assert timestamp.startswith("timestamp=2")
    assert timestamp.endswith("Z")
    assert rest == r'level=info event="envoy ended" pid=7 reason="said \"no\"\nand went" empty= site="a=b"'


def test_a_full_disk_under_the_log_is_no_reason_to_stop(
    log: Log, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    configure("debug")
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        log.error("lost")
        flush()
    log.error("written")
    flush()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("event=written")


def test_who_reads_the_log_slowly_loses_lines_and_holds_up_nobody(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    configure("info")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "w") as stalled, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stalled)
        for number in range(5_000):
            log.info("said", number=number, at_length="x" * 100)
        reader = Thread(target=lambda: read.extend(pipe))
        reader.start()
        flush()
        log.info("heard again")
        flush()
        stalled.close()
        reader.join()
    assert b"number=0 " in read[0]
    assert read[-1].endswith(b'event="heard again"\n')
    assert len(read) < 5_000
