"""Inference servers as subprocesses behind one protocol: one module per engine."""
