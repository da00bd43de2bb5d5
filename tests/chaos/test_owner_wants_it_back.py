"""A sample of what `tests.chaos.owner_wants_it_back` shows in full: the two words, on a tiny model."""

from __future__ import annotations

import pytest

from tests.chaos import owner_wants_it_back


@pytest.mark.timeout(240)
def test_an_owner_has_the_machine_back_within_seconds_and_no_client_sees_an_error(tmp_path):
    with owner_wants_it_back.show_of(tmp_path, tiny=True) as show:
        for word in ("finish", "pause"):
            shown = owner_wants_it_back.WORDS[word](show)
            assert shown.broken == [], shown.figures
