"""Agents that a test starts beside those of a fabric, and what they say when they are not let in."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.control import ControlPlane, Signer, pinned_anchors, token_claims
from agent.protocol.enrolment import BootstrapRequest, BootstrapSpec, ConfigRequest, Credentials, Infra, Passport
from lab.fabric import Fabric
from lab.process import BIN, Process

_GATEWAY_PORTS = iter(range(15500, 15600))


@dataclass(frozen=True, eq=False)
class Newcomer:
    """An agent in the network of a fabric's site, with a state directory of its own."""

    process: Process

    @property
    def state(self) -> Path:
        return self.process.directory / "state"

    async def start(self) -> None:
        """With an empty log."""
        self.process.log.unlink(missing_ok=True)
        await self.process.start()

    async def refusal(self) -> str:
        """The last line that it says, once it has given up; it has to end by itself."""
        await self.start()
        status = await self.process.ended(20)
        assert status == 1, self.process.tail()
        return self.process.tail(1)


def newcomer(fabric: Fabric, token: str, *, name: str, site: str, at: str = "b", **env: str) -> Newcomer:
    """Not started yet. `name` is the node's, `site` what it asks for, `at` the site in whose network it lives."""
    place = fabric.site(at).place
    directory = fabric.directory / "new" / f"{site}-{name}"
    defaults = {
        "AGENT_CONTROL_PLANE_URLS": fabric.replicas[0].url,
        "AGENT_TOKEN": token,
        "AGENT_STATE_DIR": str(directory / "state"),
        "AGENT_SITE": site,
        "AGENT_NODE": name,
        "AGENT_GATEWAY_ADDRESS": f"{place.underlay}:{next(_GATEWAY_PORTS)}",
        "AGENT_KUBECONFIG": "none",
        "AGENT_DRAIN_S": "0",
    }
    return Newcomer(fabric.process("agent", [str(BIN / "isthmus-agent"), "run"], place, directory, defaults | env))


async def token_for(fabric: Fabric, name: str, **spec: Any) -> str:
    """A registration token of tenant `default`."""
    created = await fabric.api.create("token", name, spec)
    return str(created["spec"]["content"])


async def said(agent: Newcomer, event: str) -> bool:
    """Whether the agent has logged an event since its last start."""
    return any(f"event={event} " in line for line in agent.process.log.read_text().splitlines())


# Without a program: the agent's own client


@dataclass(frozen=True)
class ByHand:
    """A node that enrolled but does nothing by itself."""

    control: ControlPlane
    key: ec.EllipticCurvePrivateKey
    registration: str
    credentials: Credentials


@asynccontextmanager
async def by_hand(fabric: Fabric, token: str, site: str, *, labels: Mapping[str, str] | None = None) -> AsyncIterator[ByHand]:
    """The first node of a site, let in by a token for that site."""
    urls = (fabric.replicas[0].url,)
    control = ControlPlane(urls, await pinned_anchors(urls, token_claims(token).ca_pin or ""))
    key = ec.generate_private_key(ec.SECP256R1())
    infra = Infra(hostname=f"{site}-1", labels=dict(labels or {}))
    spec = BootstrapSpec(token=token, passport=Passport(cluster_name=site), infra=infra, csr_pem=csr(key))
    try:
        registration = (await control.bootstrap(BootstrapRequest(spec=spec))).name
        credentials = await control.request_config(ConfigRequest(name=registration, token=token, csr_pem=csr(key)))
        control.signer = Signer(credentials.node_id, key)
        yield ByHand(control, key, registration, credentials)
    finally:
        await control.close()


def csr(key: ec.EllipticCurvePrivateKey, *, organisation: str | None = None, name: str | None = None) -> str:
    """A certificate signing request; `name` is a URI that it asks for."""
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)] if organisation else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if name is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name)]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def certified(certificate_pem: str) -> str:
    """The URI that a certificate is for."""
    names = x509.load_pem_x509_certificate(certificate_pem.encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uri
