"""A whole fabric on one machine: real control plane, agents, Envoys and pods, and networks between them that can be broken."""
