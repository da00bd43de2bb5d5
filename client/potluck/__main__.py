"""`python -m potluck`: the `potluck` command."""

from __future__ import annotations

from potluck.command import main

if __name__ == "__main__":
    main()
