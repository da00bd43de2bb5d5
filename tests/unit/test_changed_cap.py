"""What is remembered of a card whose power cap was changed: no order of failures, kills and late programs leaves a cap behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.changed_cap import ChangedCap, is_ours, seen, with_try
from potluck_node.power_caps import FILE_NAME, CapRefusedError, PowerCaps
from potluck_node.probe.nvml import NvmlLibrary
from tests.support.nvml_dump import DumpedDriver, load_dump, set_cap

FOUND = 350_000
CAPPED = ChangedCap(FOUND, (280_000,))
STEPPING = ChangedCap(FOUND, (280_000, 230_000))


@pytest.mark.parametrize(
    ("changed", "now_milliwatts", "unended", "left"),
    [
        (None, 300_000, False, None),
        (CAPPED, 280_000, False, CAPPED),
        (CAPPED, 279_500, False, ChangedCap(FOUND, (279_500,))),
        (CAPPED, FOUND, False, None),
        (CAPPED, 300_000, False, None),
        (CAPPED, None, False, CAPPED),
        (CAPPED, FOUND, True, CAPPED),
        (CAPPED, 300_000, True, CAPPED),
        (STEPPING, 280_000, False, CAPPED),
        (STEPPING, 230_000, False, ChangedCap(FOUND, (230_000,))),
        (STEPPING, 280_000, True, STEPPING),
    ],
)
def test_a_card_is_its_owners_again_only_by_the_drivers_word(changed, now_milliwatts, unended, left):
    assert seen(changed, now_milliwatts, unended=unended) == left


def test_every_cap_that_was_tried_may_be_in_force():
    changed = with_try(with_try(with_try(None, FOUND, 280_000), 1, 230_000), 1, 280_000)
    assert changed == ChangedCap(FOUND, (230_000, 280_000))
    assert [is_ours(changed, milliwatts) for milliwatts in (280_400, 230_000, 250_000)] == [True, True, False]
    assert not is_ours(None, 280_000)


class StubbornCard:
    """Real caps over a driver from a dump, whose calls go wrong in every way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = DumpedDriver(load_dump("healthy_3090"))
        self.device = self.driver.devices[0]
        self.uuid: str = self.device["nvmlDeviceGetUUID"]
        self.in_force = FOUND
        self.caps = self.agent()

    def agent(self) -> PowerCaps:
        """Another one, as after a kill."""
        caps = PowerCaps(self.folder / FILE_NAME, StoppedClock(), NvmlLibrary(lambda: self.driver), program=self.folder / "none")
        caps._set_directly = self.set_directly
        return caps

    def set_directly(self, uuid: str, milliwatts: int) -> None:
        assert uuid == self.uuid
        self.way(milliwatts)

    def done(self, milliwatts: int) -> None:
        self.in_force = milliwatts
        if self.tells:
            set_cap(self.device, milliwatts)

    def refused(self, _milliwatts: int) -> None:
        raise CapRefusedError("no")

    def done_but_told_otherwise(self, milliwatts: int) -> None:
        self.done(milliwatts)
        raise CapRefusedError("too late")

    def killed_before(self, _milliwatts: int) -> None:
        raise KeyboardInterrupt

    def killed_after(self, milliwatts: int) -> None:
        self.done(milliwatts)
        raise KeyboardInterrupt

    @property
    def tells(self) -> bool:
        return isinstance(self.device["nvmlDeviceGetPowerManagementLimit"], int)

    @tells.setter
    def tells(self, tells: bool) -> None:
        self.device["nvmlDeviceGetPowerManagementLimit"] = self.in_force if tells else {"error": 999}

    def do(self, act: Callable[[], None], way: Callable[[int], None]) -> None:
        self.way = way
        try:
            act()
        except KeyboardInterrupt:
            self.caps = self.agent()


class StoppedClock:
    def monotonic_seconds(self) -> float:
        return 0.0

    def unix_ms(self) -> int:
        return 0


WAYS = ("done", "refused", "done_but_told_otherwise", "killed_before", "killed_after")


@given(
    st.lists(
        st.tuples(
            st.sampled_from((280_000, 230_000, 190_000, FOUND, None)), st.sampled_from(WAYS), st.booleans(), st.booleans(), st.booleans()
        ),
        max_size=8,
    )
)
def test_whatever_goes_wrong_the_card_has_what_its_owner_gave_it_once_the_driver_answers(steps):
    with tempfile.TemporaryDirectory() as folder:
        card = StubbornCard(Path(folder))
        card.caps.look([card.uuid])
        for milliwatts, way, tells, looks, starts_anew in steps:
            card.tells = tells
            act = (lambda: card.caps.restore(card.uuid)) if milliwatts is None else (lambda cap=milliwatts: card.caps.set(card.uuid, cap))
            card.do(act, getattr(card, way))
            if starts_anew:
                card.caps = card.agent()
            if looks:
                card.caps.look([card.uuid])
        card.tells = True
        card.do(card.caps.give_back, card.done)
        assert (card.in_force, card.caps.changed) == (FOUND, frozenset())


@given(st.lists(st.tuples(st.sampled_from((280_000, 230_000)), st.sampled_from(("done", "refused"))), max_size=4))
def test_what_somebody_else_sets_stays(steps):
    with tempfile.TemporaryDirectory() as folder:
        card = StubbornCard(Path(folder))
        card.caps.look([card.uuid])
        for milliwatts, way in steps:
            card.do(lambda cap=milliwatts: card.caps.set(card.uuid, cap), getattr(card, way))
        card.done(310_000)
        card.do(card.caps.give_back, card.done)
        assert (card.in_force, card.caps.changed) == (310_000, frozenset())
