"""Reading what Envoy 1.40 answers."""

from agent.tunnels import Tunnels, dialled, encryption

STATS = """\
cluster.edge|e1.ssl.versions.TLSv1.3: 2
cluster.path|s1|direct.ssl.ciphers.TLS_AES_128_GCM_SHA256: 7
cluster.path|s1|direct.ssl.curves.P-256: 1
cluster.path|s1|direct.ssl.curves.X25519MLKEM768: 6
cluster.path|s1|direct.ssl.versions.TLSv1.3: 7
cluster.path|s1|e1.ssl.versions.TLSv1.3: 0
cluster.site|s1.ssl.versions.TLSv1.2: 1
cluster.site|s2.ssl.versions.TLSv1.3: 1
dialled_tunnels.worker_0.cluster.tunnels|e1.connected: 2
dialled_tunnels.worker_0.cluster.tunnels|e1.connecting: 5
dialled_tunnels.worker_1.cluster.tunnels|e1.connected: 1
dialled_tunnels.worker_1.cluster.tunnels|e2.connected: 0
dialled_tunnels.worker_1.host.10.0.0.1:15443.connected: 1
"""


def test_the_encryption_of_each_path_is_the_one_that_is_negotiated() -> None:
    found = encryption(STATS)
    assert found.of("s1", "direct") == "TLSv1.3 TLS_AES_128_GCM_SHA256 X25519MLKEM768"
    assert found.of("s1", "e1") == ""
    assert found.of("s2", "direct") == "TLSv1.3", "where that is the only path"
    assert found.of("s2", "e1") == ""
    assert found.of("e1", "") == "TLSv1.3"


def test_tunnels_are_counted_over_workers_and_dated() -> None:
    first = dialled(STATS, {}, 10.0)
    assert first == {"e1": Tunnels(3, 10.0), "e2": Tunnels(0, 10.0)}
    assert dialled(STATS, {"e1": Tunnels(1, 5.0), "e2": Tunnels(1, 5.0)}, 10.0) == {"e1": Tunnels(3, 5.0), "e2": Tunnels(0, 10.0)}
