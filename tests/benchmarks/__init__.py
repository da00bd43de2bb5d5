"""What Potluck's relay costs, beside its peers. `python -m tests.benchmarks.relay` runs it; docs/benchmarks.md says how it measures."""
