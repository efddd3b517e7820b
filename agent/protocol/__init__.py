"""The wire between agents and control plane: pydantic values only. The control plane may import this package alone."""
