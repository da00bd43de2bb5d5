"""A sample of what `tests.chaos.link_faults` shows in full, with a script for a model."""

from __future__ import annotations

import random

import pytest

from tests.chaos import link_faults
from tests.support.pool_processes import audit

CUTS = ("within", "within", "after", "after")


@pytest.mark.timeout(600)
def test_a_link_that_is_cut_loses_and_doubles_nothing_within_its_grace_and_after_it(tmp_path):
    draw = random.Random(4)
    with link_faults.cut_pool(tmp_path, link_faults.scripted_entry) as cut:
        whole, prompt_tokens = link_faults.undisturbed(cut)
        for kind in CUTS:
            assert link_faults.outage(cut, kind, draw, whole, prompt_tokens).breaches == ()
        assert audit(cut.pool) == ()
