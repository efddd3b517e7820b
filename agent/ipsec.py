"""IPsec tunnels as values: what strongSwan is to be told, and what it says of them. One IKE SA with one child SA for each pair of nodes.

Each end proves its mesh certificate. strongSwan accepts only self-signed anchors, so the anchor is the fabric's root, and besides the tenant's
intermediate must have signed the other's certificate, which must name the very node. TLS between Envoys stays inside.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agent.envoy.inputs import AgentSnapshot, NodeIdentity, body
from agent.protocol.items import IpsecNode, ItemKind, Peer, Site
from agent.protocol.overlay import overlay_address
from agent.protocol.report import IpsecTunnel

PORT = 4500
"""UDP, of IKE and of ESP alike, so that both pass NATs and NodePorts."""
CHILD = "overlay"
RETRANSMIT_S, RETRANSMISSIONS = 1.0, 4
"""A request is given up after so many, each that long after the one before."""
_UNANSWERED_S = RETRANSMIT_S * (RETRANSMISSIONS + 1)
_IKE = ("aes128gcm16-prfsha256-ecp256",)
_ESP = ("aes128gcm16-ecp256",)
_REKEY = "1800s"
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
_LIST = re.compile(r"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----\n?", re.DOTALL)


class Connection(NamedTuple):
    """To one node of a peer."""

    site_id: str
    config: dict[str, Any]
    """As vici's `load-conn` takes it."""
    begins: bool
    """Whether this node is the one to begin. The other does if this one fails to, as far as it can."""
    dialable: bool
    """Whether this node can begin at all."""


@dataclass(frozen=True)
class Trust:
    """What certificates are proved by: PEM, one certificate or list each."""

    anchors: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    """Of revoked certificates."""
    private_key_pem: str = field(default="", repr=False)


def trust(snapshot: AgentSnapshot, node: NodeIdentity) -> Trust:
    if snapshot.site is None:
        return Trust()
    site = body(snapshot.site, Site)
    anchors = (*_CERTIFICATE.findall(site.root_anchor_pem), *_CERTIFICATE.findall(site.peer_anchor_pem))
    return Trust(anchors, tuple(_LIST.findall(site.peer_crl_pem)), node.private_key_pem)


def connections(snapshot: AgentSnapshot, node: NodeIdentity, *, dialable: bool) -> dict[str, Connection]:
    """By id of the peer's node, sorted. `dialable`: whether others can reach this node's IKE daemon."""
    if snapshot.site is None:
        return {}
    site = body(snapshot.site, Site)
    peers = (body(item, Peer) for item in snapshot.by_kind[ItemKind.PEER])
    ends = sorted(((peer.site_id, end) for peer in peers for end in peer.ipsec), key=lambda it: it[1].node_id)
    return {
        end.node_id: Connection(site_id, _config(site, node, site_id, end), _begins(node.node_id, end, dialable), bool(end.host))
        for site_id, end in ends
    }


def _begins(own: str, end: IpsecNode, dialable: bool) -> bool:
    """One of both, so that they do not cross; the one that cannot be reached, if there is one."""
    return bool(end.host) and (not dialable or own < end.node_id)


def _config(site: Site, node: NodeIdentity, site_id: str, end: IpsecNode) -> dict[str, Any]:
    silent_s = max(1, round(site.tunnel_dead_timeout / 1000 - _UNANSWERED_S))
    leaf = _CERTIFICATE.findall(node.certificate_pem)[:1]
    return {
        "version": "2",
        "local_addrs": ["%any"],
        "remote_addrs": [end.host, "%any"] if end.host else ["%any"],
        "local_port": str(PORT),
        "remote_port": str(end.port),
        "encap": "yes",
        "mobike": "no",
        "unique": "replace",
        "keyingtries": "1",
        "dpd_delay": f"{silent_s}s",
        "rekey_time": "14400s",
        "send_cert": "always",
        "proposals": list(_IKE),
        "local": {"auth": "pubkey", "certs": leaf, "id": _identity(site, node.site_id, node.node_id)},
        "remote": {"auth": "pubkey", "id": _identity(site, site_id, end.node_id), "cacerts": _CERTIFICATE.findall(site.peer_anchor_pem)},
        "children": {
            CHILD: {
                "mode": "tunnel",
                "local_ts": [f"{overlay_address(node.node_id)}/128"],
                "remote_ts": [f"{overlay_address(end.node_id)}/128"],
                "esp_proposals": list(_ESP),
                "rekey_time": _REKEY,
                "start_action": "none",
                "close_action": "none",
                "dpd_action": "none",
            }
        },
    }


def _identity(site: Site, site_id: str, node_id: str) -> str:
    """The DNS name in a node's certificate."""
    return f"{node_id}.{site_id}.{site.tenant_id}.{site.trust_domain}"


class Association(NamedTuple):
    """What strongSwan says of one connection."""

    tunnel: IpsecTunnel
    asks: bool
    """Whether it is asking a silent peer for a sign of life."""


def associations(listed: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Association], frozenset[str]]:
    """Of vici's `list-sas`, by connection: tunnels that are up, the newest of each; and the connections that are being built."""
    up: dict[str, Association] = {}
    building = set()
    for name, sa in ((name, sa) for entry in listed for name, sa in entry.items()):
        child = next((child for child in _children(sa) if child.get("state") == b"INSTALLED"), None)
        if sa.get("state") == b"CONNECTING":
            building.add(name)
        elif child is not None and (name not in up or _number(sa, "established") <= up[name].tunnel.ike_age_s):
            up[name] = Association(_tunnel(name, sa, child), b"IKE_DPD" in sa.get("tasks-active", ()))
    return up, frozenset(building)


def _children(sa: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Newest first."""
    yield from sorted(sa.get("child-sas", {}).values(), key=lambda child: _number(child, "install-time"))


def _tunnel(name: str, sa: Mapping[str, Any], child: Mapping[str, Any]) -> IpsecTunnel:
    return IpsecTunnel(
        node_id=name,
        up=True,
        initiator=sa.get("initiator") == b"yes",
        remote=f"{_word(sa, 'remote-host')}:{_word(sa, 'remote-port')}",
        ike="/".join((_cipher(sa), _word(sa, "prf-alg"), _word(sa, "dh-group"))),
        esp=_cipher(child),
        ike_age_s=_number(sa, "established"),
        spi_in=_word(child, "spi-in"),
        spi_out=_word(child, "spi-out"),
        spi_age_s=_number(child, "install-time"),
        bytes_in=_number(child, "bytes-in"),
        bytes_out=_number(child, "bytes-out"),
    )


def _cipher(sa: Mapping[str, Any]) -> str:
    return f"{_word(sa, 'encr-alg')}-{_word(sa, 'encr-keysize')}"


def _word(values: Mapping[str, Any], key: str) -> str:
    return bytes(values.get(key, b"")).decode(errors="replace")


def _number(values: Mapping[str, Any], key: str) -> int:
    return int(values.get(key, 0))
