"""Why a node rests, in a word that owners, operators and agents share.

Decides the words. It must not know who acts on them.
"""

from __future__ import annotations

from enum import StrEnum


class RestCause(StrEnum):
    """Why a node does not serve."""

    FIRST_RUN = "first_run"
    """It joined, and its owner has not said `resume` yet."""
    OWNER = "owner"
    HOURS = "hours"
    IN_USE = "in_use"
    OTHER_PROGRAM = "other_program"
    HEAT = "heat"
