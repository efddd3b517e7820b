"""Money transfer: moves money between accounts in the ledger, all or nothing."""

from typing import Any

from lab.bank.service import Answer, query, serve

MOVE = """
    WITH taken AS (UPDATE accounts SET balance = balance - %s WHERE name = %s AND balance >= %s
                     AND EXISTS (SELECT FROM accounts WHERE name = %s) RETURNING name),
         given AS (UPDATE accounts SET balance = balance + %s WHERE name = %s AND EXISTS (SELECT FROM taken) RETURNING name)
    INSERT INTO transfers (sender, receiver, amount) SELECT taken.name, given.name, %s FROM taken, given RETURNING id
"""


def transfer(order: Any) -> Answer:
    sender, receiver, amount = order["from"], order["to"], int(order["amount"])
    if amount <= 0 or sender == receiver:
        return Answer({"message": "an amount above zero, to someone else, please"}, 400)
    moved = query(MOVE, amount, sender, amount, receiver, amount, receiver, amount)
    return Answer(moved[0]) if moved else Answer({"message": f"{sender} cannot send {amount} to {receiver}"}, 409)


def recent(_: Any) -> Answer:
    return Answer(query("SELECT sender, receiver, amount, at FROM transfers ORDER BY id DESC LIMIT 10"))


def limits(_: Any) -> Answer:
    """Needs no ledger, so it is what load is measured with."""
    return Answer({"per_transfer": 10_000, "currency": "EUR"})


if __name__ == "__main__":
    serve({"POST /api/transfers": transfer, "GET /api/transfers": recent, "GET /api/transfers/limits": limits})
