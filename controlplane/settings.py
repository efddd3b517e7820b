"""What an operator may choose: options of the command line, or variables of the environment with the prefix `CONTROLPLANE_`."""

import os
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

import limits
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "CONTROLPLANE_"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _words(value: object) -> object:
    return tuple(word for word in value.replace(",", " ").split() if word) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
"""Separated by commas or spaces."""


def _are_networks(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        ip_network(word)
    return words


Proxies = Annotated[Words, AfterValidator(_are_networks)]
"""Such as `192.0.2.7, 10.0.0.0/8`."""


def _are_urls(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        parts = urlsplit(word)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{word!r} is not a URL such as https://control.example:8443")
    return words


Urls = Annotated[Words, AfterValidator(_are_urls)]


def _is_name_server(text: str) -> str:
    if text:
        host, _, port = text.partition(":")
        IPv4Address(host)
        if not 0 < int(port or 53) < 65536:
            raise ValueError("the port should be from 1 to 65535")
    return text


NameServer = Annotated[str, AfterValidator(_is_name_server)]
"""`IPv4 address[:port]`; "" for the system's."""


def _is_rate(text: str) -> str:
    limits.parse(text)
    return text


Rate = Annotated[str, AfterValidator(_is_rate)]
"""Such as `100/minute`."""


def _default_state_dir() -> Path:
    """Where a service of root keeps its state, or a program of a user theirs."""
    if os.geteuid() == 0:
        return Path("/var/lib/isthmus-controlplane")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "isthmus-controlplane"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8443, ge=1, le=65535, description="Port to listen on.")
    public_urls: Urls = Field((), description="URLs at which agents reach the control plane, in the order to try; default: host and port.")
    state_dir: Path = Field(
        default_factory=_default_state_dir,
        description="Directory for the embedded database, keys, the CA certificate and the operator's token; default: "
        "/var/lib/isthmus-controlplane of root, else ~/.local/state/isthmus-controlplane.",
    )
    trust_domain: str = Field(
        "",
        pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?$",
        max_length=120,
        description="Name of the fabric in certificates; chosen at the first start (default isthmus.internal) and fixed from then on.",
    )

    database_url: SecretStr | None = Field(
        None, description="Postgres, as a role that owns nothing; default: the embedded database in the state directory."
    )
    migration_database_url: SecretStr | None = Field(
        None, description="The same database as the owner of its tables: lets `serve` and `migrate` create and update the schema."
    )
    listen_database_url: SecretStr | None = Field(
        None, description="The same database without a pooler, for notifications; needed if the database URL goes through one."
    )
    database_connections: int = Field(20, ge=2, le=500, description="How many connections to the database one replica uses at most.")

    key_encryption_key: SecretStr | None = Field(
        None, description="Key under which secrets are sealed, as <version>:<base64 of 32 bytes>, several separated by commas."
    )
    key_encryption_key_file: Path | None = Field(
        None, description="File with the same; default: key-encryption-key in the state directory."
    )
    operator_token: SecretStr | None = Field(
        None,
        min_length=32,
        description="The operator's API token; default: made at the first start, in operator.token in the state directory.",
    )

    tls_cert_file: Path | None = Field(None, description="Certificate chain for HTTPS, in PEM; default: one of the fabric's own authority.")
    tls_key_file: Path | None = Field(None, description="Private key of that certificate, in PEM.")
    tls_san: Words = Field((), description="More DNS names and IP addresses for the certificate of the fabric's own authority.")
    plain_http: bool = Field(False, description="Serve HTTP without TLS: only on loopback, or behind proxies that are trusted.")
    trusted_proxies: Proxies = Field(
        (), description="IP addresses or networks of the proxies in front, whose X-Forwarded-For is believed; they may end TLS."
    )

    rate_limit: Rate = Field("6000/minute", description="Requests of one API credential, per replica.")
    failure_rate_limit: Rate = Field("60/minute", description="Requests without a valid credential from one address, per replica.")
    public_names_resolver: NameServer = Field(
        "",
        description="Name server, as IPv4 address[:port], that is asked whether a public name belongs to a tenant; default: the system's.",
    )
    node_certificate_life_s: int = Field(
        7 * 86400,
        ge=30,
        le=365 * 86400,
        description="How long a node's certificate is valid, in seconds; renewed at half. Without a control plane for longer, sites cannot"
        " open new tunnels. Choose the same for all replicas.",
    )
    longest_token_life_s: int = Field(7 * 86400, ge=60, description="Longest life of a registration token, in seconds.")
    agent_image: str = Field(
        "isthmus-agent",
        max_length=500,
        pattern=r"^[A-Za-z0-9][-A-Za-z0-9._/:@]*$",
        description="Image of the agent in the manifests that install it in a cluster.",
    )
    keep_metrics_days: int = Field(7, ge=1, description="How long rollups of metrics are kept.")
    keep_audit_days: int = Field(400, ge=1, description="How long the audit log is kept.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level of what is logged.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together")
        if self.plain_http and self.tls_cert_file:
            raise ValueError("plain_http and tls_cert_file exclude each other")
        if self.plain_http and self.host not in LOOPBACK and not self.trusted_proxies:
            raise ValueError(f"plain_http sends API tokens in clear: listen on loopback instead of {self.host}, or give trusted_proxies")
        if self.migration_database_url and not self.database_url:
            raise ValueError("migration_database_url needs database_url, which names the role to serve as")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """At which agents reach the control plane."""
        if self.public_urls:
            return self.public_urls
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{'http' if self.plain_http else 'https'}://{host}:{self.port}",)

    @property
    def own_certificate(self) -> bool:
        """Whether HTTPS is served under the fabric's root, which clients then have to trust."""
        return not self.plain_http and self.tls_cert_file is None
