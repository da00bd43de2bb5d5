"""Potluck's relay beside others: `python -m tests.benchmarks.relay` runs it, and docs/benchmarks/README.md says how it measures."""
