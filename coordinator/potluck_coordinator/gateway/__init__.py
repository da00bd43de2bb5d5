"""The data plane: three ports, the links, and the one path that a request takes."""
