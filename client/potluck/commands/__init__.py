"""The sub-commands of `potluck` that any person may need, and what they share.

Commands are in `access`, `chat`, `demo`, `money`, `pool` and `up`; the other modules serve them. The coordinator's and the node's commands
come from their own packages.
"""
