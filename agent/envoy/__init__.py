"""Snapshot and local state in, Envoy resources out. No clock, randomness, I/O, logging or framework inside."""
