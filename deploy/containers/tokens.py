"""Registration tokens for sites, each into a file of a directory: `python tokens.py URL STATE_DIR DIRECTORY SITE…`. Safe to repeat.

A site whose name begins with `edge-` is first made a regional edge, which is the operator's to do.
"""

import json
import ssl
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any


def main(url: str, state_dir: str, directory: str, *sites: str) -> None:
    trust = ssl.create_default_context(cafile=f"{state_dir}/ca.pem")
    post = partial(_post, url, Path(state_dir, "operator.token").read_text().strip(), trust)
    for site in sites:
        file = Path(directory, site)
        if file.exists():
            continue
        if site.startswith("edge-"):
            post("/api/config/namespaces/system/sites", {"metadata": {"name": site}, "spec": {"site_type": "REGIONAL_EDGE"}})
        token = post("/api/register/namespaces/system/tokens", {"metadata": {"name": site}, "spec": {"type": "JWT", "site_name": site}})
        file.touch(mode=0o640)  # agents with IPsec are another user, of the same group
        file.write_text(token["spec"]["content"])


def _post(url: str, operator: str, trust: ssl.SSLContext, path: str, body: object) -> Any:
    headers = {"authorization": f"APIToken {operator}", "content-type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)  # noqa: S310  # the URL is the operator's own
    with urllib.request.urlopen(request, context=trust, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
