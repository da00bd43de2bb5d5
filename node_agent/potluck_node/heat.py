"""The heat of this node's cards: each look judged, and what follows from it carried out.

Decides what is asked of which card: power caps of cards that engines of this node were given, and slots of the replicas on them. Of servers
that the owner shares nobody knows the cards: their slots go by the hottest, and no card is capped for them. The node rests only where every
card is to. `domain.thermal` says what a card's heat asks for. It must not know how a card is read, a cap set, or an engine stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from potluck_node.control import CardLine
from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.domain.rest import Posture, Reason
from potluck_node.domain.thermal import CardLook, HeatLimits, ThermalState, is_silent, limit_celsius, next_state
from potluck_node.domain.thermal_ladder import PowerRange, ThermalRung, cap_at, slots_at
from potluck_node.power_caps import FILE_NAME, PROGRAM, PowerCaps
from potluck_node.readings import Readings
from potluck_node.replicas import Replicas
from potluck_node.settings import Settings
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.clock import Clock
from potluck_protocol.rest import RestCause
from potluck_protocol.values import ReplicaId

_log = structlog.get_logger()


def heat_of(settings: Settings, folder: Path, readings: Readings, replicas: Replicas, clock: Clock) -> Heat:
    """As the owner's settings have it.

    Args:
        settings: the owner's.
        folder: the node's state folder.
        readings: of the cards.
        replicas: who works on them.
        clock: time.
    """
    watts = settings.power_limit_watts
    limits = HeatLimits(settings.temperature_celsius_max, None if watts is None else watts * 1000)
    return Heat(readings=readings, replicas=replicas, caps=PowerCaps(folder / FILE_NAME, clock), limits=limits, clock=clock)


def _nobody_listens() -> None:
    return


class Heat:
    """Looks after the cards of one node.

    Args:
        readings: of the cards.
        replicas: who works on them.
        caps: of their power.
        limits: the owner's.
        clock: time.
    """

    def __init__(self, *, readings: Readings, replicas: Replicas, caps: PowerCaps, limits: HeatLimits, clock: Clock) -> None:
        self._readings = readings
        self._replicas = replicas
        self._caps = caps
        self._limits = limits
        self._clock = clock
        self.changed: Callable[[], None] = _nobody_listens
        """Called after a card went to another rung: the coordinator hears of it at once. The agent puts itself here."""
        self._states: dict[str, ThermalState] = {}
        self._news = asyncio.Event()
        self._setting: asyncio.Task[None] | None = None
        """Caps on their way: a thread is not cut off with the task that waits for it."""
        self._ending = False

    # What others ask.

    def slots(self, replica_id: ReplicaId, slot_count: int) -> int:
        """How many of a replica's slots are left to it; all of them where its cards are cool, or it works without."""
        return min((slots_at(self._rung(uuid), slot_count) for uuid in self._cards_of(replica_id)), default=slot_count)

    def cards(self) -> tuple[CardTelemetry, ...]:
        """The newest readings, and what was done about them."""
        return tuple(
            replace(card, thermal_rung=int(self._rung(card.uuid)), throttle_seconds=round(self._state(card.uuid).throttle_seconds, 1))
            for card in self._readings.cards
        )

    def lines(self) -> tuple[CardLine, ...]:
        """For the owner."""
        return tuple(
            CardLine(
                uuid=card.uuid,
                temperature_celsius=card.temperature_celsius,
                limit_celsius=limit_celsius(CardLook(throttle_point_celsius=card.throttle_point_celsius), self._limits),
                power_limit_milliwatts=card.power_limit_milliwatts,
                capped=card.uuid in self._caps.changed,
                rung=int(self._rung(card.uuid)),
                throttle_seconds=round(self._state(card.uuid).throttle_seconds, 1),
                lost=card.lost,
            )
            for card in self._readings.cards
        )

    def reasons(self) -> tuple[Reason, ...]:
        """Why the node is to rest for its heat: every card that it has is on the last rung. A lost one gives no heat."""
        live = [card.uuid for card in self._readings.cards if not card.lost]
        if not live or any(self._rung(uuid) < ThermalRung.PAUSE for uuid in live):
            return ()
        words = "lets its cards cool, which stayed too hot without work"
        if any(is_silent(self._state(uuid)) for uuid in live):
            words += ", and waits for the driver to tell their temperature again"
        return (Reason(RestCause.HEAT, Posture.HAND_OVER, words),)

    @property
    def cap_refusal(self) -> str:
        """Why no cap could be set when one was called for; empty where it could, or none was."""
        called_for = self._limits.power_limit_milliwatts is not None or any(self._rung(card.uuid) for card in self._readings.cards)
        if self._caps.refusal or not called_for or not self._readings.cards or self._caps.has_way:
            return self._caps.refusal
        return f"the agent is not root, and there is no {PROGRAM} for it"

    # What it does.

    async def run(self) -> None:
        """Works until cancelled; every card then gets back the cap that it had."""
        self._readings.on_read(self._news.set)
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                await self.look()
        finally:
            self._ending = True
            if self._setting is not None:
                await asyncio.wait({self._setting})
            await asyncio.to_thread(self._caps.give_back)

    async def look(self) -> None:
        """Judges the newest readings once, and sets the caps that follow.

        Of caps they are not believed: they were taken while our last one was on its way, or before it.
        """
        cards, wanted_milliwatts = self._readings.cards, dict[str, int]()
        in_force = await asyncio.to_thread(self._caps.look, [card.uuid for card in cards if not card.lost]) if cards else {}
        moved = False
        for card in cards:
            look = self._look_at(card, in_force.get(card.uuid))
            before, after = self._rung(card.uuid), next_state(self._state(card.uuid), look, self._limits, self._clock.monotonic_seconds())
            self._states[card.uuid] = after
            if after.rung is not before:
                moved = True
                _log.info("card_heat", card=card.uuid, celsius=card.temperature_celsius, rung=after.rung.name, before=before.name)
            if look.power is not None and card.uuid in self._replicas.cards_given():
                wanted_milliwatts[card.uuid] = cap_at(after.rung, look.power, self._limits.power_limit_milliwatts)
        if moved:
            self.changed()
        due = self._due(wanted_milliwatts, in_force)
        if due:
            self._setting = asyncio.create_task(asyncio.to_thread(self._set, due), name="caps")
            await asyncio.shield(self._setting)

    def _look_at(self, card: CardTelemetry, in_force_milliwatts: int | None) -> CardLook:
        given, power = card.uuid in self._replicas.cards_given(), self._power(card, in_force_milliwatts)
        slot_counts = [status.slot_count for status in self._replicas.statuses() if card.uuid in self._cards_of(status.replica_id)]
        return CardLook(
            temperature_celsius=card.temperature_celsius,
            throttle_point_celsius=card.throttle_point_celsius,
            throttle_reasons=card.throttle_reasons,
            lost=card.lost,
            power=power if given and not card.lost else None,
            # One that has not said how many yet has one at least.
            slot_count=max(slot_counts, default=1 if given else 0),
        )

    def _power(self, card: CardTelemetry, in_force_milliwatts: int | None) -> PowerRange | None:
        lowest, usual, highest = card.power_limit_min_milliwatts, card.power_limit_default_milliwatts, card.power_limit_max_milliwatts
        found_milliwatts = self._caps.found_milliwatts(card.uuid)
        if lowest is None or usual is None or highest is None or found_milliwatts is None:
            return None
        if not self._caps.may_set(card.uuid) and not self._caps.may_stand(card.uuid, in_force_milliwatts):
            return None
        return PowerRange(lowest, usual, highest, found_milliwatts)

    def _due(self, wanted_milliwatts: dict[str, int], in_force: dict[str, int]) -> dict[str, int | None]:
        """The caps to set: those that do not stand. None: as it was, of a card that has no engine of ours any more."""
        due: dict[str, int | None] = {
            uuid: milliwatts
            for uuid, milliwatts in wanted_milliwatts.items()
            if uuid in in_force and self._caps.is_due(uuid, milliwatts, in_force[uuid])
        }
        return due | dict.fromkeys(self._caps.changed & in_force.keys() - wanted_milliwatts.keys())

    def _set(self, due: dict[str, int | None]) -> None:
        for uuid, milliwatts in due.items():
            if self._ending or not self._caps.may_set(uuid):
                continue
            if milliwatts is None:
                self._caps.restore(uuid)
            else:
                self._caps.set(uuid, milliwatts)

    def _cards_of(self, replica_id: ReplicaId) -> tuple[str, ...]:
        residence = self._replicas.residence(replica_id)
        if residence is not None:
            return residence.card_uuids
        statuses = self._replicas.statuses()
        attached = any(status.replica_id == replica_id and status.engine_kind == ATTACHED_KIND for status in statuses)
        return tuple(card.uuid for card in self._readings.cards) if attached else ()

    def _state(self, uuid: str) -> ThermalState:
        return self._states.get(uuid, ThermalState())

    def _rung(self, uuid: str) -> ThermalRung:
        return self._state(uuid).rung
