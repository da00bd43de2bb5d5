"""The operator's side of a pool: gateway, directory, storage."""
