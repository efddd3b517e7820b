"""Faults that only the emulator can be asked for."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from lab.kubernetes import objects
from lab.kubernetes.client import Client, connect
from lab.kubernetes.running import Emulator, running


@pytest.fixture
async def emulator(tmp_path: Path) -> AsyncIterator[Emulator]:
    async with running(tmp_path, "--token", "right") as emulator:
        yield emulator


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Client]:
    async with connect(emulator.kubeconfig) as client:
        yield client


async def first(api: Client, **query: str) -> dict[str, object]:
    return await anext(api.watch("Service", **query))


async def test_compaction_tells_old_watches_and_old_pages_410(api: Client) -> None:
    for name in ("one", "two"):
        await api.create(objects.service(name, "default"))
    page = (await api.list("Service", limit="1"))["metadata"]
    await api.fault("compact")
    event = await first(api, resourceVersion=page["resourceVersion"])
    assert event["type"] == "ERROR"
    with pytest.raises(httpx2.HTTPStatusError, match="410"):
        await api.list("Service", **{"limit": "1", "continue": page["continue"]})
    again = (await api.list("Service"))["metadata"]["resourceVersion"]
    await api.create(objects.service("three", "default"))
    assert (await first(api, resourceVersion=again))["type"] == "ADDED"


async def test_tokens_and_namespaces_can_be_refused(api: Client) -> None:
    await api.fault("rules", forbidden=["services@default"])
    for namespace in ("default", ""):
        with pytest.raises(httpx2.HTTPStatusError, match="403"):
            await api.list("Service", namespace)
    await api.list("EndpointSlice", "default")
    await api.list("Service", "kube-system")
    await api.fault("rules", tokens=["another"])
    with pytest.raises(httpx2.HTTPStatusError, match="401"):
        await api.list("Service", "kube-system")


async def test_a_killed_emulator_comes_back_with_its_objects_and_versions(emulator: Emulator, api: Client) -> None:
    created = await api.create(objects.service("one", "default"))
    await emulator.kill()
    await emulator.start()
    assert await api.get("Service", "one", "default") == created
    later = await api.create(objects.service("two", "default"))
    assert int(later["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])


async def test_watches_can_be_cut_off(api: Client) -> None:
    await api.create(objects.service("one", "default"))
    stream = api.watch("Service")
    await anext(stream)
    await api.fault("disconnect")
    with pytest.raises(httpx2.RemoteProtocolError):
        await anext(stream)


async def test_a_paused_api_answers_later(api: Client) -> None:
    await api.fault("pause")
    with pytest.raises(httpx2.ReadTimeout):
        await api.http.get("/api/v1/services", timeout=0.3)
    await api.fault("resume")
    await api.list("Service")
