"""Certificates are judged by a verifier that knows nothing of how they were made."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from controlplane import pki

NOW = datetime.now(UTC).replace(microsecond=0)  # noqa: TID251 - OpenSSL looks at the real clock
DOMAIN = "isthmus.test"
IDENTITY = pki.NodeIdentity(DOMAIN, "11111111-1111-4111-8111-111111111111", "s1", "n1")
OTHER_TENANT = "22222222-2222-4222-8222-222222222222"


@pytest.fixture(scope="module")
def root() -> pki.Authority:
    return pki.create_root(DOMAIN, NOW)


@pytest.fixture(scope="module")
def tenant(root: pki.Authority) -> pki.Authority:
    return pki.create_tenant_authority(root, IDENTITY.tenant_id, DOMAIN, NOW)


def csr(key: Any, *names: x509.GeneralName, organisation: str | None = None) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)] if organisation else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def handshake(
    anchor_pem: str, leaf: x509.Certificate, leaf_key: ec.EllipticCurvePrivateKey, tmp_path: Path, *, server_name: str, crl_pem: str = ""
) -> None:
    """A TLS handshake in memory, with `leaf` as the server; the client trusts `anchor_pem` alone, and not what was revoked. Raises `ssl.SSLError`."""
    pem = tmp_path / "leaf.pem"
    pem.write_text(pki.to_pem(leaf) + pki.private_key_pem(leaf_key))
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(pem)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(cadata=anchor_pem)
    if crl_pem:
        revoked = tmp_path / "revoked.pem"
        revoked.write_text(crl_pem)
        client_context.load_verify_locations(revoked)
        client_context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=server_name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_a_node_is_trusted_with_its_tenants_intermediate_as_the_only_anchor(tenant: pki.Authority, tmp_path: Path) -> None:
    key = pki.create_key()
    leaf = pki.issue_node(tenant, IDENTITY, key.public_key(), NOW)
    handshake(tenant.certificate_pem, leaf, key, tmp_path, server_name=IDENTITY.dns_name)


def test_a_node_of_another_tenant_under_the_same_root_is_not_trusted(root: pki.Authority, tenant: pki.Authority, tmp_path: Path) -> None:
    other = pki.create_tenant_authority(root, OTHER_TENANT, DOMAIN, NOW)
    key = pki.create_key()
    stranger = pki.NodeIdentity(DOMAIN, OTHER_TENANT, "s1", "n1")
    leaf = pki.issue_node(other, stranger, key.public_key(), NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tenant.certificate_pem, leaf, key, tmp_path, server_name=stranger.dns_name)


def test_a_tenants_authority_cannot_speak_for_another_tenant(tenant: pki.Authority, tmp_path: Path) -> None:
    key = pki.create_key()
    forged = pki.NodeIdentity(DOMAIN, OTHER_TENANT, "s1", "n1")
    leaf = pki.issue_node(tenant, forged, key.public_key(), NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(tenant.certificate_pem, leaf, key, tmp_path, server_name=forged.dns_name)


def test_the_servers_authority_cannot_issue_an_identity_of_the_fabric(root: pki.Authority, tmp_path: Path) -> None:
    servers = pki.create_servers_authority(root, DOMAIN, NOW)
    key = pki.create_key()
    leaf = pki.issue_node(servers, IDENTITY, key.public_key(), NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(servers.certificate_pem, leaf, key, tmp_path, server_name=IDENTITY.dns_name)


def test_a_control_plane_is_trusted_under_its_names_and_addresses(root: pki.Authority, tmp_path: Path) -> None:
    servers = pki.create_servers_authority(root, DOMAIN, NOW)
    key = pki.create_key()
    leaf = pki.issue_server(servers, ["control.example", "127.0.0.1"], key.public_key(), NOW)
    handshake(servers.certificate_pem, leaf, key, tmp_path, server_name="control.example")
    handshake(servers.certificate_pem, leaf, key, tmp_path, server_name="127.0.0.1")


def test_the_edges_authority_signs_names_of_edges_only(root: pki.Authority, tmp_path: Path) -> None:
    edges = pki.create_edges_authority(root, DOMAIN, NOW)
    key = pki.create_key()
    leaf = pki.issue_node(edges, IDENTITY, key.public_key(), NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(edges.certificate_pem, leaf, key, tmp_path, server_name=IDENTITY.dns_name)


def test_a_nodes_certificate_names_immutable_ids_and_starts_two_hours_back(tenant: pki.Authority) -> None:
    leaf = pki.issue_node(tenant, IDENTITY, pki.create_key().public_key(), NOW)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://{DOMAIN}/tenant/{IDENTITY.tenant_id}/site/s1/node/n1"]
    assert names.get_values_for_type(x509.DNSName) == [f"n1.s1.{IDENTITY.tenant_id}.{DOMAIN}"]
    assert (leaf.not_valid_before_utc, leaf.not_valid_after_utc) == (NOW - timedelta(hours=2), NOW + timedelta(days=7))


def test_an_authority_reads_back_what_was_stored_of_it(root: pki.Authority) -> None:
    again = pki.Authority.load(root.certificate_pem, root.private_key)
    assert again.certificate == root.certificate
    assert again.key.private_numbers() == root.key.private_numbers()


def test_a_csr_yields_its_key_and_nothing_else() -> None:
    key = pki.create_key()
    assert pki.requested_key(csr(key), site_name="berlin") == key.public_key()
    assert pki.requested_key(csr(key, organisation="berlin"), site_name="berlin") == key.public_key()


def test_a_renewal_may_repeat_the_nodes_own_names() -> None:
    key = pki.create_key()
    own = csr(key, x509.UniformResourceIdentifier(IDENTITY.uri), x509.DNSName(IDENTITY.dns_name))
    assert pki.requested_key(own, site_name="berlin", identity=IDENTITY) == key.public_key()


ON_SECT283K1 = """\
-----BEGIN CERTIFICATE REQUEST-----
MIHSMHMCAQAwDDEKMAgGA1UEAwwBeDBeMBAGByqGSM49AgEGBSuBBAAQA0oABAeH
JYS5hsb6M/Y0xejqdIsx3av6RBC5et/0hkdXx1lJ/bXliAPry7W2LB2IOk1GUu7n
WryjPJc6f7vippmZjzRJ8rrbA195qKAAMAoGCCqGSM49BAMCA08AMEwCJAEh9yfR
fljMBc6zAUf6yDrd4JnzrIQib6PXlUR17dtaQKBg5wIkAXzWJZ9CfTKpHMtcaeFs
AcICtJuaIdwW0xQBnypdTrosjStD
-----END CERTIFICATE REQUEST-----
"""
"""OpenSSL makes them; the library that reads them cannot."""
NAMES_TWICE = """\
-----BEGIN CERTIFICATE REQUEST-----
MIHwMIGYAgEAMAwxCjAIBgNVBAMMAXgwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AASeTmNuQx0P4+MSZg05NIZS1/VCem8prK43U54ZtAFAkgwLPZ6BjNCTqj/tfCo6
ooONTPNGFDzWYKZlQeXqZTbioCowKAYJKoZIhvcNAQkOMRswGTAMBgNVHREEBTAD
ggFhMAkGA1UdEQQCMAAwCgYIKoZIzj0EAwIDRwAwRAIgD/DJmDcAgagycIODefoJ
fqVHXijrSUEuzAwCsW5vi8UCIBgoY200fwLcZxy5kgwflZriApzxXL2Fj0SQNU2E
KbBv
-----END CERTIFICATE REQUEST-----
"""
NAME_OF_X400 = """\
-----BEGIN CERTIFICATE REQUEST-----
MIHnMIGOAgEAMAwxCjAIBgNVBAMMAXgwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAROGSo0jpCKn7ulzwEar4afK2hUWiukBGnzLUQ6yC8TwfWOa6ryHfRzpYqP0jV5
p/9GMWiO4wW0BTxj9iyve3SVoCAwHgYJKoZIhvcNAQkOMREwDzANBgNVHREEBjAE
owIFADAKBggqhkjOPQQDAgNIADBFAiAgfBeBBx/paJaLGlOcDrsOOVf12x4XHZQ2
5TD46onouwIhAIEzMlocMPhBe+QbIin3LKsTGoAA+n9wx0t3JYKFTbfG
-----END CERTIFICATE REQUEST-----
"""


@pytest.mark.parametrize(
    ("request_pem", "reason"),
    [
        ("not a pem", "not a certificate signing request"),
        (csr(rsa.generate_private_key(65537, 2048)), "P-256"),
        (csr(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (ON_SECT283K1, "P-256"),
        (NAMES_TWICE, "the extensions of the request cannot be read"),
        (NAME_OF_X400, "the extensions of the request cannot be read"),
        (csr(pki.create_key(), organisation="madrid"), "for site 'madrid', not 'berlin'"),
        (csr(pki.create_key(), x509.DNSName("n2.s2.t.isthmus.test")), "asks for the name 'n2.s2.t.isthmus.test'"),
    ],
)
def test_a_csr_that_is_unfit_or_speaks_for_somebody_else_is_refused(request_pem: str, reason: str) -> None:
    with pytest.raises(pki.BadCsr, match=reason):
        pki.requested_key(request_pem, site_name="berlin", identity=IDENTITY)


def test_a_csr_that_was_altered_is_refused() -> None:
    genuine = x509.load_pem_x509_csr(csr(pki.create_key(), organisation="berlin").encode())
    data = genuine.public_bytes(serialization.Encoding.DER).replace(b"berlin", b"madrid")
    altered = x509.load_der_x509_csr(data).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(pki.BadCsr, match="signature"):
        pki.requested_key(altered, site_name="madrid")


@pytest.mark.parametrize("ahead_s", [0, 3600, -3600])
def test_what_was_revoked_is_refused_and_nothing_else_though_clocks_differ(tenant: pki.Authority, tmp_path: Path, ahead_s: int) -> None:
    """`ahead_s`: of the control plane's clock."""
    then = NOW + timedelta(seconds=ahead_s)
    key = pki.create_key()
    gone, stays = (pki.issue_node(tenant, IDENTITY, key.public_key(), then) for _ in range(2))
    crl_pem = pki.revocations(tenant, [gone.serial_number], then)
    handshake(tenant.certificate_pem, stays, key, tmp_path, server_name=IDENTITY.dns_name, crl_pem=crl_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
        handshake(tenant.certificate_pem, gone, key, tmp_path, server_name=IDENTITY.dns_name, crl_pem=crl_pem)


def test_versions_of_an_authority_stand_side_by_side(root: pki.Authority, tenant: pki.Authority, tmp_path: Path) -> None:
    """As anchors, each with its own name and key identifier, by which its leaves find it."""
    following = pki.create_tenant_authority(root, IDENTITY.tenant_id, DOMAIN, NOW, 2)
    assert following.certificate.subject != tenant.certificate.subject
    both = following.certificate_pem + tenant.certificate_pem
    lists = pki.revocations(following, (), NOW) + pki.revocations(tenant, (), NOW)
    for authority in (tenant, following):
        key = pki.create_key()
        leaf = pki.issue_node(authority, IDENTITY, key.public_key(), NOW)
        handshake(both, leaf, key, tmp_path, server_name=IDENTITY.dns_name, crl_pem=lists)
        issuer = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier or b""
        assert issuer.hex() == pki.key_identifier(authority.certificate_pem)


@pytest.mark.parametrize("role", ["root", "servers", "edges"])
def test_a_long_trust_domain_leaves_room_for_the_version(root: pki.Authority, role: str) -> None:
    domain = ".".join(["a" * 30] * 3)
    made = {
        "root": lambda: pki.create_root(domain, NOW, 12),
        "servers": lambda: pki.create_servers_authority(root, domain, NOW, 12),
        "edges": lambda: pki.create_edges_authority(root, domain, NOW, 12),
    }[role]()
    assert made.certificate.subject.rfc4514_string().endswith(" v12")


def test_what_is_sealed_opens_under_any_version_that_is_still_in_the_ring() -> None:
    old = pki.KeyRing.generate()
    sealed = old.seal(b"secret", "secret:a:1")
    rotated = pki.KeyRing.parse(old.dump() + pki.KeyRing.generate().dump().replace("1:", "2:", 1))
    assert rotated.unseal(sealed, "secret:a:1") == b"secret"
    with pytest.raises(pki.Unsealable, match="key-encryption key 2 is missing"):
        old.unseal(rotated.seal(b"secret", "secret:a:1"), "secret:a:1")


def test_what_is_sealed_opens_for_its_purpose_only_and_not_when_altered() -> None:
    ring = pki.KeyRing.generate()
    sealed = ring.seal(b"secret", "secret:a:1")
    with pytest.raises(pki.Unsealable, match="secret:b:1"):
        ring.unseal(sealed, "secret:b:1")
    with pytest.raises(pki.Unsealable):
        ring.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), "secret:a:1")
    with pytest.raises(pki.Unsealable, match="missing"):
        pki.KeyRing({2: ring.keys[1]}).unseal(sealed, "secret:a:1")


@pytest.mark.parametrize("text", ["", "abc", "1:AAAA", "0:" + "A" * 43 + "=", "1 2"])
def test_a_key_ring_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        pki.KeyRing.parse(text)
