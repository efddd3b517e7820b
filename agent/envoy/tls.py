"""Transport sockets and the secrets that they name. Secrets go over ADS, so that renewing one changes no listener and no cluster."""

from collections.abc import Iterable

from envoy.extensions.filters.listener.tls_inspector.v3.tls_inspector_pb2 import TlsInspector
from envoy.extensions.transport_sockets.internal_upstream.v3.internal_upstream_pb2 import InternalUpstreamTransport
from envoy.extensions.transport_sockets.raw_buffer.v3.raw_buffer_pb2 import RawBuffer
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.extensions.transport_sockets.tls.v3.tls_pb2 import DownstreamTlsContext, UpstreamTlsContext

from agent.envoy import names
from agent.envoy.inputs import ItemId, NodeIdentity, Scope
from agent.envoy.messages import ADS, METADATA, Fields, extension, flag
from agent.envoy.resources import Resource, resource
from agent.protocol.items import OriginTls, ServerTls, TlsCertificate

CIPHERS_OF_PEERS = "TLSv1_3"
"""Between sites nothing older is spoken. Upstream contexts default to a maximum of 1.2, so both ends of the range are set."""


def _sds(name: str) -> Fields:
    return {"name": name, "sds_config": ADS}


def certificate_name(certificate: TlsCertificate) -> str:
    return f"tls|{certificate.private_key}"


def secret(certificate: TlsCertificate, private_key: bytes, source: ItemId) -> Resource:
    """A certificate that a user gave."""
    pair = {
        "certificate_chain": {"inline_string": certificate.certificate_pem},
        "private_key": {"inline_bytes": private_key},
    }
    return resource(Secret(name=certificate_name(certificate), tls_certificate=pair), [source])


def node_secrets(node: NodeIdentity, scope: Scope, site: ItemId) -> tuple[Resource, ...]:
    """The node's own certificate, and the anchors of its peers and of regional edges: one intermediate each, alone."""
    pair = {
        "certificate_chain": {"inline_string": node.certificate_pem},
        "private_key": {"inline_string": node.private_key_pem},
    }
    anchors = (
        (names.PEER_ANCHOR_SECRET, scope.peer_anchor_pem, scope.peer_crl_pem),
        (names.EDGE_ANCHOR_SECRET, scope.edge_anchor_pem, scope.edge_crl_pem),
    )
    return (
        resource(Secret(name=names.NODE_SECRET, tls_certificate=pair), []),
        *(anchor(name, pem, crl_pem, site) for name, pem, crl_pem in anchors if pem),
    )


def anchor(name: str, pem: str, crl_pem: str, source: ItemId) -> Resource:
    """What nodes' certificates have to be signed by, and which of those are refused all the same: only leaves are ever revoked."""
    context: Fields = {"trusted_ca": {"inline_string": pem}}
    if crl_pem:
        context |= {"crl": {"inline_string": crl_pem}, "only_verify_leaf_cert_crl": True}
    return resource(Secret(name=name, validation_context=context), [source])


def _peer_context(uri_prefix: str, anchor_secret: str, alpn: Iterable[str]) -> Fields:
    return {
        "tls_params": {"tls_minimum_protocol_version": CIPHERS_OF_PEERS, "tls_maximum_protocol_version": CIPHERS_OF_PEERS},
        "tls_certificate_sds_secret_configs": [_sds(names.NODE_SECRET)],
        "alpn_protocols": list(alpn),
        "combined_validation_context": {
            "default_validation_context": {
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": uri_prefix}}],
            },
            "validation_context_sds_secret_config": _sds(anchor_secret),
        },
    }


def to_node(uri_prefix: str, anchor_secret: str, *, alpn: Iterable[str] = ("h2",), server_name: str = "") -> Fields:
    """Transport socket towards a node whose certificate says who it is: its URI begins like this, and the anchor signed it."""
    context = _peer_context(uri_prefix, anchor_secret, alpn)
    return extension("envoy.transport_sockets.tls", UpstreamTlsContext(common_tls_context=context, sni=server_name))


def from_node(uri_prefix: str, anchor_secret: str, *, alpn: Iterable[str] = ("h2",)) -> Fields:
    """Transport socket for clients whose certificate must say the same."""
    context = _peer_context(uri_prefix, anchor_secret, alpn)
    socket = DownstreamTlsContext(common_tls_context=context, require_client_certificate=flag(True))
    return extension("envoy.transport_sockets.tls", socket)


def inspector() -> Fields:
    """Listener filter: reads the name that the client asks for, by which its filter chain is chosen."""
    return extension("envoy.filters.listener.tls_inspector", TlsInspector())


def server(tls: ServerTls) -> Fields:
    """Transport socket of a load balancer."""
    context = {
        "tls_params": {
            "tls_minimum_protocol_version": tls.min_version,
            "tls_maximum_protocol_version": tls.max_version,
            "cipher_suites": tls.cipher_suites,
        },
        "tls_certificate_sds_secret_configs": [_sds(certificate_name(certificate)) for certificate in tls.certificates],
        "alpn_protocols": ["h2", "http/1.1"],
    }
    return extension("envoy.transport_sockets.tls", DownstreamTlsContext(common_tls_context=context))


def to_origin(tls: OriginTls, alpn: Iterable[str], trusted_ca_file: str, expected: Iterable[str], *, by_origin: bool) -> Fields:
    """Transport socket for origins. `trusted_ca_file` holds the public roots.

    Their certificates must have one of the names `expected`, if there are any. `by_origin`: where no Host header tells SNI, it is the name of
    the origin, and their certificates must have that.
    """
    context: Fields = {
        "tls_params": {
            "tls_minimum_protocol_version": tls.min_version,
            "tls_maximum_protocol_version": tls.max_version,
            "cipher_suites": tls.cipher_suites,
        },
        "alpn_protocols": list(alpn),
    }
    if tls.client_certificate is not None:
        context["tls_certificate_sds_secret_configs"] = [_sds(certificate_name(tls.client_certificate))]
    if tls.verify != "none":
        roots = {"filename": trusted_ca_file} if tls.verify == "public" else {"inline_string": tls.trusted_ca_pem}
        matchers = [{"san_type": "DNS", "matcher": {"exact": name, "ignore_case": True}} for name in expected]
        context["validation_context"] = {"trusted_ca": roots, "match_typed_subject_alt_names": matchers}
    verified = by_origin and tls.verify != "none"
    socket = UpstreamTlsContext(common_tls_context=context, sni=tls.sni or "", auto_host_sni=by_origin, auto_sni_san_validation=verified)
    return extension("envoy.transport_sockets.tls", socket)


def plaintext() -> Fields:
    return extension("envoy.transport_sockets.raw_buffer", RawBuffer())


def internal(inside: Fields | None = None, *, passed: str = "") -> Fields:
    """Transport socket for internal listeners: the host's metadata and shared filter state go along. `inside`: what is spoken through it.

    `passed`: whose metadata goes along besides ours.
    """
    metadata = [{"name": name, "kind": {"host": {}}} for name in (METADATA, passed) if name]
    socket = InternalUpstreamTransport(passthrough_metadata=metadata, transport_socket=inside or plaintext())
    return extension("envoy.transport_sockets.internal_upstream", socket)
