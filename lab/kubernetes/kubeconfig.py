"""The kubeconfig with which to reach an emulator. JSON, which is YAML."""

import base64
import json
from typing import Any

from lab.kubernetes.tls import Authority


def kubeconfig(server: str, *, token: str = "", authority: Authority | None = None, certificate: bool = False) -> str:
    """With `certificate` the user gets one of `authority` instead of the token."""
    cluster: dict[str, Any] = {"server": server}
    user: dict[str, Any] = {"token": token} if token else {}
    if authority:
        cluster["certificate-authority-data"] = base64.b64encode(authority.certificate_pem).decode()
        if certificate:
            pair = authority.client("lab")
            user = {
                "client-certificate-data": base64.b64encode(pair.certificate_pem).decode(),
                "client-key-data": base64.b64encode(pair.key_pem).decode(),
            }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": "lab", "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab", "namespace": "default"}}],
    }
    return json.dumps(config, indent=2) + "\n"
