"""The client by itself: which URL is asked, what is sent, and what answers mean. tests/api holds it against the real application."""

import asyncio
import gzip
import hashlib
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from email.utils import formatdate

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.control import HEARTBEAT_S, ControlPlane, Signer, source_address, token_claims
from agent.errors import Busy, Misconfigured, NotRecognised, Refused, Retired, Unreachable
from agent.protocol.enrolment import CA_PATH
from agent.protocol.manifest import MANIFEST_PATH, ManifestAnswer
from agent.protocol.report import HEARTBEAT_PATH, DiscoveryReport, Heartbeat, HeartbeatAnswer, Report
from lab.wait import until

KEY = ec.generate_private_key(ec.SECP256R1())
BEAT = Heartbeat(boot_id="b", sequence=1, sent_at=0.0)
Answer = Callable[[httpx2.Request], httpx2.Response]


def control(answer: Answer, *urls: str) -> ControlPlane:
    plane = ControlPlane(urls or ("https://one",), transport=httpx2.MockTransport(answer))
    plane.signer = Signer("node-1", KEY)
    return plane


def ok(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, text=HeartbeatAnswer(pace_s=3, now=0).model_dump_json())


def refusal(status: int, reason: str = "", **headers: str) -> httpx2.Response:
    body = {"code": 16, "message": "no", "details": [{"field": reason, "description": "no"}] if reason else []}
    return httpx2.Response(status, json=body, headers=headers)


def proof(request: httpx2.Request) -> dict[str, object]:
    scheme, _, token = request.headers["Authorization"].partition(" ")
    assert scheme == "Proof"
    assert jwt.get_unverified_header(token)["kid"] == "node-1"
    claims: dict[str, object] = jwt.decode(
        token, KEY.public_key(), algorithms=["ES256"], audience="isthmus-controlplane", options={"verify_iat": False}
    )
    return claims


async def test_urls_are_tried_in_turn_and_the_one_that_answers_is_kept() -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.host)
        if request.url.host != "two":
            raise httpx2.ConnectError("refused")
        return ok(request)

    plane = control(answer, "https://one", "https://two", "https://three")
    await plane.heartbeat(BEAT)
    await plane.heartbeat(BEAT)
    assert asked == ["one", "two", "two"]


async def test_a_replica_that_cannot_now_is_passed_over() -> None:
    plane = control(lambda request: refusal(503) if request.url.host == "one" else ok(request), "https://one", "https://two")
    assert (await plane.heartbeat(BEAT)).pace_s == 3


async def test_a_preferred_url_is_returned_to_when_it_answers_again_and_a_long_poll_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.control.LOOK_BACK_S", 0.0)
    asked: list[tuple[str, str]] = []
    up, polling, changed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.url.host, request.url.path))
        if request.url.host == "control.example" and not up.is_set():
            raise httpx2.ConnectError("refused")
        if request.url.path == MANIFEST_PATH:
            polling.set()
            await changed.wait()
            return httpx2.Response(200, text=ManifestAnswer(hash="h", revision=1).model_dump_json())
        return ok(request)

    plane = ControlPlane(["https://control.example", "https://control.example#edge"], transport=httpx2.MockTransport(answer))
    await plane.heartbeat(BEAT)
    poll = asyncio.create_task(plane.manifest("g", wait=True))
    await polling.wait()

    async def looked() -> bool:
        await plane.heartbeat(BEAT)
        return asked.count(("control.example", CA_PATH)) >= 2

    await until(looked, "the preferred URL to be looked at again")
    assert plane.url == "https://control.example#edge"
    up.set()
    asked.clear()

    async def returned() -> bool:
        await plane.heartbeat(BEAT)
        return plane.url == "https://control.example"

    await until(returned, "the preferred URL to be returned to")
    assert asked.count(("control.example", CA_PATH)) >= 2
    changed.set()
    assert (await poll).hash == "h"
    assert [host for host, path in asked if path == MANIFEST_PATH] == []
    asked.clear()
    await plane.heartbeat(BEAT)
    assert asked == [("control.example", HEARTBEAT_PATH)]
    await plane.close()


async def test_a_preferred_url_that_answers_every_other_time_is_not_returned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.control.LOOK_BACK_S", 0.0)
    looks = 0

    def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal looks
        if request.url.host == "two":
            return ok(request)
        looks += request.url.path == CA_PATH
        if looks % 2 == 0:
            raise httpx2.ConnectError("refused")
        return ok(request)

    plane = control(answer, "https://one", "https://two")
    used: set[str] = set()

    async def looked_often() -> bool:
        await plane.heartbeat(BEAT)
        used.add(plane.url)
        return looks >= 6

    await until(looked_often, "the preferred URL to be looked at six times")
    assert used == {"https://two"}
    await plane.close()


async def test_a_heartbeat_does_not_wait_for_a_control_plane_that_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections as ever, and the other one has to hear of the node before its lease of nine seconds is over."""
    done = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = HeartbeatAnswer(pace_s=3, now=0).model_dump_json()
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())
        writer.close()

    assert HEARTBEAT_S < 9 - 3
    monkeypatch.setattr("agent.control.HEARTBEAT_S", 0.2)
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as frozen, await asyncio.start_server(answering, "127.0.0.1", 0) as other:
        plane = ControlPlane([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (frozen, other)])
        async with asyncio.timeout(5):
            assert (await plane.heartbeat(BEAT)).pace_s == 3
        await plane.close()
        done.set()


async def test_an_answer_that_cannot_be_decoded_is_none() -> None:
    """Of a proxy in between, say: it must not end the agent."""

    class Garbled(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx2.ByteStream(b"no gzip"), request=request)

    with pytest.raises(Unreachable, match="https://one"):
        await ControlPlane(["https://one"], transport=Garbled()).heartbeat(BEAT)


async def test_when_nobody_answers_it_says_who_was_asked() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectTimeout("")

    with pytest.raises(Unreachable, match="https://one: ConnectTimeout"):
        await control(answer, "https://one", "https://two").heartbeat(BEAT)


async def test_the_time_to_come_back_is_passed_on_and_bounded() -> None:
    with pytest.raises(Busy) as busy:
        await control(lambda _: refusal(429, **{"Retry-After": "7"})).heartbeat(BEAT)
    assert busy.value.retry_after_s == 7
    with pytest.raises(Busy) as busy:
        await control(lambda _: refusal(429, **{"Retry-After": "86400"})).heartbeat(BEAT)
    assert busy.value.retry_after_s == 60


async def test_the_proof_is_for_the_request_as_sent() -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, text=ManifestAnswer(hash="h", revision=1).model_dump_json())

    plane = control(answer, "https://one/")
    await plane.manifest("a/b", wait=True)
    claims = proof(seen[0])
    assert claims["htm"] == "GET"
    assert claims["htu"] == "/api/agent/v1/manifest?hash=a%2Fb&wait=25"
    assert claims["bsh"] == urlsafe_b64encode(hashlib.sha256(b"").digest()).rstrip(b"=").decode()
    await plane.manifest("a/b", wait=True)
    assert proof(seen[1])["jti"] != claims["jti"]


async def test_large_reports_are_compressed_and_proven_as_sent() -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json={})

    many = tuple(DiscoveryReport(discovery=f"system/{index}", connected=True) for index in range(1000))
    await control(answer).report(Report(boot_id="b", discoveries=many))
    await control(answer).report(Report(boot_id="b", discoveries=many[:1]))
    assert seen[0].headers["Content-Encoding"] == "gzip"
    assert len(json.loads(gzip.decompress(seen[0].content))["discoveries"]) == 1000
    assert proof(seen[0])["bsh"] == urlsafe_b64encode(hashlib.sha256(seen[0].content).digest()).rstrip(b"=").decode()
    assert "Content-Encoding" not in seen[1].headers


async def test_a_clock_that_is_an_hour_off_is_corrected_by_the_answer() -> None:
    now = time.time() + 3600
    seen: list[float] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(float(str(proof(request)["iat"])))
        date = {"Date": formatdate(now, usegmt=True)}
        if abs(seen[-1] - now) > 60:
            return refusal(401, "ClockSkew", **date)
        return httpx2.Response(200, text=HeartbeatAnswer(pace_s=3, now=now).model_dump_json(), headers=date)

    plane = control(answer)
    await plane.heartbeat(BEAT)
    await plane.heartbeat(BEAT)
    assert len(seen) == 3
    assert plane.skew_s == pytest.approx(3600, abs=5)


async def test_a_node_that_is_not_known_is_told_apart() -> None:
    assert await refused_with(refusal(401, "Revoked")) is Retired
    assert await refused_with(refusal(401, "UnknownNode")) is NotRecognised
    assert await refused_with(refusal(401, "BadProof")) is Refused


async def refused_with(answer: httpx2.Response, url: str = "https://one") -> type[Refused]:
    with pytest.raises(Refused) as refused:
        await control(lambda _: answer, url).heartbeat(BEAT)
    return type(refused.value)


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(401, text="Revoked"),
        httpx2.Response(401, json={"message": "Revoked"}),
        httpx2.Response(401, json={"error": "Revoked", "details": [{"field": "Revoked"}]}),
        refusal(403, "Revoked"),
        refusal(407, "Revoked"),
    ],
)
async def test_what_stands_before_a_control_plane_retires_nobody(answer: httpx2.Response) -> None:
    assert await refused_with(answer) is Refused


async def test_who_proves_nothing_retires_nobody() -> None:
    assert await refused_with(refusal(401, "Revoked"), "http://one") is NotRecognised


async def test_what_does_not_answer_like_a_control_plane_is_none() -> None:
    with pytest.raises(Unreachable, match="does not answer like"):
        await control(lambda _: httpx2.Response(200, text="<html>Please log in</html>")).heartbeat(BEAT)


async def test_a_refusal_without_our_body_is_still_told() -> None:
    with pytest.raises(Refused, match="404: Not Found"):
        await control(lambda _: httpx2.Response(404, text="Not Found")).heartbeat(BEAT)


def test_a_token_that_is_none_is_named() -> None:
    with pytest.raises(Misconfigured, match="token cannot be read"):
        token_claims("nonsense")


def test_without_urls_there_is_nothing_to_talk_to() -> None:
    with pytest.raises(Misconfigured, match="AGENT_CONTROL_PLANE_URLS"):
        ControlPlane(())


async def test_the_source_address_towards_this_machine_is_its_own() -> None:
    assert await source_address("https://127.0.0.1:8443") == "127.0.0.1"


async def test_new_urls_are_followed_and_the_one_that_answers_is_kept() -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.host)
        return ok(request)

    plane = control(answer, "https://one", "https://two")
    await plane.heartbeat(BEAT)
    plane.follow(["https://three", "https://one/"])
    await plane.heartbeat(BEAT)
    plane.follow(["https://three"])
    await plane.heartbeat(BEAT)
    assert asked == ["one", "one", "three"]


async def test_new_roots_hold_for_the_next_request_and_leave_those_under_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, httpx2.AsyncClient]] = []
    make, answering, go_on = ControlPlane._client, asyncio.Event(), asyncio.Event()

    def remembered(plane: ControlPlane, anchor_pem: str) -> httpx2.AsyncClient:
        made.append((anchor_pem, make(plane, anchor_pem)))
        return made[-1][1]

    async def answer(request: httpx2.Request) -> httpx2.Response:
        answering.set()
        await go_on.wait()
        return ok(request)

    monkeypatch.setattr(ControlPlane, "_client", remembered)
    plane = ControlPlane(["https://one"], "old", httpx2.MockTransport(answer))
    under_way = asyncio.create_task(plane.heartbeat(BEAT))
    await answering.wait()
    await plane.trust("old")
    await plane.trust("new")
    (_, old), (anchor, new) = made
    assert (anchor, old.is_closed) == ("new", False)
    go_on.set()
    assert (await under_way).pace_s == 3
    assert old.is_closed
    assert (await plane.heartbeat(BEAT)).pace_s == 3
    assert not new.is_closed
