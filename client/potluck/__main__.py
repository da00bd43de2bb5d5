"""`python -m potluck`: the `potluck` command."""

from __future__ import annotations

from potluck.command import main
from potluck.tether import tie_to_parent

if __name__ == "__main__":
    tie_to_parent()
    main()
