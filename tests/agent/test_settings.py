"""What operators write, and how it is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from agent.__main__ import app
from agent.errors import Misconfigured
from agent.run import _make_private
from agent.settings import Settings, host_and_port, usable_cpus, usable_heap_bytes


def test_everything_has_a_default() -> None:
    settings = Settings()
    assert settings.gateway_address == "0.0.0.0:15443"
    assert settings.sockets == settings.state_dir / "run"


def test_the_cpu_limit_of_a_container_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr("agent.settings._CPU_LIMIT", limit)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    assert usable_cpus() == 8
    for text, cpus in (("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("9900000 100000", 8)):
        limit.write_text(text)
        assert usable_cpus() == cpus
    assert Settings().concurrency == 8


def test_envoy_keeps_to_the_memory_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("agent.settings._MEMORY_LIMIT", limit)
    assert usable_heap_bytes(2 << 30) == 2 << 30
    for text, mib in (("max\n", 2048), (f"{1 << 30}\n", 768), (f"{256 << 20}\n", 128), (f"{8 << 30}\n", 2048)):
        limit.write_text(text)
        assert usable_heap_bytes(2 << 30) == mib << 20


def test_where_peers_dial_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_GATEWAY_SERVICE", "isthmus-gateway")
    assert Settings(host_address="192.0.2.1").gateway_service == "isthmus-gateway"
    with pytest.raises(ValidationError, match="gateway_service and advertised_gateway exclude each other"):
        Settings(advertised_gateway="192.0.2.1")


def test_lists_and_mappings_come_from_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_CONTROL_PLANE_URLS", "https://one:8443, https://two:8443")
    monkeypatch.setenv("AGENT_LABELS", "region=eu,tier=")
    settings = Settings()
    assert settings.control_plane_urls == ("https://one:8443", "https://two:8443")
    assert settings.labels == {"region": "eu", "tier": ""}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("AGENT_CONTROL_PLANE_URLS", "one:8443", "is not a URL"),
        ("AGENT_CONTROL_PLANE_URLS", "https://one..example,https://two", "https://one..example' is not a URL"),
        ("AGENT_CONTROL_PLANE_URLS", "https://one:84430", "is not a URL"),
        ("AGENT_CONTROL_PLANE_URLS", "https://one#edge", "does not name its regional edge"),
        ("AGENT_LABELS", "region", "key=value"),
        ("AGENT_LABELS", "a b=c", "is not the key of a label"),
        ("AGENT_LABELS", "a=b c", "the value of a cannot be"),
        ("AGENT_LABELS", f"a={'x' * 64}", "at most 63"),
        ("AGENT_LABELS", ",".join(f"a{index}=b" for index in range(65)), "at most 64 labels"),
        ("AGENT_SITE", "-a", "site\n.*should match pattern"),
        ("AGENT_NODE", "a.b", "node\n.*should match pattern"),
        ("AGENT_CONCURRENCY", "0", "greater than or equal to 1"),
        ("AGENT_INSIDE_ADDRESS", "host", "inside_address\n.*not a valid IPv4 or IPv6 address"),
        ("AGENT_GATEWAY_ADDRESS", "host", "'host' does not appear to be an IPv4 or IPv6 address"),
        ("AGENT_GATEWAY_ADDRESS", "127.0.0.1:port", "is not host:port"),
        ("AGENT_ADVERTISED_GATEWAY", "https://host", "is not host:port"),
        ("AGENT_ADVERTISED_IPSEC", "a host", "is not host:port"),
        ("AGENT_FORWARD_ADDRESS", "host:99999", "is not host:port"),
        ("AGENT_HEALTH_ADDRESS", "127.0.0.1:health", "is not host:port"),
        ("AGENT_LATITUDE", "91", "less than or equal to 90"),
    ],
)
def test_what_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=says):
        Settings()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("gw.example", ("gw.example", 15443)),
        ("10.0.0.1:443", ("10.0.0.1", 443)),
        ("fd00::1", ("fd00::1", 15443)),
        ("[fd00::1]:443", ("fd00::1", 443)),
    ],
)
def test_hosts_with_and_without_ports(text: str, parsed: tuple[str, int]) -> None:
    assert host_and_port(text) == parsed


@pytest.mark.parametrize("text", ["", ":443", "host:port", "host:99999", "https://host"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(Misconfigured):
        host_and_port(text)


def test_the_token_is_not_shown(tmp_path: Path) -> None:
    assert "hush" not in repr(Settings(token="hush"))
    (tmp_path / "token").write_text("from-file\n")
    assert Settings(token_file=tmp_path / "token").registration_token() == "from-file"
    with pytest.raises(Misconfigured, match="cannot be read"):
        Settings(token_file=tmp_path / "none").registration_token()
    with pytest.raises(Misconfigured, match="AGENT_TOKEN"):
        Settings().registration_token()


def test_a_directory_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(Misconfigured, match="AGENT_RUN_DIR"):
        _ = Settings(state_dir=Path("/" + "x" * 120)).sockets


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match=r"file/run \(run directory\).*Not a directory"):
        _make_private(Settings(state_dir=tmp_path / "file").sockets)


def test_help_names_every_setting_with_its_variable() -> None:
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
        assert f"AGENT_{name.upper()}" in shown


def test_help_says_what_is_taken_and_what_holds_otherwise() -> None:
    shown = " ".join(CliRunner().invoke(app, ["run", "--help"]).output.split())
    for option in ("--ipsec <auto|kernel|userspace|off>", "--publish <true|false>", "--drain-s <number>", "--site <text>"):
        assert option in shown
    for default in ("Default: auto.", "Default: 5.0.", "Default: false.", "Default: 0.0.0.0:15443.", "Default: info."):
        assert default in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kubeconfig", "/none"], "/none (kubeconfig) is not a file"),
        (["--publish", "true"], "no cluster: set AGENT_KUBECONFIG, or leave AGENT_PUBLISH out"),
        (["--kubeconfig", "none", "--gateway-service", "isthmus"], "leave AGENT_GATEWAY_SERVICE out"),
    ],
)
def test_a_cluster_that_cannot_be_is_told_before_a_token_is_spent(tmp_path: Path, options: list[str], says: str) -> None:
    wrong = CliRunner().invoke(app, ["run", "--state-dir", str(tmp_path / "state"), "--token", "unread", *options])
    assert (wrong.exit_code, says in wrong.output) == (1, True), wrong.output
    assert not (tmp_path / "state").exists()


def test_mistakes_end_the_program_with_their_name(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["run", "--latitude", "north"])
    assert (wrong.exit_code, "latitude" in wrong.output) == (1, True)
    without = CliRunner().invoke(app, ["run", "--state-dir", str(tmp_path), "--run-dir", str(tmp_path / "r")])
    assert (without.exit_code, "AGENT_TOKEN" in without.output) == (1, True)


def test_status_without_an_agent_says_so(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["status", "--state-dir", str(tmp_path)])
    assert (shown.exit_code, "no agent has left a status" in shown.output) == (1, True)
