"""Intent and observations in, snapshots out. No clock, randomness, I/O, logging or framework inside."""
