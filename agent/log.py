"""What the agent says to its operator: one line of `key=value` for each event, on standard error.

By the standard library alone: the usual libraries for this bring terminal colours along, some 5 MB in every node.
"""

import json
import logging
import os
import re
import sys
from contextlib import suppress
from datetime import UTC, datetime
from queue import Full, Queue
from threading import Thread
from typing import Any, NoReturn

_NAME = "isthmus"
_MOST_WAITING = 1_000
"""Lines."""
_FLUSH_S = 1.0
_PLAIN = re.compile(r'[^\s"=\\\x00-\x1f\x7f]+')


class Log:
    """Events with fields."""

    def __init__(self, name: str = _NAME) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        self._say(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._say(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._say(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._say(logging.ERROR, event, fields)

    def _say(self, level: int, event: str, fields: dict[str, Any]) -> None:
        self._logger.log(level, event, extra={"fields": fields})


log = Log()


def configure(level: str) -> None:
    handler = _Lossy()
    handler.setFormatter(_Lines())
    logger = logging.getLogger(_NAME)
    logger.handlers = [handler]
    logger.setLevel(level.upper())


class _Lossy(logging.Handler):
    """Standard error may be a file on a full disk or a pipe that nobody reads: no reason to stop serving, to wait, or to complain."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: Queue[str] = Queue(_MOST_WAITING)
        Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Full):
            self._lines.put_nowait(self.format(record))

    def _write(self) -> NoReturn:
        """Past Python's own buffer, whose lock would hold up the end of the process."""
        while True:
            line = self._lines.get()
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="replace"))
            self._lines.task_done()

    def flush(self) -> None:
        """Called at the end of the process; waits no longer than a moment."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, _FLUSH_S)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **record.__dict__["fields"],
        }
        return " ".join(f"{key}={_quoted(value)}" for key, value in said.items())


def _quoted(value: object) -> str:
    text = "" if value is None else str(value)
    return text if _PLAIN.fullmatch(text) or not text else json.dumps(text, ensure_ascii=False)
