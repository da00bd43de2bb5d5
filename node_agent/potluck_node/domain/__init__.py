"""Decisions of the agent as plain synchronous functions over frozen values."""
