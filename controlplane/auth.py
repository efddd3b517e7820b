"""Who is calling, and whether they may."""

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from agent.protocol.enrolment import PROOF_AUDIENCE, PROOF_LIFE_S, PROOF_SCHEME, Proof
from controlplane.errors import FieldError, Unauthenticated

TOKEN_PREFIX = "ist_"  # noqa: S105 - the part that is no secret
"""So that people and secret scanners recognise a token."""


OPERATOR_TENANT = "default"
"""The one that is there from the first start: the operator's, and that of the regional edges."""


@dataclass(frozen=True)
class Caller:
    """Who is calling, in which tenant."""

    tenant_id: UUID
    tenant: str
    operator: bool
    """Whether they may act in any tenant, and create tenants."""
    credential: str
    """Name of the credential, for the audit log."""
    credential_id: UUID | None = None
    """None for who has no API token: a node that enrols."""

    @property
    def creator_class(self) -> str:
        """What sort of caller makes something: `operator`, `credential`, or a registration `token`."""
        return "operator" if self.operator else "credential" if self.credential_id else "token"

    @property
    def runs_edges(self) -> bool:
        """Whether they may make and change regional edges."""
        return self.operator and self.tenant == OPERATOR_TENANT


# --- API tokens ------------------------------------------------------------------------------------------------------


def new_token() -> str:
    """An API token: shown once, kept only as its hash."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """What is kept of a token. It has 256 random bits, so a plain hash cannot be reversed."""
    return hashlib.sha256(token.encode()).digest()


def token_in(authorization: str | None) -> str:
    """The token in an `Authorization` header: `APIToken <token>` or `Bearer <token>`."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() not in ("apitoken", "bearer") or not token.strip():
        raise Unauthenticated("send `Authorization: APIToken <token>`")
    return token.strip()


# --- proofs of possession --------------------------------------------------------------------------------------------


def refused_proof(reason: str, message: str) -> Unauthenticated:
    """`reason` is one of UnknownNode, BadProof, Replayed, ClockSkew and Revoked; agents act on it."""
    return Unauthenticated(message, [FieldError(reason, message)])


def proof_in(authorization: str | None) -> str:
    """The JWT in an `Authorization` header."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != PROOF_SCHEME.lower() or not token:
        raise refused_proof("BadProof", f"calls of agents carry `Authorization: {PROOF_SCHEME} <JWT>`")
    return token


def proof_node(token: str) -> UUID:
    """Which node a proof claims to come from; nothing is verified yet."""
    try:
        return UUID(jwt.get_unverified_header(token)["kid"])
    except (jwt.InvalidTokenError, KeyError, ValueError, AttributeError):
        raise refused_proof("BadProof", "the proof is not a JWT whose `kid` is the id of a node") from None


def verify_proof(token: str, key: ec.EllipticCurvePublicKey, *, method: str, target: str, now: datetime) -> Proof:
    """That the holder of `key` makes this very request, just now; `target` is the path with its query, as sent.

    What has still to be checked by the caller: the body, by `verify_body`, and whether the proof was seen before.
    """
    try:
        claims = jwt.decode(token, key, algorithms=["ES256"], audience=PROOF_AUDIENCE, options={"verify_iat": False, "verify_exp": False})
        proof = Proof.model_validate(claims)
    except (jwt.InvalidTokenError, ValidationError) as error:
        raise refused_proof("BadProof", f"the proof does not hold: {_first_line(error)}") from None
    if abs(now.timestamp() - proof.iat) > PROOF_LIFE_S:
        raise refused_proof("ClockSkew", _clocks(proof.iat, now))
    if (proof.htm, proof.htu) != (method, target):
        raise refused_proof("BadProof", f"the proof is for {proof.htm} {proof.htu}, not for {method} {target}")
    return proof


def verify_body(proof: Proof, body: bytes) -> None:
    """That the proof is for this content, as sent."""
    if not hmac.compare_digest(proof.bsh.encode(), body_hash(body).encode()):
        raise refused_proof("BadProof", "the proof is for another body")


def body_hash(body: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()


def _clocks(iat: int, now: datetime) -> str:
    try:
        theirs = datetime.fromtimestamp(iat, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        theirs = str(iat)
    ours = now.astimezone(UTC).isoformat(timespec="seconds")
    return f"the node's clock says {theirs}, the control plane's {ours}; they may differ by {PROOF_LIFE_S} s"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
