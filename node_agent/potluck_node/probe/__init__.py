"""What this machine has: one module for each source of facts. A failing probe costs its own fact and nothing else."""
