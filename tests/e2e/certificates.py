"""Certificates as users bring them."""

import base64
import datetime as dt
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def inline(pem: str) -> str:
    """As fields of objects have it."""
    return "string:///" + base64.b64encode(pem.encode()).decode()


@dataclass(frozen=True)
class Pair:
    certificate_pem: str
    key_pem: str

    def as_field(self) -> dict[str, Any]:
        """An element of `tls_certificates`."""
        return {"certificate_url": inline(self.certificate_pem), "private_key": {"clear_secret_info": {"url": inline(self.key_pem)}}}

    def server_context(self, directory: Path) -> ssl.SSLContext:
        """Of a server with this certificate; `directory` holds a file with the key."""
        file = directory / "server.pem"
        file.write_text(self.certificate_pem + self.key_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(_signed("Test CA", key, "Test CA", key, authority=True), key)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(self, name: str) -> Pair:
        """For a server of this DNS name."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(name, key, "Test CA", self.key, authority=False)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return Pair(certificate.public_bytes(Encoding.PEM).decode(), pem)

    def client_context(self) -> ssl.SSLContext:
        """Of a client that trusts this authority only."""
        return ssl.create_default_context(cadata=self.pem)


def _signed(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, *, authority: bool
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)  # noqa: TID251  # a test is an edge
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if not authority:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(signer, hashes.SHA256())
