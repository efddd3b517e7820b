"""A pod that serves as fast as this machine can: nginx, with a small answer at `/` and a large one at `/bulk`."""

import os
from pathlib import Path

import typer

BULK_BYTES = 512 << 20

CONF = """
worker_processes 2;
daemon off;
pid {name}.pid;
error_log {name}.error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 1000000;
    client_body_temp_path {name}.body; proxy_temp_path {name}.proxy; fastcgi_temp_path {name}.fastcgi;
    uwsgi_temp_path {name}.uwsgi; scgi_temp_path {name}.scgi;
    server {{
        listen {listen};
        location = / {{ return 200 "ok\\n"; }}
        location = /bulk {{ root {directory}; }}
    }}
}}
"""


def main(listen: str = typer.Option(...), pod: str = typer.Option(...)) -> None:
    directory = Path.cwd()
    with (directory / "bulk").open("wb") as bulk:
        bulk.truncate(BULK_BYTES)
    conf = directory / f"{pod}.conf"
    conf.write_text(CONF.format(name=directory / pod, listen=listen, directory=directory))
    (directory / "bulk").chmod(0o644)
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    os.execvp("nginx", ["nginx", "-p", str(directory), "-c", str(conf), *user])


if __name__ == "__main__":
    typer.run(main)
