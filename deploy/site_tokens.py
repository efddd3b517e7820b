"""Registration tokens for sites, each into a file of a directory: `python site_tokens.py URL STATE_DIR DIRECTORY SITE…`. Safe to repeat."""

import json
import ssl
import sys
import urllib.request
from pathlib import Path


def main(url: str, state_dir: str, directory: str, *sites: str) -> None:
    trust = ssl.create_default_context(cafile=f"{state_dir}/ca.pem")
    operator = Path(state_dir, "operator.token").read_text().strip()
    for site in sites:
        file = Path(directory, site)
        if file.exists():
            continue
        request = urllib.request.Request(  # noqa: S310  # the URL is the operator's own
            f"{url}/api/register/namespaces/system/tokens",
            json.dumps({"metadata": {"name": site}, "spec": {"type": "JWT", "site_name": site}}).encode(),
            {"authorization": f"APIToken {operator}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, context=trust, timeout=30) as answer:  # noqa: S310
            token = json.load(answer)["spec"]["content"]
        file.touch(mode=0o600)
        file.write_text(token)


if __name__ == "__main__":
    main(*sys.argv[1:])
