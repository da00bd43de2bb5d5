"""Model files on this machine: fetched from pinned sources, verified before every load, kept within a disk budget."""
