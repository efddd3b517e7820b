"""Background work; each loop is one small function."""
