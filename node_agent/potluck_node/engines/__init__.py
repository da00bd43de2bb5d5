"""Inference servers as subprocesses. Each kind has an `Engine` here, and may have a server process of its own beside it."""
