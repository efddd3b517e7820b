"""Postgres: tables, sessions and queries. Values in, values out; nobody commits below the request."""
