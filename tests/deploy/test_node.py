"""A node outside clusters: what systemd and Podman are told."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.settings import Settings
from tests.deploy.built import ROOT

SERVICE = ROOT / "deploy/node/isthmus-agent.service"
IPSEC = ROOT / "deploy/node/ipsec.conf"
CONTAINER = ROOT / "deploy/node/isthmus-agent.container"


class _Unit(configparser.RawConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit(file: Path) -> dict[str, dict[str, str]]:
    read = _Unit(strict=False, delimiters=("=",))
    read.read_string(file.read_text())
    return {section: dict(read[section]) for section in read.sections()}


@pytest.mark.parametrize(("file", "section"), [(SERVICE, "Service"), (CONTAINER, "Container")])
def test_every_variable_is_a_setting(file: Path, section: str) -> None:
    names = {pair.partition("=")[0] for pair in shlex.split(unit(file)[section]["Environment"])}
    assert names
    assert names <= {f"AGENT_{field.upper()}" for field in Settings.model_fields}


def test_the_service_has_no_rights() -> None:
    service = unit(SERVICE)["Service"]
    assert service["User"] != "root"
    assert service["CapabilityBoundingSet"] == ""
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"


def test_ipsec_adds_one_capability_and_one_device_to_the_service() -> None:
    assert unit(IPSEC) == {
        "Service": {
            "CapabilityBoundingSet": "CAP_NET_ADMIN",
            "AmbientCapabilities": "CAP_NET_ADMIN",
            "PrivateDevices": "no",
            "DevicePolicy": "closed",
            "DeviceAllow": "/dev/net/tun rw",
        }
    }


@pytest.mark.parametrize("file", [SERVICE, CONTAINER])
def test_an_agent_is_started_again_however_often_it_fails(file: Path) -> None:
    assert (unit(file)["Service"]["Restart"], unit(file)["Unit"]["StartLimitIntervalSec"]) == ("always", "0")


def test_envoy_outlives_an_agent_that_fails() -> None:
    service = unit(SERVICE)["Service"]
    assert (service["Restart"], service["KillMode"], service["RuntimeDirectoryPreserve"]) == ("always", "process", "restart")


def test_systemd_understands_the_service(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    copy = tmp_path / SERVICE.name
    copy.write_text(SERVICE.read_text().replace("/opt/isthmus/bin/isthmus-agent run", "/bin/true"))
    said = subprocess.run(["systemd-analyze", "verify", copy], check=False, capture_output=True, text=True)
    assert not [line for line in said.stderr.splitlines() if SERVICE.name in line]
