import base64
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.discovery.kubeconfig import from_connection_info, from_item, from_kubeconfig, in_cluster
from agent.errors import Misconfigured
from agent.protocol.items import Discovery
from lab.kubernetes.tls import Authority

WORDS = [
    "token",
    "tokenFile",
    "exec",
    "current-context",
    "contexts",
    "clusters",
    "users",
    "name",
    "cluster",
    "user",
    "client-key-data",
    "1",
]
SECRET = "secret:5f6d1d4e-0000-4000-8000-000000000001:1"


def kubeconfig(user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> bytes:
    return json.dumps(
        {
            "current-context": "main",
            "contexts": [{"name": "main", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
            "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.1:6443", **(cluster or {})}}],
            "users": [{"name": "u", "user": user or {}}],
        }
    ).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_token_and_the_namespace_of_the_context_are_taken() -> None:
    access = from_kubeconfig(kubeconfig({"token": "abc"}))
    assert (access.server, access.user.token, access.namespace) == ("https://192.0.2.1:6443", "abc", "team")
    assert "abc" not in repr(access)


def test_certificates_are_taken_by_value() -> None:
    authority = Authority()
    pair = authority.client("agent")
    user = {"client-certificate-data": b64(pair.certificate_pem), "client-key-data": b64(pair.key_pem)}
    access = from_kubeconfig(kubeconfig(user, {"certificate-authority-data": b64(authority.certificate_pem)}))
    assert access.trust is not None
    assert len(access.trust.get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("user", "cluster", "words"),
    [
        ({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "aws"}}, {}, "exec plugin"),
        ({"auth-provider": {"name": "gcp"}}, {}, "'auth-provider', which is not supported"),
        ({"token": "t", "as": "root"}, {}, "'as', which is not supported"),
        ({}, {"proxy-url": "http://proxy"}, "'proxy-url', which is not supported"),
        ({"tokenFile": "/etc/shadow"}, {}, "names a file in 'tokenFile'"),
        ({"client-key": "/state/node.key"}, {}, "names a file in 'client-key'"),
        ({}, {"certificate-authority": "/etc/ssl/ca.pem"}, "names a file in 'certificate-authority'"),
        ({}, {"certificate-authority-data": "***"}, "not base64"),
        ({}, {"certificate-authority-data": b64(b"not a certificate")}, "cannot be used"),
        ({"client-certificate-data": b64(b"x"), "client-key-data": b64(b"y")}, {}, "cannot be used"),
        ({}, {"server": "192.0.2.1"}, "not a URL"),
        ({}, {"server": "https://[::1"}, "not a URL"),
        ({}, {"server": "https://"}, "not a URL"),
        ({"token": "a\nb"}, {}, "cannot be sent"),
        ({"token": 5}, {}, "'token' has a value of the wrong type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(user: dict[str, Any], cluster: dict[str, Any], words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        from_kubeconfig(kubeconfig(user, cluster))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"{", b"\x00", b"current-context: x\ncontexts: []", kubeconfig().replace(b'"users"', b'"other"')]
)
def test_what_is_no_kubeconfig_is_refused(data: bytes) -> None:
    with pytest.raises(Misconfigured, match="cannot be read"):
        from_kubeconfig(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'users:\n- user:\n    token: "hunter2\n    extra: x\n', "ScannerError in line 5"),
        (b"users:\n- user:\n    password: pass: hunter2\n", "ScannerError in line 3"),
        (b"users:\n- user: {token: hunter2}\n  x: @abc", "ScannerError in line 3"),
        (b"users: !!int hunter2", "ValueError"),
        (b"users: !!int ''", "IndexError"),
        (b"current-context: {token: hunter2}\ncontexts: []", "the name of its context is no text"),
        (b"hunter2", "should be a mapping with contexts"),
        (b"token: hunter2", "it has no current-context"),
        (b"current-context: there\ncontexts: []", "it has no context 'there'"),
    ],
)
def test_what_is_wrong_in_a_kubeconfig_is_said_without_its_secrets(data: bytes, words: str) -> None:
    with pytest.raises(Misconfigured) as refusal:
        from_kubeconfig(data)
    assert words in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(WORDS), inner)
    )
)
def test_nothing_in_a_kubeconfig_breaks_the_agent(user: Any) -> None:
    for data in (kubeconfig(user), json.dumps(user).encode()):
        with suppress(Misconfigured):
            from_kubeconfig(data)


def test_files_may_be_named_where_the_operator_gave_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(Authority().certificate_pem)
    access = from_kubeconfig(kubeconfig({"tokenFile": "token"}, {"certificate-authority": "ca.pem"}), tmp_path)
    assert access.user.token_file == str(tmp_path / "token")
    with pytest.raises(Misconfigured, match="cannot be read"):
        from_kubeconfig(kubeconfig({}, {"certificate-authority": "none.pem"}), tmp_path)


def test_a_pod_uses_its_service_account(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(Authority().certificate_pem)
    (tmp_path / "namespace").write_text("mesh\n")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    access = in_cluster(tmp_path, environment)
    assert (access.server, access.namespace, access.user.token_file) == ("https://[fd00::1]:443", "mesh", str(tmp_path / "token"))
    with pytest.raises(Misconfigured, match="not a pod"):
        in_cluster(tmp_path, {})


def test_connection_info_may_carry_a_client_certificate() -> None:
    authority = Authority()
    pair = authority.client("agent")
    access = from_connection_info(
        "192.0.2.1:6443",
        server_name="kubernetes",
        certificate_pem=pair.certificate_pem.decode(),
        client_key_pem=pair.key_pem,
        trusted_ca_pem=authority.certificate_pem.decode(),
    )
    assert (access.server, access.server_name) == ("https://192.0.2.1:6443", "kubernetes")


def test_a_discovery_item_is_read_with_its_secrets() -> None:
    item = Discovery(kubeconfig=SECRET)
    assert from_item(item, {SECRET: kubeconfig({"token": "abc"})}).user.token == "abc"
    with pytest.raises(Misconfigured, match="not been fetched"):
        from_item(item, {})
    with pytest.raises(Misconfigured, match="names no cluster"):
        from_item(Discovery(), {})
