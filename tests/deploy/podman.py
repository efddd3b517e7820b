"""`docker-compose.yml`, alone or with overrides, on a machine without a Docker engine, and if need be without a registry: Podman with storage and settings of its own.

What cannot be pulled is stood in for: Debian's Python for the base image, and Debian's Postgres, started as the official image's variables say.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # ships no types

from lab.wait import until
from tests.deploy.built import ROOT

PROJECT = "isthmus-test"
PODMAN_COMPOSE = "podman-compose==1.6.0"
PYTHON, POSTGRES = "docker.io/library/python:3.13-slim", "docker.io/library/postgres:17"
PROGRAMS = ("podman", "runc", "buildah", "debootstrap")
"""And netavark with aardvark-dns, which Podman brings or finds itself."""
_PULL_S = 30
_CA = Path("/etc/ssl/certs/ca-certificates.crt")

_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[network]
network_backend = "netavark"
network_config_dir = "{0}/networks"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{0}/storage"
runroot = "{0}/run"
"""
_POSTGRES_FILE = """
FROM python:3.13-slim
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql && install -d -o postgres -m 700 /var/lib/postgresql/data
ENV PGDATA=/var/lib/postgresql/data
COPY entry.sh /entry.sh
USER postgres
ENTRYPOINT ["bash", "/entry.sh"]
"""
_POSTGRES_ENTRY = """
set -e
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --username=postgres --encoding=UTF8 --locale=C.UTF-8 --auth=scram-sha-256 --pwfile=<(echo "$POSTGRES_PASSWORD")
    echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single postgres
fi
exec postgres -c listen_addresses='*' -k /tmp
"""


class CommandFailed(Exception):
    """The message ends with what it said last."""


@dataclass
class Podman:
    scratch: Path
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        (self.scratch / "networks").mkdir(parents=True)
        settings = {"CONTAINERS_CONF": _CONTAINERS_CONF, "CONTAINERS_STORAGE_CONF": _STORAGE_CONF}
        for name, text in settings.items():
            (self.scratch / name).write_text(text.format(self.scratch))
        self.env = {**os.environ, **{name: str(self.scratch / name) for name in settings}}

    def run(self, *command: str | Path, timeout: float = 900) -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=self.env, cwd=ROOT, timeout=timeout)
        if done.returncode != 0:
            raise CommandFailed(f"{' '.join(map(str, command))}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return done.stdout

    def __call__(self, *arguments: str | Path) -> str:
        return self.run("podman", *arguments)

    def succeeds(self, *arguments: str, timeout: float = 60) -> bool:
        try:
            self.run("podman", *arguments, timeout=timeout)
        except (CommandFailed, subprocess.TimeoutExpired):
            return False
        return True

    def prepare(self) -> None:
        """Images, and what reads the compose file."""
        if not self.succeeds("pull", "--quiet", PYTHON, timeout=_PULL_S):
            self._stand_in_for_python()
        if not self.succeeds("pull", "--quiet", POSTGRES, timeout=_PULL_S):
            self._stand_in_for_postgres()
        self.run(sys.executable, "-m", "venv", self.scratch / "venv")
        self.run(self.scratch / "venv/bin/pip", "install", "--quiet", PODMAN_COMPOSE)
        for target in ("agent", "agent-ipsec", "controlplane", "samples"):
            file = "deploy/containers/Containerfile"
            self("build", "--network", "host", "--file", file, "--target", target, "--tag", f"localhost/isthmus-{target}", ROOT)

    def _stand_in_for_python(self) -> None:
        root = self.scratch / "base"
        packages = "python3,python3-venv,ca-certificates"
        self.run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root, "http://deb.debian.org/debian")
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        shutil.copy(_CA, root / str(_CA).lstrip("/"))
        (root / "etc/pip.conf").write_text(f"[global]\ncert = {_CA}\n")
        self.run("bash", "-c", f"tar -C {root} -c . | podman import - {PYTHON}")
        shutil.rmtree(root)

    def _stand_in_for_postgres(self) -> None:
        context = self.scratch / "postgres"
        context.mkdir()
        (context / "Containerfile").write_text(_POSTGRES_FILE)
        (context / "entry.sh").write_text(_POSTGRES_ENTRY)
        self("build", "--network", "host", "--tag", POSTGRES, context)


@dataclass
class Composed:
    """The services of the compose file, each started when what it depends on is as the file says.

    That order is kept here and not by podman-compose: Podman before 4.6 cannot wait for health, which it checks by timers of systemd. Ports are
    not published: other programs of this machine may have them.
    """

    podman: Podman
    overrides: tuple[Path, ...] = ()
    files: list[str | Path] = field(default_factory=list, init=False)
    """As options."""
    depends: dict[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for file in (ROOT / "docker-compose.yml", *self.overrides):
            document: dict[str, Any] = yaml.safe_load(file.read_text())
            for name, service in document["services"].items():
                self.depends.setdefault(name, service.pop("depends_on", {}))
                service.pop("ports", None)
                service.pop("build", None)
            copy = self.podman.scratch / file.name
            copy.write_text(yaml.safe_dump(document))
            self.files += ["-f", copy]

    def compose(self, *arguments: str) -> None:
        self.podman.run(self.podman.scratch / "venv/bin/podman-compose", "-p", PROJECT, *self.files, *arguments)

    async def up(self) -> None:
        waiting = dict(self.depends)
        while waiting:
            startable = [name for name, needs in waiting.items() if not needs.keys() & waiting.keys()]
            assert startable, f"{waiting.keys()} depend on each other"
            for name in startable:
                for needed, how in waiting.pop(name).items():
                    await self.until(needed, how["condition"])
                self.compose("up", "--detach", "--no-deps", name)

    async def until(self, name: str, condition: str) -> None:
        """Raises `CommandFailed` at once if it ended with an error."""

        async def holds() -> bool:
            if condition == "service_healthy":
                return self.podman.succeeds("healthcheck", "run", self.container(name))
            state = self.state(name)
            if not state["Running"] and state["ExitCode"]:
                raise CommandFailed(f"{name} ended with status {state['ExitCode']}: {self.logs(name)[-2000:]}")
            return not state["Running"]

        await until(holds, f"{name}: {condition}", within_s=600)

    def container(self, name: str) -> str:
        return f"{PROJECT}_{name}_1"

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.podman("inspect", self.container(name)))[0]["State"]
        return found

    def logs(self, name: str) -> str:
        return self.podman.run("bash", "-c", f"podman logs {self.container(name)} 2>&1")

    def exec(self, name: str, *command: str) -> str:
        return self.podman("exec", self.container(name), *command)


@contextmanager
def prepared(scratch: Path) -> Iterator[Podman]:
    """With all images; everything is gone afterwards."""
    podman = Podman(scratch)
    try:
        podman.prepare()
        yield podman
    finally:
        podman("rmi", "--all", "--force")
        shutil.rmtree(scratch)


@contextmanager
def composed(podman: Podman, *overrides: Path) -> Iterator[Composed]:
    """Not started."""
    fabric = Composed(podman, overrides)
    try:
        yield fabric
    finally:
        fabric.compose("down", "--volumes")
