"""The sub-commands of `potluck` that any person may need; the coordinator's and the node's come from their own packages."""
