"""The compose file ends with the demo, on real containers. It takes minutes, so it runs when asked to: `ISTHMUS_COMPOSE=1`."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from tests.deploy.built import ROOT, Json
from tests.deploy.podman import PROGRAMS, Composed, composed

AGENTS = ("edge-1", "edge-2", "site-a", "site-b")
OURS = ("controlplane-1", "controlplane-2", *AGENTS)


@pytest.fixture
def fabric() -> Iterator[Composed]:
    if not os.environ.get("ISTHMUS_COMPOSE"):
        pytest.skip("takes minutes: asks for ISTHMUS_COMPOSE=1")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and Debian's {', '.join(missing or PROGRAMS)}, netavark and aardvark-dns")
    with composed(Path(tempfile.mkdtemp(prefix="isthmus-compose-")) / "podman") as fabric:
        yield fabric


def services() -> dict[str, Json]:
    found: dict[str, Json] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


def test_everything_of_ours_in_the_compose_file_is_hardened() -> None:
    ours = {name: service for name, service in services().items() if service["image"].startswith("isthmus-")}
    assert {*OURS, "demo"} <= ours.keys()
    for name, service in ours.items():
        assert (service["read_only"], service["cap_drop"], service["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"]), name
        assert not {"privileged", "user", "cap_add", "network_mode"} & service.keys(), name


def test_only_the_migration_may_change_the_schema() -> None:
    holders = [name for name, service in services().items() if "CONTROLPLANE_MIGRATION_DATABASE_URL" in service.get("environment", {})]
    assert holders == ["migration"]


@pytest.mark.timeout(3600)
async def test_the_compose_file_ends_with_the_demo(fabric: Composed) -> None:
    await fabric.up()
    await fabric.until("demo", "service_completed_successfully")
    assert "The demo works" in fabric.logs("demo")

    for name in OURS:
        status = dict(line.split(":", 1) for line in fabric.exec(name, "cat", "/proc/1/status").splitlines())
        assert status["Uid"].split() == ["65532"] * 4
        assert int(status["CapEff"], 16) == 0
        mounts = [line.split() for line in fabric.exec(name, "cat", "/proc/mounts").splitlines()]
        assert "ro" in next(options for _, place, _, options, *_ in mounts if place == "/").split(",")
    for name in AGENTS:
        fabric.podman("healthcheck", "run", fabric.container(name))
        said = json.loads(fabric.exec(name, "cat", "state/run/status.json"))
        assert (said["envoy"], said["connected"], said["rejected"]) == ("live", True, [])

    ask = (
        "import urllib.request as u; print(u.urlopen(u.Request('http://site-a:8080/', headers={'host': 'bank.localhost'})).read().decode())"
    )
    fabric.podman("stop", fabric.container("controlplane-1"))
    assert "999750" in fabric.exec("web", "python", "-c", ask)
