"""What a user would otherwise write by hand: two HAProxies with mutual TLS between them, HTTP/2 inside."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

COMMON = """
global
    maxconn 4096
    nbthread 2
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-server-options ssl-min-ver TLSv1.3
defaults
    mode http
    http-reuse always
    timeout connect 5s
    timeout client 60s
    timeout server 60s
"""
NEAR = (
    "listen near\n    bind {listen}\n    server far {far} ssl crt {directory}/near.pem ca-file {directory}/ca.pem verify required alpn h2\n"
)
FAR = "listen far\n    bind {far} ssl crt {directory}/far.pem ca-file {directory}/ca.pem verify required alpn h2\n    server origin {origin}\n"


def write(directory: Path, listen: str, far: str, origin: str) -> tuple[Path, Path]:
    """Certificates and the two configurations, near and far; addresses are `host:port`."""
    certificates(directory, far.rsplit(":", 1)[0])
    near_conf, far_conf = directory / "near.cfg", directory / "far.cfg"
    near_conf.write_text(COMMON + NEAR.format(listen=listen, far=far, directory=directory))
    far_conf.write_text(COMMON + FAR.format(far=far, origin=origin, directory=directory))
    return near_conf, far_conf


def certificates(directory: Path, far_host: str) -> None:
    """`ca.pem`, and with their keys `near.pem` and `far.pem`, in a new directory."""
    directory.mkdir()
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("bench", ca_key, "bench", ca_key, ca=True)
    (directory / "ca.pem").write_bytes(_pem(ca))
    for name, host in (("near", "127.0.0.1"), ("far", far_host)):
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = _certificate(name, key, "bench", ca_key, host=host)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (directory / f"{name}.pem").write_bytes(_pem(leaf) + private)


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, ca: bool = False, host: str = ""
) -> x509.Certificate:
    now = datetime.now(UTC)  # noqa: TID251 — certificates of a run that is over in minutes
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if host:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
