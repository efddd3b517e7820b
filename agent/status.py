"""A file that `isthmus-agent status` reads."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from agent.errors import StorageFailed
from agent.log import log
from agent.state import write

NAME = "status.json"
_EVERY_S = 1.0


@dataclass
class StatusFile:
    """Written when there is something new."""

    directory: Path
    status: Callable[[], dict[str, Any]]

    async def run(self) -> NoReturn:
        written: dict[str, Any] = {}
        while True:
            status = self.status()
            if status != written:
                try:
                    await asyncio.to_thread(write, self.directory / NAME, json.dumps({**status, "at": time.time()}).encode())
                    written = status
                except StorageFailed:
                    log.debug("the status cannot be written")
            await asyncio.sleep(_EVERY_S)
