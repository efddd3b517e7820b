"""The front page. Balances come from the ledger over TCP, transfers and referrals over HTTP, all through load balancers of its own site."""

import json
import os
from html import escape
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from lab.bank.service import Answer, query, serve

PAGE = """<!doctype html>
<title>The Isthmus Bank</title>
<style>body {{ font: 16px/1.5 sans-serif; margin: 3em auto; max-width: 40em }} td {{ padding: 0 2em 0 0 }}</style>
<h1>The Isthmus Bank</h1>
<p>This page was made by a pod in cluster A. Everything below comes from cluster B.</p>
<h2>Accounts</h2><p>Read from the ledger, a Postgres, through a TCP load balancer.</p><table>{accounts}</table>
<h2>Latest transfers</h2><p>Answered by pod <b>{pod}</b> through an HTTP load balancer.</p><table>{transfers}</table>
<p>{referrals} friends were recommended so far.</p>
"""


def page(_: Any) -> Answer:
    accounts = query("SELECT name, balance FROM accounts ORDER BY name")
    pod, transfers = _ask("/api/transfers")
    _, referrals = _ask("/api/referrals")
    return Answer(
        PAGE.format(
            accounts=_rows(accounts),
            transfers=_rows([{key: row[key] for key in ("sender", "receiver", "amount")} for row in transfers]),
            pod=escape(pod),
            referrals=referrals["referrals"],
        )
    )


def accounts(_: Any) -> Answer:
    return Answer(query("SELECT name, balance FROM accounts ORDER BY name"))


def _ask(path: str) -> tuple[str, Any]:
    """Pod and JSON of the bank's other parts; `BANK` is the load balancer's address, its domain in `BANK_HOST`."""
    address = urlsplit(os.environ["BANK"])
    connection = HTTPConnection(str(address.hostname), address.port, timeout=10)
    try:
        connection.request("GET", path, headers={"host": os.environ["BANK_HOST"]})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise OSError(f"{path} answered {answer.status}: {body.decode(errors='replace')}")
        return answer.headers.get("x-pod", "?"), json.loads(body)
    finally:
        connection.close()


def _rows(rows: list[dict[str, Any]]) -> str:
    return "".join("<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows)


if __name__ == "__main__":
    serve({"GET /": page, "GET /api/accounts": accounts})
