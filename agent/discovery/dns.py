"""Addresses of DNS names, asked again and again.

The system's resolver is asked (`getaddrinfo`: /etc/hosts, search domains and all), which does not tell how long an answer holds; so names
without an interval of their own are asked every ten seconds.
"""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import NoReturn

from agent.tasks import lasting

REFRESH_S = 10.0
_THREADS = 16
"""A name server that does not answer holds a thread for some ten seconds."""

Lookup = Callable[[str], Awaitable[tuple[str, ...]]]
"""The addresses of a name; raises `OSError`."""


class FollowedNames:
    """`changed` is called, in the event loop, when `addresses` changed or a name began to fail. To be closed."""

    def __init__(self, changed: Callable[[], None], lookup: Lookup | None = None) -> None:
        self.addresses: dict[str, tuple[str, ...]] = {}
        """By name, sorted. The last good answer stays while a name cannot be resolved; one that never could is missing."""
        self.failures: dict[str, str] = {}
        """By name: why it cannot be resolved now."""
        self._changed = changed
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dns")
        self._lookup = lookup or self._ask_system
        self._tasks: dict[tuple[str, float], asyncio.Task[NoReturn]] = {}

    def follow(self, wanted: Mapping[str, float]) -> None:
        """From now on follow these names, each asked again after so many seconds (0: the default), and no others."""
        names = {(name, interval or REFRESH_S) for name, interval in wanted.items()}
        for gone in self._tasks.keys() - names:
            self._tasks.pop(gone).cancel()
        for name in self.addresses.keys() - wanted.keys():
            del self.addresses[name]
        for name in self.failures.keys() - wanted.keys():
            del self.failures[name]
        for new in names - self._tasks.keys():
            self._tasks[new] = lasting(partial(self._refresh, *new), f"name {new[0]}", partial(self._fail, new[0]))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _refresh(self, name: str, interval: float) -> NoReturn:
        while True:
            try:
                self._take(name, await self._lookup(name))
            except (OSError, UnicodeError) as error:  # names that cannot be encoded are UnicodeErrors
                self._fail(name, str(error))
            await asyncio.sleep(interval * random.uniform(0.9, 1.0))

    def _take(self, name: str, addresses: tuple[str, ...]) -> None:
        if not addresses:
            self._fail(name, "it has no address that could be used")
            return
        self.failures.pop(name, None)
        if addresses != self.addresses.get(name):
            self.addresses[name] = addresses
            self._changed()

    def _fail(self, name: str, reason: str) -> None:
        known = name in self.failures
        self.failures[name] = reason
        if not known:
            self._changed()

    async def _ask_system(self, name: str) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _addresses, name)


def _addresses(name: str) -> tuple[str, ...]:
    """IPv6 only if this machine has any; link-local addresses mean nothing to a proxy."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    addresses = {str(address[0]) for *_, address in found}
    return tuple(sorted(address for address in addresses if not ip_address(address).is_link_local))
