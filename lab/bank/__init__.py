"""A small bank of four parts: `web` in one cluster; `transfers`, `referrals` and the `ledger` (a real Postgres) in another."""
