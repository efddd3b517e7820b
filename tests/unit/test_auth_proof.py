"""A proof holds for one request of one node, for a minute."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.protocol.enrolment import PROOF_AUDIENCE, Proof
from controlplane import auth, pki
from controlplane.errors import Unauthenticated

NOW = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
KEY = pki.create_key()
NODE = uuid4()


def proof(key: ec.EllipticCurvePrivateKey = KEY, **changes: Any) -> str:
    claims = {
        "aud": PROOF_AUDIENCE,
        "htm": "POST",
        "htu": "/api/agent/v1/report?x=1",
        "bsh": auth.body_hash(b"{}"),
        "iat": int(NOW.timestamp()),
        "jti": "j1",
    }
    return jwt.encode(claims | changes, key, algorithm="ES256", headers={"kid": str(NODE)})


def verify(token: str, **changes: Any) -> Proof:
    request: dict[str, Any] = {"method": "POST", "target": "/api/agent/v1/report?x=1", "now": NOW} | changes
    body = request.pop("body", b"{}")
    proof = auth.verify_proof(token, KEY.public_key(), **request)
    auth.verify_body(proof, body)
    return proof


def reason_of(refusal: pytest.ExceptionInfo[Unauthenticated]) -> str:
    return refusal.value.details[0].field


def test_a_proof_of_this_request_is_accepted() -> None:
    token = auth.proof_in(f"Proof {proof()}")
    assert auth.proof_node(token) == NODE
    assert verify(token).jti == "j1"


@pytest.mark.parametrize(
    "request_changes",
    [{"method": "GET"}, {"target": "/api/agent/v1/report"}, {"body": b"[]"}],
    ids=["method", "path", "body"],
)
def test_a_proof_of_another_request_is_refused(request_changes: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        verify(proof(), **request_changes)
    assert reason_of(refusal) == "BadProof"


@pytest.mark.parametrize(
    "token",
    [proof(key=pki.create_key()), proof(aud="somebody-else"), proof(jti="x" * 65), proof(iat="soon"), "a.b.c"],
    ids=["key", "audience", "long jti", "iat", "no jwt"],
)
def test_a_proof_that_does_not_verify_is_refused(token: str) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        verify(token)
    assert reason_of(refusal) == "BadProof"


def test_a_proof_signed_with_another_algorithm_is_refused() -> None:
    claims = {"aud": PROOF_AUDIENCE, "htm": "POST", "htu": "/", "bsh": "", "iat": 0, "jti": "j"}
    for token in (jwt.encode(claims, "", algorithm="none"), jwt.encode(claims, "k" * 32, algorithm="HS256")):
        with pytest.raises(Unauthenticated) as refusal:
            verify(token)
        assert reason_of(refusal) == "BadProof"


@pytest.mark.parametrize("seconds", [-3600, 61])
def test_a_clock_that_is_off_is_named_together_with_ours(seconds: int) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        verify(proof(), now=NOW + timedelta(seconds=seconds))
    assert reason_of(refusal) == "ClockSkew"
    assert NOW.isoformat() in refusal.value.message
    assert (NOW + timedelta(seconds=seconds)).isoformat() in refusal.value.message


@pytest.mark.parametrize("header", [None, "", "Proof", "Bearer abc"])
def test_a_call_without_a_proof_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        auth.proof_in(header)
    assert reason_of(refusal) == "BadProof"


@pytest.mark.parametrize("kid", ["n1", 7, None])
def test_a_proof_of_no_node_is_refused(kid: object) -> None:
    headers = {} if kid is None else {"kid": str(kid)}
    with pytest.raises(Unauthenticated):
        auth.proof_node(jwt.encode({}, KEY, algorithm="ES256", headers=headers))
