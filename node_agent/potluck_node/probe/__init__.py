"""What this machine has: one module per fact. A failing probe costs its own fact and nothing else."""
