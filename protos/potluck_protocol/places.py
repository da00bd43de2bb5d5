"""Names of folders that more than one role must know.

Decides where `potluck up` keeps its node, so that the owner's commands find it. It must not know what lies there.
"""

from __future__ import annotations

from typing import Final

STATE_FOLDER: Final = "potluck"
"""Below the user's folder for state, `$XDG_STATE_HOME`."""
LOCAL_POOL_FOLDER: Final = "up"
"""Of `potluck up`, below that."""
NODE_FOLDER: Final = "node"
"""A node's own, below either."""
