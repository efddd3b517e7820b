import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from agent.discovery.dns import REFRESH_S, FollowedNames


class Server:
    """Answers what a test says, and counts."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[str, ...] | OSError] = {}
        self.asked: list[str] = []
        self.changes = 0

    def told(self) -> None:
        self.changes += 1

    async def lookup(self, name: str) -> tuple[str, ...]:
        self.asked.append(name)
        answer = self.answers.get(name, socket.gaierror(socket.EAI_NONAME, "unknown"))
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def names(server: Server) -> AsyncIterator[FollowedNames]:
    names = FollowedNames(server.told, server.lookup)
    yield names
    await names.close()


@pytest.mark.looptime
async def test_a_name_is_asked_again_and_changes_are_told_once(names: FollowedNames, server: Server) -> None:
    server.answers["a.test"] = ("192.0.2.1",)
    names.follow({"a.test": 0})
    await asyncio.sleep(0.1)
    assert names.addresses == {"a.test": ("192.0.2.1",)}
    server.answers["a.test"] = ("192.0.2.1", "192.0.2.2")
    await asyncio.sleep(REFRESH_S)
    assert names.addresses == {"a.test": ("192.0.2.1", "192.0.2.2")}
    await asyncio.sleep(5 * REFRESH_S)
    assert server.changes == 2


@pytest.mark.looptime
async def test_the_last_good_answer_stays_while_a_name_cannot_be_resolved(names: FollowedNames, server: Server) -> None:
    server.answers["a.test"] = ("192.0.2.1",)
    names.follow({"a.test": 20})
    await asyncio.sleep(1)
    server.answers["a.test"] = socket.gaierror(socket.EAI_AGAIN, "try again")
    await asyncio.sleep(20)
    assert names.addresses == {"a.test": ("192.0.2.1",)}
    assert "try again" in names.failures["a.test"]
    server.answers["a.test"] = ("192.0.2.9",)
    await asyncio.sleep(20)
    assert names.addresses == {"a.test": ("192.0.2.9",)}
    assert names.failures == {}


@pytest.mark.looptime
async def test_a_name_without_any_address_has_failed(names: FollowedNames, server: Server) -> None:
    server.answers["a.test"] = ()
    names.follow({"a.test": 10})
    await asyncio.sleep(1)
    assert names.failures == {"a.test": "it has no address that could be used"}
    assert server.changes == 1
    server.answers["a.test"] = ("192.0.2.1",)
    await asyncio.sleep(10)
    assert (names.addresses, names.failures) == ({"a.test": ("192.0.2.1",)}, {})


@pytest.mark.looptime
async def test_names_that_nobody_needs_are_no_longer_asked(names: FollowedNames, server: Server) -> None:
    server.answers = {"a.test": ("192.0.2.1",), "b.test": ("192.0.2.2",)}
    names.follow({"a.test": 10, "b.test": 10})
    await asyncio.sleep(1)
    names.follow({"b.test": 10})
    server.asked.clear()
    await asyncio.sleep(100)
    assert set(server.asked) == {"b.test"}
    assert names.addresses == {"b.test": ("192.0.2.2",)}


async def test_the_systems_own_names_are_known() -> None:
    found = asyncio.Event()
    names = FollowedNames(found.set)
    names.follow({"localhost": 0})
    await asyncio.wait_for(found.wait(), 10)
    assert "127.0.0.1" in names.addresses["localhost"]
    await names.close()
