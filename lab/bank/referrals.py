"""Recommend the bank to a friend."""

from typing import Any

from lab.bank.service import Answer, query, serve


def refer(friend: Any) -> Answer:
    return Answer(
        query("INSERT INTO referrals (email) VALUES (%s) ON CONFLICT (email) DO UPDATE SET at = now() RETURNING id", friend["email"])[0]
    )


def count(_: Any) -> Answer:
    return Answer(query("SELECT count(*) AS referrals FROM referrals")[0])


if __name__ == "__main__":
    serve({"POST /api/referrals": refer, "GET /api/referrals": count})
