"""The compose file ends with the demo, on real containers. It takes minutes, so it runs when asked to: `ISTHMUS_COMPOSE=1`."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types

from lab.wait import until
from tests.deploy.built import ROOT, Json
from tests.deploy.podman import PROGRAMS, Composed, Podman, composed, prepared

AGENTS = ("edge-1", "edge-2", "site-a", "site-b")
OURS = ("controlplane-1", "controlplane-2", *AGENTS)
IPSEC = ROOT / "deploy/containers/compose.ipsec.yml"
CAP_NET_ADMIN = 1 << 12
FRONT_PAGE = (
    "import urllib.request as u; print(u.urlopen(u.Request('http://site-a:8080/', headers={'host': 'bank.localhost'})).read().decode())"
)
PATH = """
import ssl, pathlib, urllib.request as u
headers = {"authorization": "APIToken " + pathlib.Path("state/operator.token").read_text().strip()}
query = u.Request("https://localhost:8443/api/data/namespaces/system/topology/path?from=site-a&to=site-b", headers=headers)
print(u.urlopen(query, context=ssl.create_default_context(cafile="state/ca.pem")).read().decode())
"""
"""How a replica says that one site reaches the other."""


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    if not os.environ.get("ISTHMUS_COMPOSE"):
        pytest.skip("takes minutes: asks for ISTHMUS_COMPOSE=1")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and Debian's {', '.join(missing or PROGRAMS)}, netavark and aardvark-dns")
    with prepared(Path(tempfile.mkdtemp(prefix="isthmus-compose-"))) as podman:
        yield podman


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


def test_ipsec_adds_a_capability_and_a_device_to_both_sites_and_nothing_else() -> None:
    added = yaml.safe_load(IPSEC.read_text())["services"]
    assert added.keys() == {"site-a", "site-b"}
    for service in added.values():
        assert (service["cap_add"], service["devices"]) == (["NET_ADMIN"], ["/dev/net/tun"])
        assert service.keys() == {"image", "build", "user", "environment", "cap_add", "devices", "sysctls"}


@pytest.mark.timeout(3600)
async def test_the_compose_file_ends_with_the_demo(podman: Podman) -> None:
    with composed(podman) as fabric:
        await ends_with_the_demo(fabric)
        for name in OURS:
            assert rights(fabric, name) == (65532, 0)
        for name in AGENTS:
            podman("healthcheck", "run", fabric.container(name))
            said = json.loads(fabric.exec(name, "cat", "state/run/status.json"))
            assert (said["envoy"], said["connected"], said["rejected"]) == ("live", True, [])
        podman("stop", fabric.container("controlplane-1"))
        assert front_page_works(fabric)


@pytest.mark.timeout(3600)
async def test_with_the_override_for_ipsec_the_demo_crosses_an_ipsec_tunnel(podman: Podman) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    with composed(podman, IPSEC) as fabric:
        await ends_with_the_demo(fabric)
        for name in ("site-a", "site-b"):
            assert rights(fabric, name) == (0, CAP_NET_ADMIN)

        async def is_used() -> bool:
            paths = json.loads(fabric.exec("controlplane-1", "python", "-c", PATH))["paths"]
            used = [tunnel for each in paths if each["in_use"] and each["encap"] == "IPSEC_PKI" for tunnel in each["tunnels"]]
            return bool(used) and all(tunnel["state"] == "TUNNEL_UP" for tunnel in used)

        await until(is_used, "site-a to reach site-b by IPsec", within_s=120, every_s=1)
        assert front_page_works(fabric)


async def ends_with_the_demo(fabric: Composed) -> None:
    await fabric.up()
    await fabric.until("demo", "service_completed_successfully")
    assert "The demo works" in fabric.logs("demo")


def rights(fabric: Composed, name: str) -> tuple[int, int]:
    """The user and capabilities of a container, whose file system must be read-only."""
    mounts = [line.split() for line in fabric.exec(name, "cat", "/proc/mounts").splitlines()]
    assert "ro" in next(options for _, place, _, options, *_ in mounts if place == "/").split(",")
    status = dict(line.split(":", 1) for line in fabric.exec(name, "cat", "/proc/1/status").splitlines())
    (user,) = {int(each) for each in status["Uid"].split()}
    return user, int(status["CapEff"], 16)


def front_page_works(fabric: Composed) -> bool:
    return "999750" in fabric.exec("web", "python", "-c", FRONT_PAGE)
