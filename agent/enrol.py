"""How this node gets its identity, and keeps it: registration by token, renewal by proof of possession."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from random import uniform
from typing import NoReturn, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.backoff import backoff
from agent.control import ControlPlane, Signer, pinned_anchors, token_claims
from agent.errors import AgentError, Misconfigured, NotAdmitted, StorageFailed, Unreachable
from agent.log import log
from agent.protocol.enrolment import (
    BACKDATED_S,
    BootstrapRequest,
    BootstrapSpec,
    ConfigRequest,
    Credentials,
    Infra,
    Passport,
    RenewRequest,
    TokenClaims,
)
from agent.state import StateDirectory
from agent.tasks import woken

T = TypeVar("T")

RENEW_AT = 0.5
"""Of the certificate's life."""
ALARM_AT = 0.8
_RENEW_JITTER = 0.05
_HURRY_S = 10.0
_HURRY_EVERY_S = 60.0
_LOG_EVERY_S = 60.0
_ASK_FIRST_S, _ASK_MOST_S = 2.0, 10.0
"""While the registration waits for approval."""


@dataclass(frozen=True)
class Applicant:
    """What a node says of itself when it registers."""

    site: str | None
    """None: the one that the token names."""
    node: str
    labels: Mapping[str, str] = field(default_factory=dict)
    latitude: float = 0.0
    longitude: float = 0.0
    version: str = ""


async def enrol(directory: StateDirectory, token: str, urls: tuple[str, ...], applicant: Applicant) -> Credentials:
    """Register and wait until admitted, however long that takes; what comes of it is stored.

    Raises `Refused`, `Untrusted` and `Misconfigured`, which waiting does not cure.
    """
    claims = token_claims(token)
    urls = urls or claims.urls
    anchors = "" if claims.ca_pin is None else await _patiently("roots", lambda: pinned_anchors(urls, claims.ca_pin or ""))
    control = ControlPlane(urls, anchors)
    try:
        csr = signing_request(directory.node_key(), applicant.node)
        request = BootstrapRequest(spec=_spec(token, claims, applicant, csr))
        registration = await _patiently("registration", lambda: control.bootstrap(request))
        log.info("registered", registration=registration.name, state=registration.state)
        ask = ConfigRequest(name=registration.name, token=token, csr_pem=csr)
        credentials = await _patiently("admission", lambda: control.request_config(ask))
    finally:
        await control.close()
    log.info("admitted", site=credentials.site_name, node=credentials.node_name, node_id=credentials.node_id)
    directory.save_credentials(credentials)
    return credentials


def _spec(token: str, claims: TokenClaims, applicant: Applicant, csr: str) -> BootstrapSpec:
    site = applicant.site or claims.site_name
    if site is None:
        raise Misconfigured("set AGENT_SITE: the token does not name a site")
    passport = Passport(cluster_name=site, latitude=applicant.latitude, longitude=applicant.longitude)
    infra = Infra(hostname=applicant.node, timestamp=time.time(), version=applicant.version, labels=dict(applicant.labels))
    return BootstrapSpec(token=token, passport=passport, infra=infra, csr_pem=csr)


async def _patiently(what: str, call: Callable[[], Awaitable[T]]) -> T:
    """The answer of a call that is made until the control plane is there and, for admission, has made up its mind."""
    clock = asyncio.get_running_loop().time
    delays, quiet_until, said = backoff(1.0, 30.0), 0.0, ""
    while True:
        try:
            return await call()
        except NotAdmitted as error:
            reason, pause = str(error), uniform(_ASK_FIRST_S, _ASK_MOST_S)
        except Unreachable as error:
            reason, pause = str(error), max(next(delays), error.retry_after_s)
        if reason != said or clock() >= quiet_until:
            log.info("waiting", what=what, reason=reason)
            quiet_until, said = clock() + _LOG_EVERY_S, reason
        await asyncio.sleep(pause)


def signing_request(key: ec.EllipticCurvePrivateKey, node: str) -> str:
    """A CSR in PEM; the control plane decides which names the certificate gets."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


@dataclass
class Identity:
    """The node's credentials, and their renewal; `renewed` is called with the new ones."""

    directory: StateDirectory
    control: ControlPlane
    credentials: Credentials
    renewed: Callable[[Credentials], None]

    def __post_init__(self) -> None:
        self._key = self.directory.node_key()
        self.control.signer = Signer(self.credentials.node_id, self._key)
        self._failure = ""
        self._renew_at = _some_time()
        self._hurry = asyncio.Event()
        self._hurried_at = -math.inf

    async def run(self) -> NoReturn:
        """Renew at half of the certificate's life, and when that fails again and again until it works."""
        delays = backoff(5.0, 600.0)
        while True:
            pause = self._due_in_s()
            if pause <= 0:
                pause = 0.0 if await self._renew() else next(delays)
            else:
                delays = backoff(5.0, 600.0)
            if await woken(self._hurry, min(pause, 3600.0)):
                self._hurry.clear()
                await asyncio.sleep(uniform(0, _HURRY_S))
                await self._renew()

    def hurry(self) -> None:
        """Renew soon, whatever the certificate's age: whoever signed it is about to be replaced."""
        if time.monotonic() - self._hurried_at > _HURRY_EVERY_S:
            self._hurried_at = time.monotonic()
            self._hurry.set()

    def retry(self) -> None:
        """Renew soon if that has failed: the control plane is there again, and the next try may be minutes away."""
        if self._failure:
            self._hurry.set()

    async def trust(self, anchor_pem: str) -> None:
        """Roots under which control planes are trusted from now on, also after a restart."""
        if not anchor_pem or anchor_pem == self.credentials.control_plane_anchor_pem:
            return
        self.credentials = self.credentials.model_copy(update={"control_plane_anchor_pem": anchor_pem})
        await self.control.trust(anchor_pem)
        log.info("new roots of the control plane")
        await self._save()

    async def _renew(self) -> bool:
        try:
            credentials = await self.control.renew(RenewRequest(csr_pem=signing_request(self._key, self.credentials.node_name)))
        except AgentError as error:
            log.warning("the certificate is not renewed", reason=str(error))
            self._failure = str(error)
            return False
        self.credentials, self._failure, self._renew_at = credentials, "", _some_time()
        await self.control.trust(credentials.control_plane_anchor_pem)
        await self._save()
        log.info("certificate renewed", until=_validity(credentials)[1])
        self.renewed(credentials)
        return True

    async def _save(self) -> None:
        try:
            await asyncio.to_thread(self.directory.save_credentials, self.credentials)
        except StorageFailed as error:
            log.warning("the credentials cannot be saved", reason=str(error))

    def _due_in_s(self) -> float:
        since, until = _validity(self.credentials)
        return since + (until - since) * self._renew_at - self._now()

    def _now(self) -> float:
        """By the server's clock, which dated the certificate."""
        return time.time() + self.control.skew_s

    @property
    def issuer(self) -> str:
        """Hex key identifier of the authority that signed the certificate in use; empty if the certificate does not say."""
        with suppress(x509.ExtensionNotFound):
            found = _certificate(self.credentials.certificate_pem).extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
            return (found.value.key_identifier or b"").hex()
        return ""

    @property
    def warning(self) -> str | None:
        """Said when the certificate has used up most of its life."""
        since, until = _validity(self.credentials)
        left_s = until - self._now()
        if left_s > (until - since) * (1 - ALARM_AT):
            return None
        when = "has expired" if left_s <= 0 else f"expires in {left_s / 3600:.1f} h"
        return f"the node's certificate {when} and is not renewed: {self._failure or 'not tried yet'}"


def _some_time() -> float:
    """Drawn once for each certificate, so that nodes do not renew in step."""
    return RENEW_AT + uniform(-_RENEW_JITTER, _RENEW_JITTER)


@lru_cache(4)
def _certificate(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def _validity(credentials: Credentials) -> tuple[float, float]:
    """Unix seconds when the certificate was issued, and until when it holds."""
    certificate = _certificate(credentials.certificate_pem)
    return certificate.not_valid_before_utc.timestamp() + BACKDATED_S, certificate.not_valid_after_utc.timestamp()
