"""How a node becomes part of a site, and proves afterwards that it is.

1. `GET  /api/register/ca`: the roots, to be compared with the token's pin before anything else is sent.
2. `POST /api/register/registerBootstrap`: token, passport, infra and CSR. Idempotent per key of the CSR.
3. `POST /api/register/requestConfig`, repeated until it answers 200: the certificate. 409 `FAILED_PRECONDITION` while the registration is PENDING.
4. `POST /api/agent/v1/renew` at half of the certificate's life.

Calls 2 and 3 are authorised by the token, calls under `/api/agent` by a `Proof` that is signed with the node's key.
"""

from typing import Literal

from pydantic import Field

from agent.protocol.base import Message

CA_PATH = "/api/register/ca"
BOOTSTRAP_PATH = "/api/register/registerBootstrap"
REQUEST_CONFIG_PATH = "/api/register/requestConfig"
RENEW_PATH = "/api/agent/v1/renew"

BACKDATED_S = 7_200
"""A node's certificate begins so long before it was issued, for verifiers whose clock is behind; its life counts from when it was issued."""

PROOF_SCHEME = "Proof"
"""`Authorization: Proof <JWT>`: ES256, header `kid` = id of the node, claims as in `Proof`."""
PROOF_AUDIENCE = "isthmus-controlplane"
PROOF_LIFE_S = 60
"""A proof is refused when `iat` is further than this from the server's clock; the agent corrects itself by the answer's `Date`."""


class Proof(Message):
    aud: str
    htm: str
    """Method."""
    htu: str
    """Path with query, as sent."""
    bsh: str
    """Base64url without padding of SHA-256 of the body."""
    iat: int
    jti: str = Field(max_length=64)


class TokenClaims(Message):
    """What a registration token (a JWT of the control plane) carries; the agent reads it without verifying."""

    urls: tuple[str, ...]
    ca_pin: str | None = None
    """Hex SHA-256 of the bytes that `GET /api/register/ca` answers; None when the system's trust store or plain HTTP is used."""
    jti: str
    """The token's id."""
    tenant_id: str
    site_name: str | None = None
    iat: int
    exp: int


class Passport(Message):
    cluster_name: str
    """The site's name."""
    cluster_type: str = "ce"
    cluster_size: int = 1
    latitude: float = 0.0
    longitude: float = 0.0


class Infra(Message):
    hostname: str = Field(max_length=256)
    """The node's name, unique in its site."""
    provider: str = Field("UNKNOWN", max_length=256)
    timestamp: float | None = None
    """The node's clock in Unix seconds, to show the skew."""
    version: str = Field("", max_length=256)
    labels: dict[str, str] = Field({}, max_length=64)


class BootstrapSpec(Message):
    token: str
    passport: Passport
    infra: Infra
    csr_pem: str


class BootstrapRequest(Message):
    spec: BootstrapSpec


class BootstrapAnswer(Message):
    """Part of the registration object."""

    name: str
    state: str


class ConfigRequest(Message):
    name: str
    token: str
    csr_pem: str


class Credentials(Message):
    """Answer of `requestConfig` and of `renew`."""

    certificate_pem: str
    tenant_id: str
    site_id: str
    site_name: str
    node_id: str
    node_name: str
    trust_domain: str
    peer_anchor_pem: str
    edge_anchor_pem: str = ""
    kind: Literal["customer_edge", "regional_edge"] = "customer_edge"
    control_plane_anchor_pem: str = ""
    control_plane_urls: tuple[str, ...] = ()


class RenewRequest(Message):
    csr_pem: str
