"""The regional-edge control plane: keeps what users want, compiles it for sites, and tells what became of it."""
