"""A replica's certificate follows the authority that signs it."""

import asyncio

import pytest

from controlplane.loops import certificate


async def test_another_authority_means_another_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "LOOK_EVERY_S", 0.0)
    signing, issued = ["first"], asyncio.Queue[str]()

    async def authority() -> str:
        if signing[0] == "gone":
            raise ConnectionError("the database is away")
        return signing[0]

    async def issue() -> str:
        await issued.put(signing[0])
        return signing[0]

    renewing = asyncio.create_task(certificate.renew("first", authority, issue))
    try:
        for follows in ("gone", "second", "gone", "third"):
            signing[0] = follows
            if follows != "gone":
                async with asyncio.timeout(10):
                    assert await issued.get() == follows
            else:
                await asyncio.sleep(0)
        assert issued.empty()
    finally:
        renewing.cancel()
