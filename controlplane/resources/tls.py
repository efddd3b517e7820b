"""TLS versions, ciphers and certificates, as both load balancers and pools state them."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from pydantic import AfterValidator, Field, model_validator

from controlplane.resources.base import Choice, Empty, Value
from controlplane.resources.enumeration import Names, did_you_mean
from controlplane.resources.scalars import Text
from controlplane.resources.secrets import Inline, Secret, decode_inline

CIPHERS: Mapping[str, str] = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_RSA_WITH_AES_128_GCM_SHA256": "AES128-GCM-SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384": "AES256-GCM-SHA384",
    "TLS_RSA_WITH_AES_128_CBC_SHA": "AES128-SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA": "AES256-SHA",
}
"""IANA's name → BoringSSL's, up to TLS 1.2."""

TLS13_CIPHERS = frozenset({"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"})
"""Accepted by name; TLS 1.3 always offers all three, and there is nothing to configure."""

OLD_TLS = "TLS below 1.2 is not supported"
_VERSIONS = ("TLS_AUTO", "TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3")

AnyTlsVersion = Annotated[Literal["TLS_AUTO", "TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3"], Names(*_VERSIONS)]
TlsVersion = Annotated[Literal["TLS_AUTO", "TLSv1_2", "TLSv1_3"], Names(*_VERSIONS, refused={"TLSv1_0": OLD_TLS, "TLSv1_1": OLD_TLS})]


def _cipher(name: str) -> str:
    if name not in CIPHERS and name not in TLS13_CIPHERS:
        raise ValueError(f"{name} is not a supported cipher suite{did_you_mean(name, (*CIPHERS, *TLS13_CIPHERS))}")
    return name


Cipher = Annotated[str, Field(max_length=64), AfterValidator(_cipher)]


class _CustomSecurity(Value):
    min_version: AnyTlsVersion = "TLS_AUTO"
    max_version: AnyTlsVersion = "TLS_AUTO"
    cipher_suites: tuple[Cipher, ...] = Field(min_length=1, max_length=32)

    @model_validator(mode="after")
    def versions_are_a_range(self) -> Self:
        if "TLS_AUTO" not in (self.min_version, self.max_version) and self.min_version > self.max_version:
            raise ValueError(f"min_version {self.min_version} is above max_version {self.max_version}")
        return self


class OriginCustomSecurity(_CustomSecurity):
    """Origins may be old."""


class CustomSecurity(_CustomSecurity):
    min_version: TlsVersion = "TLS_AUTO"
    max_version: TlsVersion = "TLS_AUTO"


class OriginTlsConfig(Value):
    """`default_security` is TLS 1.2 and up; `medium_security` and `low_security` start with 1.0."""

    choices = (Choice("choice", ("default_security", "medium_security", "low_security", "custom_security"), default="default_security"),)

    default_security: Empty | None = None
    medium_security: Empty | None = None
    low_security: Empty | None = None
    custom_security: OriginCustomSecurity | None = None


class TlsConfig(Value):
    choices = (
        Choice(
            "choice",
            ("default_security", "custom_security"),
            default="default_security",
            refused={"medium_security": OLD_TLS, "low_security": OLD_TLS},
        ),
    )

    default_security: Empty | None = None
    custom_security: CustomSecurity | None = None


def certificates(url: str) -> list[x509.Certificate]:
    """Leaf first; raises ValueError unless the inline text is PEM with at least one certificate."""
    try:
        return x509.load_pem_x509_certificates(decode_inline(url))
    except ValueError as error:
        raise ValueError(f"should be certificates in PEM: {error}") from error


def _is_chain(url: str) -> str:
    certificates(url)
    return url


CertificateChain = Annotated[Inline, AfterValidator(_is_chain)]


class TlsCertificate(Value):
    choices = (
        Choice(
            "ocsp_stapling_choice",
            off=("use_system_defaults", "disable_ocsp_stapling"),
            refused={"custom_hash_algorithms": "OCSP stapling is not supported"},
        ),
    )
    unsupported = {"description_spec": "give description"}

    certificate_url: CertificateChain
    """PEM, leaf first."""
    private_key: Secret
    description: Text = Field("", max_length=1200)

    @model_validator(mode="after")
    def key_fits(self) -> Self:
        if (pem := self.private_key.clear) is not None:
            self.check_key(pem)
        return self

    def check_key(self, pem: bytes) -> None:
        """Raises ValueError unless it is the key of the certificate."""
        _check_key(pem, certificates(self.certificate_url)[0])


def _check_key(pem: bytes, leaf: x509.Certificate) -> None:
    """Raises ValueError unless it is the leaf's and of a type that Envoy takes; never quotes the key."""
    try:
        key, of_certificate = load_pem_private_key(pem, password=None), leaf.public_key()
    except (ValueError, TypeError):
        raise ValueError("private_key should be one unencrypted private key in PEM") from None
    except UnsupportedAlgorithm as error:
        raise ValueError(f"private_key should be RSA of 2048 bits or more, or ECDSA: {error}") from None
    weak_rsa = isinstance(key, rsa.RSAPrivateKey) and key.key_size < 2048
    if weak_rsa or not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise ValueError("private_key should be RSA of 2048 bits or more, or ECDSA")
    if isinstance(key, ec.EllipticCurvePrivateKey) and not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
        raise ValueError("private_key should be on curve P-256, P-384 or P-521")
    public, of_leaf = (item.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for item in (key.public_key(), of_certificate))
    if public != of_leaf:
        raise ValueError("private_key does not belong to the certificate")
