"""The fit: whether a model runs on a node's hardware, in which shape, and how fast. `fitting.fit` is the way in."""
