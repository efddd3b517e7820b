"""Use cases: authorise, check, store. Sessions come in, nobody commits."""
