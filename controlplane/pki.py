"""The fabric's certificate authority, and sealing of what the database must not hold in clear.

    root (10 years) ─┬─ servers   control planes' HTTPS
                     ├─ edges     regional edges
                     ├─ tokens    no CA: signs registration tokens
                     └─ one per tenant, its nodes; the sole anchor of that tenant's gateways

Each may have several versions at a time, while one is being replaced by the next.

Values in, values out: no database, no files, and the clock is an argument.
"""

import base64
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.protocol.enrolment import BACKDATED_S

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=30)
NODE_LIFE = timedelta(days=7)
"""Unless the operator chooses another. Longer than the longest outage of the control plane that sites promise to survive; renewed at half."""
BACKDATED = timedelta(seconds=BACKDATED_S)
"""`notBefore` of every certificate lies so far back."""

_CLIENT_AND_SERVER = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
_NONCE_BYTES = 12
_VERSION_BYTES = 4


class BadCsr(ValueError):
    """A CSR that cannot be signed; the message says why."""


class Unsealable(Exception):
    """Sealed under a key that is not in the ring, for another purpose, or altered since."""


# --- authorities -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """A CA certificate and its key. The key only ever leaves the process sealed."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, certificate_pem: str, private_key: bytes) -> Self:
        """From the certificate and what `private_key` gave."""
        return cls(x509.load_pem_x509_certificate(certificate_pem.encode()), load_private_key(private_key))

    @property
    def certificate_pem(self) -> str:
        return to_pem(self.certificate)

    @property
    def private_key(self) -> bytes:
        """PKCS #8 in DER: for `KeyRing.seal`, never for a log or an answer."""
        return dump_private_key(self.key)


def create_root(trust_domain: str, now: datetime, version: int = 1) -> Authority:
    """The fabric's root; self-signed. Versions of an authority differ in their names, or verifiers would take one for the other."""
    key = create_key()
    name = _name(f"Isthmus root of {trust_domain}"[:57] + _versioned(version))
    builder = _authority(name, name, key.public_key(), now, path_length=1)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def create_servers_authority(root: Authority, trust_domain: str, now: datetime, version: int = 1) -> Authority:
    """Signs control planes' HTTPS certificates, and cannot sign an identity of the fabric."""
    constraints = x509.NameConstraints(permitted_subtrees=None, excluded_subtrees=[x509.UniformResourceIdentifier(trust_domain)])
    return create_intermediate(root, "servers" + _versioned(version), (ExtendedKeyUsageOID.SERVER_AUTH,), constraints, now)


def create_edges_authority(root: Authority, trust_domain: str, now: datetime, version: int = 1) -> Authority:
    """Signs regional edges, whose DNS names end with `edges.<trust domain>`."""
    constraints = _names_under(f"edges.{trust_domain}", trust_domain)
    return create_intermediate(root, "edges" + _versioned(version), _CLIENT_AND_SERVER, constraints, now)


def create_tenant_authority(root: Authority, tenant_id: str, trust_domain: str, now: datetime, version: int = 1) -> Authority:
    """Signs the tenant's nodes, whose DNS names end with `<tenant id>.<trust domain>`."""
    constraints = _names_under(f"{tenant_id}.{trust_domain}", trust_domain)
    return create_intermediate(root, f"tenant {tenant_id}" + _versioned(version), _CLIENT_AND_SERVER, constraints, now)


def create_tokens_signer(root: Authority, now: datetime) -> Authority:
    """Signs registration tokens (ES256), and no certificates."""
    key = create_key()
    builder = _certificate(_name("Isthmus tokens"), root.certificate.subject, key.public_key(), now, AUTHORITY_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(_issuer_of(root), critical=False)
    return Authority(builder.sign(root.key, hashes.SHA256()), key)


def create_intermediate(
    root: Authority, role: str, usages: Sequence[x509.ObjectIdentifier], constraints: x509.NameConstraints, now: datetime
) -> Authority:
    """An authority that signs leaves only, for these usages and names."""
    key = create_key()
    builder = _authority(_name(f"Isthmus {role}"), root.certificate.subject, key.public_key(), now, path_length=0)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(constraints, critical=True)
    builder = builder.add_extension(_issuer_of(root), critical=False)
    return Authority(builder.sign(root.key, hashes.SHA256()), key)


def _authority(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, *, path_length: int
) -> x509.CertificateBuilder:
    builder = _certificate(subject, issuer, key, now, AUTHORITY_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    return builder.add_extension(_key_usage(signs_certificates=True), critical=True)


def _versioned(version: int) -> str:
    return f" v{version}" if version > 1 else ""


def _names_under(dns_suffix: str, trust_domain: str) -> x509.NameConstraints:
    permitted = [x509.DNSName(dns_suffix), x509.UniformResourceIdentifier(trust_domain)]
    return x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None)


# --- leaves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeIdentity:
    """What a node's certificate says: immutable ids only, so that renaming anything changes nothing."""

    trust_domain: str
    tenant_id: str
    site_id: str
    node_id: str

    @property
    def uri(self) -> str:
        """Peers authorise its prefix up to the site."""
        return f"spiffe://{self.trust_domain}/tenant/{self.tenant_id}/site/{self.site_id}/node/{self.node_id}"

    @property
    def dns_name(self) -> str:
        return f"{self.node_id}.{self.site_id}.{self.tenant_id}.{self.trust_domain}"


def issue_node(
    authority: Authority, identity: NodeIdentity, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta = NODE_LIFE
) -> x509.Certificate:
    """A node's certificate, for both ends of a tunnel. Nothing of it comes from the CSR but the key.

    Its common name is the site: whoever accepts a reverse tunnel compares the whole subject with the site that the tunnel claims to lead to.
    """
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri), x509.DNSName(identity.dns_name)]
    return _leaf(authority, identity.site_id, names, _CLIENT_AND_SERVER, key, now, life)


def issue_server(authority: Authority, names: Sequence[str], key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
    """A control plane's HTTPS certificate for these DNS names and IP addresses, the first of which is its common name."""
    general_names = [_server_name(name) for name in names]
    return _leaf(authority, names[0], general_names, (ExtendedKeyUsageOID.SERVER_AUTH,), key, now, SERVER_LIFE)


def _server_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _leaf(
    authority: Authority,
    common_name: str,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
) -> x509.Certificate:
    builder = _certificate(_name(common_name[:64]), authority.certificate.subject, key, now, life)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(_issuer_of(authority), critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - BACKDATED).not_valid_after(now + life)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _issuer_of(authority: Authority) -> x509.AuthorityKeyIdentifier:
    identifier = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def key_identifier(authority_pem: str) -> str:
    """Of an authority's key, in hex: what certificates that it signed name as their issuer."""
    certificate = x509.load_pem_x509_certificate(authority_pem.encode())
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()


def fingerprint(certificate_pem: str) -> str:
    """SHA-256 of a certificate, in hex."""
    return x509.load_pem_x509_certificate(certificate_pem.encode()).fingerprint(hashes.SHA256()).hex()


def expiry(certificate_pem: str) -> datetime:
    return x509.load_pem_x509_certificate(certificate_pem.encode()).not_valid_after_utc


# --- revocation ------------------------------------------------------------------------------------------------------


def revocations(authority: Authority, serials: Iterable[int], now: datetime) -> str:
    """In PEM, the list of certificates that are refused before they expire. Good for as long as the authority: a site that is alone
    for a while must not refuse everybody because its list is old.
    """
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    builder = builder.last_update(now - BACKDATED).next_update(authority.certificate.not_valid_after_utc)
    builder = builder.add_extension(_issuer_of(authority), critical=False)
    builder = builder.add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
    for serial in sorted(serials):
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - BACKDATED).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


# --- requests and keys -----------------------------------------------------------------------------------------------


def requested_key(csr_pem: str, *, site_name: str, identity: NodeIdentity | None = None) -> ec.EllipticCurvePublicKey:
    """The key for which a CSR asks a certificate, after checking that its sender holds it.

    Names in a CSR decide nothing, but one that speaks for somebody else is refused: an organisation other than the
    site's name, or an alternative name other than the node's own (`identity`, known at renewal). Raises `BadCsr`.
    """
    csr, key = _load_csr(csr_pem)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadCsr("the key must be an EC key on curve P-256")
    for organisation in csr.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME):
        if organisation.value != site_name:
            raise BadCsr(f"the request is for site {str(organisation.value)!r}, not {site_name!r}")
    own = {identity.uri, identity.dns_name} if identity else set()
    for name in _alternative_names(csr):
        if name not in own:
            raise BadCsr(f"the request asks for the name {name!r}, which is not this node's")
    return key


def _load_csr(csr_pem: str) -> tuple[x509.CertificateSigningRequest, CertificatePublicKeyTypes]:
    """With its key, which it is signed with."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
    except ValueError:
        raise BadCsr("not a certificate signing request in PEM") from None
    try:
        key, valid = csr.public_key(), csr.is_signature_valid
    except UnsupportedAlgorithm as error:
        raise BadCsr(f"the key must be an EC key on curve P-256: {error}") from None
    except (ValueError, InvalidSignature):
        valid = False
    if not valid:
        raise BadCsr("the signature of the request does not match its key")
    return csr, key


def _alternative_names(csr: x509.CertificateSigningRequest) -> list[str]:
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise BadCsr("the extensions of the request cannot be read") from None
    return [str(name.value) for name in names]


def create_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def dump_private_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8 in DER."""
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def load_private_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_der_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not an EC key")
    return key


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """PKCS #8 in PEM, as servers read it."""
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()


def public_key_pem(key: ec.EllipticCurvePublicKey) -> str:
    """SubjectPublicKeyInfo in PEM: the same text for the same key."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def load_public_keys(pem: str) -> tuple[ec.EllipticCurvePublicKey, ...]:
    """All keys of a text with one or more in PEM, in their order."""
    begin = "-----BEGIN PUBLIC KEY-----"
    keys = (serialization.load_pem_public_key((begin + part).encode()) for part in pem.split(begin)[1:])
    return tuple(key for key in keys if isinstance(key, ec.EllipticCurvePublicKey))


def to_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


# --- sealing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyRing:
    """Key-encryption keys by version. The highest seals; older ones still unseal, until everything was sealed anew."""

    keys: Mapping[int, bytes]

    @classmethod
    def generate(cls) -> Self:
        return cls({1: secrets.token_bytes(32)})

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `version:base64` entries of 32 bytes each, separated by white space or commas. Raises `ValueError`."""
        keys = {}
        for entry in text.replace(",", " ").split():
            version, colon, encoded = entry.partition(":")
            key = base64.b64decode(encoded, validate=True)
            if not colon or not version.isdigit() or int(version) < 1 or len(key) != 32:
                raise ValueError("a key-encryption key is written <version>:<base64 of 32 bytes>")
            keys[int(version)] = key
        if not keys:
            raise ValueError("there is no key-encryption key")
        return cls(keys)

    def dump(self) -> str:
        """What `parse` reads."""
        return "\n".join(f"{version}:{base64.b64encode(key).decode()}" for version, key in sorted(self.keys.items())) + "\n"

    @property
    def version(self) -> int:
        return max(self.keys)

    def seal(self, plaintext: bytes, purpose: str) -> bytes:
        """AES-256-GCM: version, nonce, ciphertext. `purpose` says what it is, so that one sealed thing cannot stand in for another."""
        header = self.version.to_bytes(_VERSION_BYTES, "big")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return header + nonce + AESGCM(self.keys[self.version]).encrypt(nonce, plaintext, header + purpose.encode())

    @staticmethod
    def version_of(sealed: bytes) -> int:
        """Under which version it was sealed."""
        return int.from_bytes(sealed[:_VERSION_BYTES], "big")

    def unseal(self, sealed: bytes, purpose: str) -> bytes:
        """The inverse of `seal`. Raises `Unsealable`."""
        header, nonce, ciphertext = _split(sealed)
        version = self.version_of(sealed)
        if version not in self.keys:
            raise Unsealable(f"key-encryption key {version} is missing; there are {sorted(self.keys)}")
        try:
            return AESGCM(self.keys[version]).decrypt(nonce, ciphertext, header + purpose.encode())
        except InvalidTag:
            raise Unsealable(f"this is not {purpose}, or the key-encryption key {version} is another one") from None


def _split(sealed: bytes) -> tuple[bytes, bytes, bytes]:
    body = _VERSION_BYTES + _NONCE_BYTES
    return sealed[:_VERSION_BYTES], sealed[_VERSION_BYTES:body], sealed[body:]
