"""What vLLM imports into its own processes: each file by its bare name, with this folder on the path. Nothing of ours may import it."""
