"""The control plane as the agent sees it: the protocol's calls over HTTPS, to whichever of its URLs answers."""

import asyncio
import base64
import gzip
import hashlib
import json
import socket
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlencode, urlsplit
from uuid import uuid4

import httpx2
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from agent.errors import AgentError, Busy, Misconfigured, NotAdmitted, NotRecognised, Refused, Retired, Unreachable, Untrusted
from agent.protocol.base import Message
from agent.protocol.enrolment import (
    BOOTSTRAP_PATH,
    CA_PATH,
    PROOF_AUDIENCE,
    PROOF_SCHEME,
    RENEW_PATH,
    REQUEST_CONFIG_PATH,
    BootstrapAnswer,
    BootstrapRequest,
    ConfigRequest,
    Credentials,
    RenewRequest,
    TokenClaims,
)
from agent.protocol.manifest import (
    ITEMS_PATH,
    ITEMS_PER_CALL,
    MANIFEST_PATH,
    SECRETS_PATH,
    ItemBody,
    ItemsAnswer,
    ItemsRequest,
    ManifestAnswer,
    SecretsAnswer,
    SecretsRequest,
)
from agent.protocol.report import HEARTBEAT_PATH, REPORT_PATH, Heartbeat, HeartbeatAnswer, Report

M = TypeVar("M", bound=Message)

WAIT_S = 25
"""Of one long poll."""
HEARTBEAT_S = 4.0
"""For the answer to a heartbeat: from a control plane that is frozen, the next one is reached within the least lease, of 9 s."""
LOOK_BACK_S = 30.0
"""Between two looks for an earlier URL, while a later one is in use. It has to answer twice, so there is at most one return a minute."""
SKEW_NOTICED_S = 5.0
"""`Date` has whole seconds and the answer took a while: less is not a wrong clock."""
_GZIP_FROM_BYTES = 8 << 10
_TIMEOUT = httpx2.Timeout(connect=5.0, read=15.0, write=15.0, pool=10.0)
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""A long poll over a path that went dark fails after about 14 s."""
_AGAIN = frozenset({"ClockSkew", "Replayed"})
"""Reasons of a 401 that a new proof, by the clock just learned, overcomes."""
_UNKNOWN, _REVOKED = "UnknownNode", "Revoked"
"""Reasons of a 401. A control plane that was restored from a backup may not know a node, which is no reason for the node to end."""


class _Target(Protocol):
    @property
    def raw_path(self) -> bytes: ...


class Signable(Protocol):
    """A request of any client."""

    @property
    def method(self) -> str: ...
    @property
    def url(self) -> _Target: ...
    @property
    def content(self) -> bytes: ...


@dataclass(frozen=True)
class Signer:
    """Proves possession of the node's key."""

    node_id: str
    key: ec.EllipticCurvePrivateKey

    def authorization(self, request: Signable, now: float) -> str:
        """Value of the header for this request, as it is about to be sent."""
        claims = {
            "aud": PROOF_AUDIENCE,
            "htm": request.method,
            "htu": request.url.raw_path.decode(),
            "bsh": base64.urlsafe_b64encode(hashlib.sha256(request.content).digest()).rstrip(b"=").decode(),
            "iat": int(now),
            "jti": uuid4().hex,
        }
        return f"{PROOF_SCHEME} {jwt.encode(claims, self.key, algorithm='ES256', headers={'kid': self.node_id})}"


class ControlPlane:
    """Every call raises `Unreachable` when no URL answers usefully, and `Refused` when the answer is no.

    Earlier URLs are preferred: one that answers again is returned to, for the requests that follow; those under way end where they are.
    A URL with a fragment, `https://control.example#edge.example:15444`, leads through a regional edge.
    `anchor_pem` empty: the system's trust store (or plain HTTP, if a URL says so).
    """

    def __init__(self, urls: Sequence[str], anchor_pem: str = "", transport: httpx2.AsyncBaseTransport | None = None) -> None:
        if not urls:
            raise Misconfigured("no URL of a control plane: set AGENT_CONTROL_PLANE_URLS, or use a token that carries one")
        self._urls = _tidy(urls)
        self._current = 0
        self._look_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._found: str | None = None
        """The earlier URL that answered the last look."""
        self._anchor_pem = anchor_pem
        self.signer: Signer | None = None
        self.skew_s = 0.0
        """What is to be added to the node's clock to get the server's; 0 unless it matters."""
        self._transport = transport
        self._http = self._client(anchor_pem)
        self._used: Counter[httpx2.AsyncClient] = Counter()
        """Requests under way."""

    def _client(self, anchor_pem: str) -> httpx2.AsyncClient:
        own = self._transport or httpx2.AsyncHTTPTransport(verify=_trust(anchor_pem), socket_options=_KEEPALIVE)
        return httpx2.AsyncClient(transport=own, timeout=_TIMEOUT, follow_redirects=False, trust_env=False)

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self._http.aclose()

    async def trust(self, anchor_pem: str) -> None:
        """From now on; requests that are under way end as they began."""
        if anchor_pem == self._anchor_pem:
            return
        before, self._http = self._http, self._client(anchor_pem)
        self._anchor_pem = anchor_pem
        if not self._used[before]:
            await before.aclose()

    def follow(self, urls: Sequence[str]) -> None:
        """Ask these from now on; the one that answered last goes on being asked first, if it is among them."""
        current, self._urls = self.url, _tidy(urls)
        self._move(self._urls.index(current) if current in self._urls else 0)

    @property
    def own_urls(self) -> tuple[str, ...]:
        """Those that lead through nobody else."""
        return tuple(url for url in self._urls if "#" not in url)

    @property
    def url(self) -> str:
        """The one that answered last."""
        return self._urls[self._current]

    async def bootstrap(self, body: BootstrapRequest) -> BootstrapAnswer:
        return await self._post(BOOTSTRAP_PATH, body, BootstrapAnswer)

    async def request_config(self, body: ConfigRequest) -> Credentials:
        """Raises `NotAdmitted` while the registration waits for approval."""
        try:
            return await self._post(REQUEST_CONFIG_PATH, body, Credentials)
        except Refused as refusal:
            if refusal.status == 409:
                raise NotAdmitted(str(refusal), refusal.status, refusal.reasons) from refusal
            raise

    async def renew(self, body: RenewRequest) -> Credentials:
        return await self._post(RENEW_PATH, body, Credentials)

    async def manifest(self, known: str | None, *, wait: bool) -> ManifestAnswer:
        """The manifest, or its difference from the one with hash `known`; waits for one up to `WAIT_S`, or not at all."""
        query = {} if known is None else {"hash": known, "wait": WAIT_S if wait else 0}
        path = f"{MANIFEST_PATH}?{urlencode(query)}" if query else MANIFEST_PATH
        return _parsed(await self._send("GET", path, read_s=WAIT_S + 10.0), ManifestAnswer)

    async def items(self, hashes: Sequence[str]) -> tuple[ItemBody, ...]:
        """Those of the first `ITEMS_PER_CALL` that the server has; an answer may be cut short."""
        request = ItemsRequest(hashes=tuple(hashes[:ITEMS_PER_CALL]))
        return (await self._post(ITEMS_PATH, request, ItemsAnswer)).items

    async def secrets(self, refs: Sequence[str]) -> dict[str, bytes]:
        """Bodies by reference, of the first `ITEMS_PER_CALL`."""
        answer = await self._post(SECRETS_PATH, SecretsRequest(refs=tuple(refs[:ITEMS_PER_CALL])), SecretsAnswer)
        return {ref: base64.b64decode(body) for ref, body in answer.secrets.items()}

    async def heartbeat(self, body: Heartbeat) -> HeartbeatAnswer:
        return await self._post(HEARTBEAT_PATH, body, HeartbeatAnswer, HEARTBEAT_S)

    async def report(self, body: Report) -> None:
        await self._send("POST", REPORT_PATH, body.model_dump_json(exclude_none=True).encode())

    async def _post(self, path: str, body: Message, answer: type[M], read_s: float = 15.0) -> M:
        return _parsed(await self._send("POST", path, body.model_dump_json().encode(), read_s), answer)

    def _move(self, index: int) -> None:
        self._current, self._found = index, None
        self._look_at = time.monotonic() + LOOK_BACK_S

    def _look_back(self) -> None:
        """Starts a look when one is due; no request waits for it."""
        if self._current == 0 or time.monotonic() < self._look_at or (self._looking and not self._looking.done()):
            return
        self._look_at = time.monotonic() + LOOK_BACK_S
        self._looking = asyncio.create_task(self._look(self._urls[: self._current]))

    async def _look(self, earlier: Sequence[str]) -> None:
        in_use = self.url
        found = await self._first_that_answers(earlier)
        if self.url != in_use or found not in self._urls[: self._current]:
            self._found = None
        elif found == self._found:
            self._move(self._urls.index(found))
        else:
            self._found = found

    async def _first_that_answers(self, urls: Sequence[str]) -> str | None:
        for url in urls:
            to, http = _Address.of(url), self._http
            extensions = {"timeout": httpx2.Timeout(5.0).as_dict(), **to.extensions}
            request = http.build_request("GET", to.url + CA_PATH, headers=to.headers, extensions=extensions)
            with suppress(httpx2.RequestError):
                if (await self._sent(http, request)).is_success:
                    return url
        return None

    async def _send(self, method: str, path: str, body: bytes = b"", read_s: float = 15.0) -> httpx2.Response:
        """The first useful answer of any URL, starting with the one that answered last."""
        self._look_back()
        failure: Unreachable | None = None
        for _ in self._urls:
            asked = self.url
            try:
                return await self._ask(asked, method, path, body, read_s)
            except Unreachable as error:
                failure = error if failure is None or isinstance(error, Busy) else failure
                if asked == self.url:
                    self._move((self._current + 1) % len(self._urls))
        raise failure or Unreachable("no control plane answers")

    async def _ask(self, url: str, method: str, path: str, body: bytes, read_s: float) -> httpx2.Response:
        try:
            response = await self._attempt(url, method, path, body, read_s)
            if response.status_code == 401 and _AGAIN.intersection(_failure(response).reasons):
                response = await self._attempt(url, method, path, body, read_s)
        except httpx2.RequestError as error:
            raise Unreachable(f"{url}: {_words(error)}") from error
        if response.status_code == 429 or response.status_code >= 500:
            raise Busy(f"{url}: {_failure(response)}", _retry_after_s(response))
        if not response.is_success:
            raise _failure(response)
        return response

    async def _attempt(self, url: str, method: str, path: str, body: bytes, read_s: float) -> httpx2.Response:
        headers = {"Content-Type": "application/json"} if body else {}
        if len(body) > _GZIP_FROM_BYTES and path == REPORT_PATH:
            body, headers["Content-Encoding"] = await asyncio.to_thread(gzip.compress, body, 5), "gzip"
        http = self._http
        to = _Address.of(url)
        request = http.build_request(method, to.url + path, content=body, headers={**headers, **to.headers})
        request.extensions |= {"timeout": {**_TIMEOUT.as_dict(), "read": read_s}, **to.extensions}
        if self.signer is not None:
            request.headers["Authorization"] = self.signer.authorization(request, time.time() + self.skew_s)
        sent_at, began = time.time(), time.monotonic()
        response = await self._sent(http, request)
        took_s = time.monotonic() - began
        if took_s < SKEW_NOTICED_S:
            self._learn_skew(response, sent_at + took_s / 2)
        return response

    async def _sent(self, http: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
        self._used[http] += 1
        try:
            return await http.send(request)
        finally:
            self._used[http] -= 1
            if not self._used[http]:
                del self._used[http]
                if http is not self._http:
                    await http.aclose()

    def _learn_skew(self, response: httpx2.Response, at: float) -> None:
        """`Date` may be of any time between request and answer, so those that took long say nothing."""
        try:
            server = parsedate_to_datetime(response.headers["Date"]).timestamp()
        except (KeyError, ValueError):
            return
        skew_s = server + 0.5 - at
        self.skew_s = skew_s if abs(skew_s) >= SKEW_NOTICED_S else 0.0


def _parsed(response: httpx2.Response, type_: type[M]) -> M:
    try:
        return type_.model_validate_json(response.content)
    except ValidationError as error:
        raise Unreachable(f"{response.request.url.host} does not answer like a control plane: {error.errors()[0]['msg']}") from error


def _failure(response: httpx2.Response) -> Refused:
    try:
        body = response.json()
        message = str(body["message"])
        reasons = tuple(str(detail["field"]) for detail in body.get("details", ()))
    except (ValueError, KeyError, TypeError):
        message, reasons = response.text[:200], ()
    type_ = _refusal(reasons, response.request.url.scheme) if response.status_code == 401 else Refused
    return type_(f"{response.status_code}: {message}", response.status_code, reasons)


def _refusal(reasons: Sequence[str], scheme: str) -> type[Refused]:
    """What a 401 means. Only who has a certificate can let this node out: whatever stands before a control plane gives no such reason, or cannot prove it."""
    if _REVOKED in reasons and scheme == "https":
        return Retired
    return NotRecognised if {_UNKNOWN, _REVOKED}.intersection(reasons) else Refused


def _words(error: httpx2.RequestError) -> str:
    """Some of httpx2's errors have no text."""
    return str(error) or type(error).__name__


def _retry_after_s(response: httpx2.Response) -> float:
    """Of the form in seconds, bounded: nobody keeps a site away for longer than a minute. 0 if there is none."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), 60.0) if value.isdecimal() else 0.0


def _tidy(urls: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(url.rstrip("/") for url in urls))


class _Address(NamedTuple):
    """How to send what is meant for a URL: directly, or, for `URL#host:port`, through the regional edge that listens there."""

    url: str
    headers: dict[str, str]
    extensions: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> "_Address":
        meant, _, edge = url.partition("#")
        parts = urlsplit(meant.rstrip("/"))
        if not edge:
            return cls(parts.geturl(), {}, {})
        # The session inside is with the control plane itself, which is asked for the name that the URL has.
        return cls(parts._replace(netloc=edge).geturl(), {"Host": parts.netloc}, {"sni_hostname": parts.hostname})


def _trust(anchor_pem: str) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=anchor_pem) if anchor_pem else ssl.create_default_context()


async def pinned_anchors(urls: Sequence[str], pin: str) -> str:
    """The fabric's roots, from whichever URL answers; raises `Untrusted` unless they have the hash that the token names.

    Nothing but this request is sent before the answer is compared.
    """
    failure: AgentError = Unreachable("no control plane answers")
    async with httpx2.AsyncClient(verify=False, timeout=_TIMEOUT, trust_env=False) as http:  # the pin decides, not the certificate
        for url in urls:
            try:
                to = _Address.of(url)
                response = await http.get(to.url + CA_PATH, headers=to.headers, extensions=to.extensions)
            except httpx2.RequestError as error:
                failure = Unreachable(f"{url}: {_words(error)}")
                continue
            if not response.is_success:
                failure = Unreachable(f"{url}: {response.status_code}")
            elif hashlib.sha256(response.content).hexdigest() != pin:
                failure = Untrusted(f"{url} is not the control plane that the token names: its roots have another hash")
            else:
                return response.text
    raise failure


def token_claims(token: str) -> TokenClaims:
    """What the token says, unverified: its issuer verifies it."""
    try:
        return TokenClaims.model_validate(jwt.decode(token, options={"verify_signature": False}))
    except (jwt.InvalidTokenError, ValidationError, json.JSONDecodeError) as error:
        raise Misconfigured(f"the registration token cannot be read: {error}") from error


async def source_address(url: str) -> str:
    """The address from which this machine talks to a URL's host. No packet is sent; raises `Unreachable` without a route."""
    parts = urlsplit(_Address.of(url).url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    try:
        family, _, _, _, address = (await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM))[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"no route to {parts.hostname}: {error}") from error
