"""Secrets never leave an object in the clear, and certificates are what they should be."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from controlplane.resources.registry import dump, load
from controlplane.resources.secrets import decode_inline, encode_inline, secrets_in, with_refs
from tests.unit.resources.resource_specs import changed, inline, read, refusals

REF = "secret:0190a1b2-0000-7000-8000-000000000001:1"
KUBECONFIG = b"apiVersion: v1\n"
PATH = "spec.discovery_k8s.access_info.kubeconfig_url"


def discovery(secret: Any) -> dict[str, Any]:
    return changed("discovery", discovery_k8s={"access_info": {"kubeconfig_url": secret, "reachable": {}}})


def https(*certificates: dict[str, Any], **tls: Any) -> dict[str, Any]:
    return {
        "domains": ["cart"],
        "https": {"tls_parameters": {"tls_certificates": list(certificates), **tls}},
        "do_not_advertise": {},
    }


def test_a_clear_secret_is_found_with_its_path() -> None:
    spec = read("discovery", discovery({"clear_secret_info": {"url": inline(KUBECONFIG)}, "secret_encoding_type": "EncodingNone"}))
    assert [(path, secret.clear, secret.ref) for path, secret in secrets_in(spec)] == [(PATH, KUBECONFIG, None)]


def test_a_clear_secret_is_neither_shown_nor_dumped() -> None:
    spec = read("discovery", discovery({"clear_secret_info": {"url": inline(KUBECONFIG)}}))
    assert inline(KUBECONFIG) not in repr(spec)
    with pytest.raises(ValueError, match="seal it first"):
        dump(spec)


def test_a_sealed_secret_reads_back_as_its_location_and_can_be_sent_again() -> None:
    spec = with_refs(read("discovery", discovery({"clear_secret_info": {"url": inline(KUBECONFIG)}})), {PATH: REF})
    assert dump(spec)["discovery_k8s"]["access_info"]["kubeconfig_url"] == {"blindfold_secret_info": {"location": REF}}
    assert read("discovery", dump(spec)) == load("discovery", dump(spec)) == spec
    assert [(path, secret.clear, secret.ref) for path, secret in secrets_in(spec)] == [(PATH, None, REF)]


def test_sealing_leaves_the_rest_alone(tls_certificate: dict[str, Any]) -> None:
    spec = read("http_loadbalancer", https(tls_certificate, tls_certificate))
    paths = [path for path, _ in secrets_in(spec)]
    assert paths == [f"spec.https.tls_parameters.tls_certificates[{index}].private_key" for index in (0, 1)]
    sealed = with_refs(spec, {paths[1]: REF})
    before, after = spec.https.tls_parameters.tls_certificates, sealed.https.tls_parameters.tls_certificates
    assert after[0] is before[0]
    assert after[1].certificate_url == before[1].certificate_url
    assert after[1].private_key.ref == REF
    assert with_refs(spec, {}) is spec


@pytest.mark.parametrize(
    ("secret", "path"),
    [
        ({}, "secret_info_oneof"),
        ({"clear_secret_info": {"url": "hello"}}, "clear_secret_info"),
        ({"clear_secret_info": {"url": "string:///!"}}, "clear_secret_info"),
        ({"clear_secret_info": {"url": inline(b"x"), "provider": "p"}}, "clear_secret_info.provider"),
        ({"blindfold_secret_info": {"location": "string:///AAAA"}}, "blindfold_secret_info.location"),
        ({"vault_secret_info": {"key": "k"}}, "vault_secret_info"),
        ({"clear_secret_info": {"url": inline(b"x")}, "secret_encoding_type": "EncodingBase64"}, "secret_encoding_type"),
    ],
)
def test_other_secrets_are_refused_without_quoting_them(secret: dict[str, Any], path: str) -> None:
    refused = refusals("discovery", discovery(secret))
    assert list(refused) == [f"{PATH}.{path}"]
    assert "hello" not in str(refused)


def test_inline_data_round_trips() -> None:
    assert decode_inline(encode_inline(b"\x00\xff")) == b"\x00\xff"


def test_a_certificate_with_its_key_is_accepted(tls_certificate: dict[str, Any]) -> None:
    spec = read("http_loadbalancer", https(tls_certificate | {"use_system_defaults": {}}))
    assert spec.https.port == 443
    assert spec.https.tls_parameters.tls_config.default_security is not None


def key_secret(pem: bytes) -> dict[str, Any]:
    return {"clear_secret_info": {"url": inline(pem)}}


def test_a_key_of_another_certificate_is_refused(tls_certificate: dict[str, Any], pem_of: Any) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    refused = refusals("http_loadbalancer", https(tls_certificate | {"private_key": key_secret(pem_of(stranger))}))
    assert refused == {"spec.https.tls_parameters.tls_certificates[0]": "private_key does not belong to the certificate"}


ON_SECT283K1 = """\
-----BEGIN PRIVATE KEY-----
MIGQAgEAMBAGByqGSM49AgEGBSuBBAAQBHkwdwIBAQQkAE9awADlEDLa47rwiJBI
3Cefof8NHBbbs0MuwWawxf8lCQjnoUwDSgAEB4clhLmGxvoz9jTF6Op0izHdq/pE
ELl63/SGR1fHWUn9teWIA+vLtbYsHYg6TUZS7udavKM8lzp/u+KmmZmPNEnyutsD
X3mo
-----END PRIVATE KEY-----
"""


def test_a_key_that_cannot_even_be_read_is_refused(tls_certificate: dict[str, Any]) -> None:
    refused = refusals("http_loadbalancer", https(tls_certificate | {"private_key": key_secret(ON_SECT283K1.encode())}))
    assert "private_key should be" in refused["spec.https.tls_parameters.tls_certificates[0]"]


@pytest.mark.parametrize(
    "unfit",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())],
    ids=["Ed25519", "an unusual curve"],
)
def test_a_key_that_the_proxy_cannot_use_is_refused(tls_certificate: dict[str, Any], pem_of: Any, unfit: Any) -> None:
    refused = refusals("http_loadbalancer", https(tls_certificate | {"private_key": key_secret(pem_of(unfit))}))
    assert "private_key should be" in refused["spec.https.tls_parameters.tls_certificates[0]"]


def test_what_is_no_pem_is_refused_without_quoting_it(tls_certificate: dict[str, Any]) -> None:
    refused = refusals(
        "http_loadbalancer",
        https(
            tls_certificate | {"certificate_url": inline(b"topsecret")},
            tls_certificate | {"private_key": key_secret(b"topsecret")},
        ),
    )
    assert list(refused) == [
        "spec.https.tls_parameters.tls_certificates[0].certificate_url",
        "spec.https.tls_parameters.tls_certificates[1]",
    ]
    assert "topsecret" not in str(refused)


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"low_security": {}}, "low_security"),
        ({"custom_security": {"cipher_suites": []}}, "custom_security.cipher_suites"),
        ({"custom_security": {"cipher_suites": ["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA25"]}}, "custom_security.cipher_suites[0]"),
        ({"custom_security": {"min_version": 1, "cipher_suites": ["TLS_AES_128_GCM_SHA256"]}}, "custom_security.min_version"),
        (
            {"custom_security": {"min_version": "TLSv1_3", "max_version": "TLSv1_2", "cipher_suites": ["TLS_AES_128_GCM_SHA256"]}},
            "custom_security",
        ),
    ],
)
def test_weak_or_senseless_tls_is_refused(tls_certificate: dict[str, Any], config: dict[str, Any], path: str) -> None:
    refused = refusals("http_loadbalancer", https(tls_certificate, tls_config=config))
    assert list(refused) == [f"spec.https.tls_parameters.tls_config.{path}"]


def test_origins_may_be_old() -> None:
    tls: dict[str, Any] = {"tls_config": {"low_security": {}}, "skip_server_verification": {}}
    assert read("origin_pool", changed("origin_pool", use_tls=tls)).use_tls.tls_config.low_security is not None


def test_client_certificates_are_refused_by_name(tls_certificate: dict[str, Any]) -> None:
    refused = refusals("http_loadbalancer", https(tls_certificate, use_mtls={}))
    assert refused == {"spec.https.tls_parameters.use_mtls": "client certificates are not supported"}
