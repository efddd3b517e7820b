"""TLS of load balancers and towards origins. Private keys stay references."""

from typing import Literal

from agent.protocol import items
from controlplane.resources.base import chosen
from controlplane.resources.http_loadbalancer import TlsParameters
from controlplane.resources.origin_pool import UseTls
from controlplane.resources.secrets import Secret, decode_inline
from controlplane.resources.tls import CIPHERS, CustomSecurity, OriginCustomSecurity, TlsCertificate

OriginVersion = Literal["TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3"]

_MEDIUM = tuple(sorted(cipher for cipher in CIPHERS.values() if cipher.startswith("ECDHE")))
_LOW = tuple(sorted(CIPHERS.values()))
"""Versions below 1.2 have none in common with the proxy's defaults, so medium and low security name theirs."""


def secret_ref(secret: Secret) -> str:
    assert secret.ref is not None, "secrets are sealed before an object is accepted"
    return secret.ref


def inline_text(url: str) -> str:
    return decode_inline(url).decode(errors="replace")


def server_tls(parameters: TlsParameters) -> items.ServerTls:
    certificates = tuple(_certificate(certificate) for certificate in parameters.tls_certificates)
    custom = parameters.tls_config.custom_security
    if not custom:
        return items.ServerTls(certificates=certificates)
    return items.ServerTls(
        certificates=certificates,
        min_version="TLSv1_2" if custom.min_version == "TLS_AUTO" else custom.min_version,
        max_version="TLSv1_3" if custom.max_version == "TLS_AUTO" else custom.max_version,
        cipher_suites=_ciphers(custom),
    )


def origin_tls(tls: UseTls) -> items.OriginTls:
    low, high, ciphers = _origin_security(tls)
    verification = tls.use_server_verification
    return items.OriginTls(
        sni=tls.sni,
        sni_from_host=tls.use_host_header_as_sni is not None,
        verify="none" if tls.skip_server_verification else "custom" if verification else "public",
        trusted_ca_pem=inline_text(verification.trusted_ca_url) if verification and verification.trusted_ca_url else "",
        min_version=low,
        max_version=high,
        cipher_suites=ciphers,
        client_certificate=_certificate(tls.use_mtls.tls_certificates[0]) if tls.use_mtls else None,
    )


def _certificate(certificate: TlsCertificate) -> items.TlsCertificate:
    return items.TlsCertificate(certificate_pem=inline_text(certificate.certificate_url), private_key=secret_ref(certificate.private_key))


def _origin_security(tls: UseTls) -> tuple[OriginVersion, OriginVersion, tuple[str, ...]]:
    level, custom = chosen(tls.tls_config, "choice")
    if level == "custom_security":
        return *_range(custom), _ciphers(custom)
    if level in ("medium_security", "low_security"):
        return "TLSv1_0", "TLSv1_3", _MEDIUM if level == "medium_security" else _LOW
    return "TLSv1_2", "TLSv1_3", ()


def _range(custom: OriginCustomSecurity) -> tuple[OriginVersion, OriginVersion]:
    high: OriginVersion = "TLSv1_3" if custom.max_version == "TLS_AUTO" else custom.max_version
    if custom.min_version != "TLS_AUTO":
        return custom.min_version, high
    return min("TLSv1_2", high), high


def _ciphers(custom: CustomSecurity | OriginCustomSecurity) -> tuple[str, ...]:
    """In BoringSSL's names and the user's order, without those of TLS 1.3."""
    return tuple(dict.fromkeys(CIPHERS[name] for name in custom.cipher_suites if name in CIPHERS))
