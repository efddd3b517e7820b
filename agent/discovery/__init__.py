"""How a node finds the endpoints of origins: Kubernetes clusters, DNS names and plain addresses."""
