"""Lines that people read and tools parse."""

import sys
from io import StringIO

import pytest

from agent import log as logs
from agent.log import Log, configure


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Apart from the one that other tests look at."""
    monkeypatch.setattr(logs, "_NAME", "isthmus.test")
    return Log("isthmus.test")


def test_an_event_is_one_line_of_keys_and_values(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    log.info("envoy ended", pid=7, reason='said "no"\nand went', empty=None, site="a=b")
    log.debug("not told")
    (line,) = capsys.readouterr().err.splitlines()
    timestamp, _, rest = line.partition(" ")
    assert timestamp.startswith("timestamp=2")
    assert timestamp.endswith("Z")
    assert rest == r'level=info event="envoy ended" pid=7 reason="said \"no\"\nand went" empty= site="a=b"'


def test_a_full_disk_under_the_log_is_no_reason_to_stop(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Full(StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise OSError("no space left")

    monkeypatch.setattr(sys, "stderr", Full())
    configure("debug")
    log.error("lost")
    assert len(tried) == 1
