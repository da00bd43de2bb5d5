"""The node agent: joins a pool, runs engines on this machine, and answers through one outbound link."""
