"""How to reach a Kubernetes API: from a kubeconfig, from connection info, or from inside the cluster.

A kubeconfig that came with the config may hold what it needs, but not point at it: exec plugins would run code here, and file names
would send files of this machine to whatever server it names. Files may be named by the kubeconfig that the node's operator gave.
"""

import base64
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx2
import yaml  # type: ignore[import-untyped]  # ships no types
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, SingleConfig
from lightkube.config.models import Cluster, Context, User
from lightkube.core.generic_client import GenericAsyncClient

from agent.errors import Misconfigured
from agent.protocol.items import Discovery

CONNECT_S = 5.0
ANSWER_S = 10.0
_CLUSTER_FIELDS = {"server", "certificate-authority", "certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name"}
_USER_FIELDS = {"token", "tokenFile", "username", "password", "client-certificate", "client-key"}
_USER_FIELDS |= {"client-certificate-data", "client-key-data"}
_WITHOUT_EFFECT = {"extensions", "disable-compression"}
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""A watch whose server vanished without a word ends after 25 s."""


@dataclass(frozen=True)
class ClusterAccess:
    """Where an API server is, whom to trust there, and what to show it."""

    server: str
    """URL."""
    user: User = field(default_factory=User, repr=False)
    """Without certificates: those are in `trust`."""
    trust: ssl.SSLContext | None = field(default=None, repr=False)
    server_name: str = ""
    """Expected in the server's certificate, if it is not the host of the URL."""
    namespace: str = ""
    """Of the context; the one to look at if all of them may not be listed."""

    def __post_init__(self) -> None:
        """Raise `Misconfigured` for what could not even be sent."""
        try:
            url = httpx2.URL(self.server)
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.scheme not in {"http", "https"} or not url.host:
            raise Misconfigured(f"the Kubernetes API's address {self.server!r} is not a URL")
        for secret in (self.user.token, self.user.username, self.user.password):
            if secret and not (secret.isascii() and secret.isprintable()):
                raise Misconfigured("the token or password for the Kubernetes API has characters that cannot be sent")

    @property
    def origin(self) -> str:
        """The URL without its path, and without anything secret."""
        url = httpx2.URL(self.server)
        return f"{url.scheme}://{url.netloc.decode()}"

    def transport(self) -> httpx2.AsyncBaseTransport:
        """Without a bound on connections: each watch takes one."""
        return _Transport(self)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[GenericAsyncClient]:
        """A client of lightkube with our own connections beneath it: its own would write keys to files."""
        cluster = Cluster(server=self.server)
        config = SingleConfig("discovery", Context(cluster="discovery"), cluster, self.user)
        timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
        transport = self.transport()
        async with transport:
            yield GenericAsyncClient(ConnectionParams(timeout=timeout, trust_env=False, transport=cast("Any", transport)), config)


def from_kubeconfig(data: bytes, directory: Path | None = None) -> ClusterAccess:
    """The current context; file names are relative to `directory`, and refused without one. Raises `Misconfigured`."""
    config = _parsed(data)
    try:
        context = _named(config, "contexts", "context", config["current-context"])
        cluster = _named(config, "clusters", "cluster", context["cluster"])
        user = _named(config, "users", "user", context["user"]) if context.get("user") else {}
    except KeyError as error:
        raise Misconfigured(f"the kubeconfig cannot be read: it has no {error.args[0]}") from None
    except TypeError as error:
        raise Misconfigured(f"the kubeconfig cannot be read: {_brief(error)}") from None
    _only_known(cluster, user, files=directory is not None)
    files = _Files(directory)
    return ClusterAccess(
        str(cluster.get("server")),
        _user(user, files),
        _trust(
            ca=files.pem(cluster, "certificate-authority"),
            certificate=files.pem(user, "client-certificate"),
            key=files.pem(user, "client-key"),
            insecure=bool(cluster.get("insecure-skip-tls-verify")),
        ),
        server_name=str(cluster.get("tls-server-name") or ""),
        namespace=str(context.get("namespace") or ""),
    )


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        document = yaml.safe_load(data)
    except Exception as error:  # noqa: BLE001 - there are many kinds, and the words of most show the text, secrets and all
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise Misconfigured(f"the kubeconfig cannot be read: {type(error).__name__}{where}") from None
    if not isinstance(document, dict):
        raise Misconfigured("the kubeconfig cannot be read: it should be a mapping with contexts, clusters and users")
    return document


def from_connection_info(
    api_server: str, *, server_name: str = "", certificate_pem: str = "", client_key_pem: bytes = b"", trusted_ca_pem: str = ""
) -> ClusterAccess:
    """`api_server` is `host:port`; HTTPS always. Raises `Misconfigured`."""
    trust = _trust(ca=trusted_ca_pem.encode(), certificate=certificate_pem.encode(), key=client_key_pem)
    return ClusterAccess(f"https://{api_server}", trust=trust, server_name=server_name)


def in_cluster(directory: Path = Path(SERVICE_ACCOUNT), environment: Mapping[str, str] = os.environ) -> ClusterAccess:
    """By the service account of the pod this runs in. Raises `Misconfigured`."""
    try:
        host, port = environment["KUBERNETES_SERVICE_HOST"], environment["KUBERNETES_SERVICE_PORT"]
        trust = _trust(ca=(directory / "ca.crt").read_bytes())
        namespace = (directory / "namespace").read_text().strip()
    except (KeyError, OSError) as error:
        raise Misconfigured(f"this is not a pod with a service account: {_brief(error)}") from None
    host = f"[{host}]" if ":" in host else host
    return ClusterAccess(f"https://{host}:{port}", User(token_file=str(directory / "token")), trust, namespace=namespace)


def from_item(discovery: Discovery, secrets: Mapping[str, bytes]) -> ClusterAccess:
    """As a discovery object says; `secrets` are the bodies by reference. Raises `Misconfigured`."""
    if discovery.in_cluster:
        return in_cluster()
    if discovery.kubeconfig:
        return from_kubeconfig(_secret(discovery.kubeconfig, secrets))
    if not discovery.api_server:
        raise Misconfigured("the discovery names no cluster")
    return from_connection_info(
        discovery.api_server,
        server_name=discovery.server_name,
        certificate_pem=discovery.certificate_pem,
        client_key_pem=_secret(discovery.client_key, secrets) if discovery.client_key else b"",
        trusted_ca_pem=discovery.trusted_ca_pem,
    )


def _secret(reference: str, secrets: Mapping[str, bytes]) -> bytes:
    try:
        return secrets[reference]
    except KeyError:
        raise Misconfigured("a secret of the discovery has not been fetched yet") from None


@dataclass(frozen=True)
class _Files:
    """What a kubeconfig says by value, or by file name where that is allowed."""

    directory: Path | None

    def pem(self, source: Mapping[str, Any], name: str) -> bytes:
        if data := source.get(f"{name}-data"):
            try:
                return base64.b64decode(data, validate=True)
            except (ValueError, TypeError):
                raise Misconfigured(f"the kubeconfig's {name}-data is not base64") from None
        return self._read(source[name]) if source.get(name) else b""

    def path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / name

    def _read(self, name: str) -> bytes:
        try:
            return self.path(name).read_bytes()
        except OSError as error:
            raise Misconfigured(f"the kubeconfig names a file that cannot be read: {error}") from None


class _Transport(httpx2.AsyncHTTPTransport):
    """Keeps connections honest, and lets the certificate have another name than the URL."""

    def __init__(self, access: ClusterAccess) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        super().__init__(verify=access.trust or True, trust_env=False, limits=limits, socket_options=_KEEPALIVE)
        self._server_name = access.server_name

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self._server_name:
            request.extensions = {**request.extensions, "sni_hostname": self._server_name}
        return await super().handle_async_request(request)


def _named(config: Mapping[str, Any], plural: str, singular: str, name: str) -> Mapping[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"the name of its {singular} is no text")
    for entry in config[plural] or ():
        if entry["name"] == name:
            found = entry[singular] or {}
            if not isinstance(found, dict):
                raise TypeError(f"{singular} {name!r} is no mapping")
            return found
    raise KeyError(f"{singular} {name!r}")


def _only_known(cluster: Mapping[str, Any], user: Mapping[str, Any], *, files: bool) -> None:
    """Nothing that it asks for may be ignored."""
    if "exec" in user:
        raise Misconfigured("the kubeconfig's user has an exec plugin, which would run a program here; use a service account's token")
    for name in map(str, ({*cluster} - _CLUSTER_FIELDS | {*user} - _USER_FIELDS) - _WITHOUT_EFFECT):
        raise Misconfigured(f"the kubeconfig has {name!r}, which is not supported")
    for name, value in ({**cluster, **user}).items():
        if name not in _WITHOUT_EFFECT and not isinstance(value, bool if name == "insecure-skip-tls-verify" else str):
            raise Misconfigured(f"the kubeconfig's {name!r} has a value of the wrong type")
    named = {"certificate-authority", "tokenFile", "client-certificate", "client-key"} & ({*cluster} | {*user})
    if named and not files:
        raise Misconfigured(
            f"the kubeconfig names a file in {min(named)!r}; put the contents into it (kubectl config view --raw --flatten)"
        )


def _user(user: Mapping[str, Any], files: _Files) -> User:
    if name := user.get("tokenFile"):
        return User(token_file=str(files.path(name)))
    if token := user.get("token"):
        return User(token=str(token))
    return User(username=user.get("username"), password=user.get("password"))


def _trust(*, ca: bytes = b"", certificate: bytes = b"", key: bytes = b"", insecure: bool = False) -> ssl.SSLContext:
    """Without `ca`, the system's authorities are trusted."""
    try:
        context = ssl.create_default_context(cadata=ca.decode() if ca else None)
        if insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate or key:
            _in_memory(certificate + b"\n" + key, lambda path: context.load_cert_chain(path, password=""))
    except (ssl.SSLError, ValueError, OSError) as error:
        raise Misconfigured(f"a certificate or key for the Kubernetes API cannot be used: {_brief(error)}") from None
    return context


def _in_memory(data: bytes, use: Callable[[str], None]) -> None:
    """OpenSSL takes keys from files only; this one never is on a disk."""
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        use(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
