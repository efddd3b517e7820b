"""A real Envoy is given the config of every golden case, one after the other: the only real judge, and of the ways between them too."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from agent.envoy.render import render
from tests.e2e.dataplane_sites import LiveSite, Trust, live_site
from tests.unit.envoy.golden_cases import CASES, local_of, snapshot_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[LiveSite]:
    async with live_site("a", 1, Trust.create()) as site:
        yield site


@pytest.mark.parametrize("case", [*CASES, *reversed(CASES)], ids=lambda case: case.name)
async def test_envoy_accepts_the_case(site: LiveSite, case: Path) -> None:
    node = site.local.node
    real = {
        "<peer anchor>": site.trust.authority.certificate_pem,
        "<edge anchor>": site.trust.authority.certificate_pem,
        "<other anchor>": site.trust.authority.certificate_pem,
        "<certificate>": node.certificate_pem,
        "<private key>": node.private_key_pem,
    }

    def read(name: str) -> str:
        text = (case / name).read_text()
        for placeholder, pem in real.items():
            text = text.replace(placeholder, pem.replace("\n", "\\n"))
        return text

    local = replace(local_of(read("local.json"), site.local.run_dir), node=node)
    outcome = await site.xds.apply(render(snapshot_of(read("snapshot.json")), local))
    assert outcome.accepted, outcome.nacks
