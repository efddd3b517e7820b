"""What the agent says to its operator: one line of `key=value` for each event, on standard error.

By the standard library alone: the usual libraries for this bring terminal colours along, some 5 MB in every node.
"""

import json
import logging
import re
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

_NAME = "isthmus"
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
    """Standard error may be a file on a full disk or a pipe that nobody reads: no reason to stop serving, or to complain."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


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
