"""A modelled node: its engine, cards, line and agent, as far as the coordinator can tell the difference.

Decides what a node sends and when, alive, frozen, cut off or dead, and that it keeps to its lease by its own clock. What the agent does
about heat is the live policy, which comes in from outside. It must not know policies of the pool, clients or money.
"""

from __future__ import annotations

import math
from random import Random
from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.card_model import CardPolicy, Cards
from potluck_coordinator.simulation.engine_model import Engine, Happening
from potluck_coordinator.simulation.lease_record import LeaseRecord
from potluck_coordinator.simulation.link_model import Coordinator, Frame, NodeAttempt, Work
from potluck_coordinator.simulation.node_counts import NodeCounts
from potluck_coordinator.simulation.own_lease import TICK_SECONDS, OwnLease
from potluck_coordinator.simulation.scenario import NodeClass
from potluck_coordinator.simulation.uplink import Uplink
from potluck_protocol.values import NodeId

GARBLED_FLUSH_SECONDS: Final = 0.25
"""How often a node sends what it has while its frames are garbled; else a frame is modelled only where it changes something."""
FROZEN_READ_SECONDS: Final = 0.5
"""What is sent to a frozen node waits in its socket; looked at again after so long."""
RECONNECT_SECONDS: Final = (0.5, 5.0)
"""Back-off of an agent that dials, by its own clock."""


class Node:
    """One node. Whoever makes it gives it its coordinator, and the world's record of leases, before it connects."""

    coordinator: Coordinator
    record: LeaseRecord

    def __init__(
        self, node_id: NodeId, node_class: NodeClass, agenda: Agenda, random: Random, card_policy: CardPolicy | None, limits: LivenessLimits
    ) -> None:
        self.node_id = node_id
        self.node_class = node_class
        self.round_trip_seconds = node_class.line.round_trip_ms / 1000 * math.exp(random.gauss(0.0, node_class.line.spread))
        self.lease = OwnLease(limits, self.round_trip_seconds)
        self.epoch = 0
        self.here = False
        """Its owner has it running; what a dead process comes back to."""
        self.linked = False
        self.frozen = False
        self.silent_since: float | None = None
        self.engine: Engine | None = None
        self.attempts: dict[int, NodeAttempt] = {}
        self.cards = Cards(node_class.heat, node_class.slot_count, card_policy, power_is_set=node_class.power_is_set)
        self.counts = NodeCounts()
        self.death_count = 0
        self._agenda = agenda
        self._random = random
        self._life = 0
        self.link_number = 0
        """Of the link that stands now; another number means that it broke in between."""
        self._version = 0
        self._busy_seconds_seen = 0.0
        self._slow_share = 1.0
        self._uplink = Uplink(agenda, random)
        self._told_second = -1
        self._told_kv_tokens = 0.0
        self._newest_kv_tokens = 0.0

    # What its owner and the world do to it.

    def come(self) -> None:
        """It is started, and connects when its engine is ready."""
        self.count()
        self.here = True
        self._life += 1
        self._start_engine(self._life)

    def leave(self, *, goodbye: bool) -> None:
        """Its owner stops it, or just switches the machine off."""
        self.count()
        self.here = False
        self._life += 1
        if self.engine is not None:
            self._stop_process(goodbye=goodbye)

    def die(self) -> None:
        """Its processes are killed, and start again by themselves."""
        if self.engine is None:
            return
        self.death_count += 1
        self._stop_process()
        self._agenda.after(self.lease.seconds(self.node_class.engine.restart_seconds), self._start_engine, self._life)

    def freeze(self, seconds: float, *, with_engine: bool) -> None:
        """Its agent, or the whole machine, stands still for so long, and its link stays open.

        An engine that goes on makes tokens that its agent sends when it thaws, whoever has gone on with them meanwhile.
        """
        if self.engine is None or self.frozen:
            return
        self.stream_out()
        self._fall_silent()
        self.frozen = True
        self.silent_since = self._agenda.now
        if with_engine:
            self.engine.stop_or_go(self._agenda.now, stopped=True)
            self._reschedule()
        self.coordinator.fell_silent(self)
        self._agenda.after(seconds, self._thaw, self._life)

    def cut(self, seconds: float) -> None:
        """Its link breaks for so long; what was on its way is lost."""
        if not self.linked:
            return
        self.stream_out()
        self._break_link()
        self._agenda.after(seconds, self._heal, self._life, self.link_number)

    def be_slow(self, share: float, seconds: float) -> None:
        """It has this share of its speed for so long: another program, a bad fan, a narrow slot."""
        self._set_slow(share)
        self._agenda.after(seconds, self._set_slow, 1.0)

    def garble(self, seconds: float) -> None:
        """Its frames come twice, or late and in the wrong order, for so long."""
        if not self._uplink.is_garbled:
            self._uplink.garble(seconds)
            self._flush_garbled()

    # What the coordinator does to it.

    def start(self, work: Work, link: int) -> None:
        """An attempt arrives by that link."""
        if link != self.link_number or not self.linked or self.engine is None:
            return
        if self.frozen:
            self._agenda.after(FROZEN_READ_SECONDS, self.start, work, link)
            return
        attempt = NodeAttempt(work)
        if not self.engine.submit(attempt.sequence, self._agenda.now):
            self._uplink.send(self, Frame(work.attempt_id, self.epoch, 0, work.first_token_index, 0, ends=True, refused=True))
            return
        self.attempts[work.attempt_id] = attempt
        self.lease.be_busy(self._agenda.now, busy=True)
        self._reschedule()

    def be_told_to_cancel(self, attempt_id: int, link: int) -> None:
        """The coordinator's word arrives by that link; a frozen node reads it when it thaws, after it has sent what it has."""
        if self.frozen:
            self._agenda.after(FROZEN_READ_SECONDS, self.be_told_to_cancel, attempt_id, link)
        elif link == self.link_number:
            self.cancel(attempt_id)

    def cancel(self, attempt_id: int) -> None:
        """No more of it is wanted."""
        attempt = self.attempts.pop(attempt_id, None)
        if attempt is not None and self.engine is not None:
            attempt.over = True
            self.engine.cancel(attempt.sequence, self._agenda.now)
            self.lease.be_busy(self._agenda.now, busy=bool(self.attempts))
            self._reschedule()

    def welcome(self, epoch: int, resume_points: dict[int, int]) -> None:
        """The coordinator's answer to a hello: what is not named there it does not want any more; of the rest it names what comes next."""
        self.epoch = epoch
        self.lease.welcomed(self._agenda.now)
        self.record.granted(self.node_id, epoch)
        for attempt_id in [attempt_id for attempt_id in self.attempts if attempt_id not in resume_points]:
            self.cancel(attempt_id)
        for attempt_id, sequence in resume_points.items():
            attempt = self.attempts.get(attempt_id)
            if attempt is None:
                self._uplink.send(self, Frame(attempt_id, epoch, sequence, 0, 0, ends=True, died=True))
            else:
                for frame in attempt.chunks[sequence:]:
                    self._uplink.send(self, frame)

    def stream_out(self) -> None:
        """Has the coordinator know what of every answer would have reached it by now: a frame a token, which nobody modelled."""
        if self.linked and not self.frozen and self.engine is not None:
            for attempt in tuple(self.attempts.values()):
                if (frame := self._frame(attempt, self._agenda.now - self._uplink.delay_seconds(self))) is not None:
                    self.coordinator.receive(self, frame)

    def look_at_cards(self, seconds: float) -> None:
        """So much time has passed since the last look."""
        engine, cards = self.engine, self.cards
        busy_share = 0.0
        if engine is not None:
            busy_seconds = engine.busy_seconds_at(self._agenda.now)
            busy_share = min(1.0, max(0.0, busy_seconds - self._busy_seconds_seen) / seconds)
            self._busy_seconds_seen = busy_seconds
        if busy_share == 0.0 and cards.is_settled():
            return
        orders = cards.orders
        reading = engine is not None and engine.is_reading
        changed = cards.look(seconds, busy_share, self._agenda.now, reading=reading, agent_looks=engine is not None and not self.frozen)
        if cards.orders != orders and self.linked:
            self.coordinator.orders_changed(self)
        if changed:
            self._set_speed()

    # Inside.

    def _start_engine(self, life: int) -> None:
        if life != self._life or not self.here:
            return
        self.count()
        self.engine = Engine(self.node_class.engine, self._agenda.now, self.node_class.context_tokens)
        self._busy_seconds_seen = 0.0
        self._set_speed()
        self._dial(life)

    def _stop_process(self, *, goodbye: bool = False) -> None:
        self.stream_out()
        self._life += 1
        self._version += 1
        self.frozen = False
        self.silent_since = None
        self.attempts.clear()
        self.lease.be_busy(self._agenda.now, busy=False)
        self._uplink.held.clear()
        self.count()
        self.engine = None
        self._break_link(goodbye=goodbye)

    def count(self) -> None:
        """Adds up what has been since the last count."""
        self.counts.add(self.engine, self._agenda.now, here=self.here)

    def _break_link(self, *, goodbye: bool = False) -> None:
        was_linked = self.linked
        self._unlink()
        if was_linked:
            self.coordinator.link_broke(self, goodbye=goodbye)

    def _unlink(self) -> None:
        """The lease runs on by the node's own clock, which nobody sets right."""
        self.link_number += 1
        self.linked = False
        self._fall_silent()
        self._agenda.at(self.lease.ends_at, self._lease_ended, self._life, self.link_number)

    def _fall_silent(self) -> None:
        heard_at = self.lease.fall_silent(self._agenda.now)
        self.record.silent(self.node_id, heard_at, self._is_at_work)

    def _is_at_work(self) -> bool:
        """It has work in hand, and could look at its clock."""
        return bool(self.attempts) and not self.frozen

    def lose_coordinator(self, seconds: float) -> None:
        """The coordinator's end of the link is gone, and answers again after so long."""
        self._unlink()
        pause_seconds = self.lease.seconds(self._random.uniform(*RECONNECT_SECONDS))
        self._agenda.after(seconds + pause_seconds, self._heal, self._life, self.link_number)

    def _heal(self, life: int, link: int) -> None:
        if life == self._life and link == self.link_number and not self.linked and self.engine is not None:
            self._dial(life)

    def _dial(self, life: int) -> None:
        """One round trip for the handshake, roughly."""
        self._agenda.after(self.round_trip_seconds, self._connected, life, self.link_number)

    def _connected(self, life: int, link: int) -> None:
        if life != self._life or link != self.link_number or self.linked:
            return
        if self.frozen:
            self._agenda.after(1.0, self._connected, life, link)
            return
        self.linked = True
        self.coordinator.hello(self)

    def turned_away(self) -> None:
        """Its session is over, and it hears so: it dials again."""
        self._unlink()
        self._dial(self._life)

    def _lease_ended(self, life: int, link: int) -> None:
        """By its own clock nobody has renewed its lease since the link broke. Whoever is frozen looks when it thaws."""
        if life == self._life and link == self.link_number and not self.linked and not self.frozen:
            self._fence()

    def _fence(self) -> None:
        """Nothing of its lease goes on, and a link that stands is made anew."""
        for attempt_id in tuple(self.attempts):
            self.cancel(attempt_id)
        if self.linked:
            self._break_link()
            self._dial(self._life)

    def _thaw(self, life: int) -> None:
        if life != self._life or self.engine is None:
            return
        self.frozen = False
        self.silent_since = None
        self.engine.stop_or_go(self._agenda.now, stopped=False)
        self._reschedule()
        # It does not know that it was away: the first thing it does is to send what it has.
        held, self._uplink.held = self._uplink.held, []
        for frame in held:
            self._uplink.send(self, frame)
        for attempt in tuple(self.attempts.values()):
            if (made := self._frame(attempt, self._agenda.now)) is not None:
                self._uplink.send(self, made)
        self.record.awake(self.node_id, self._is_at_work)
        self._agenda.after(self.lease.seconds(TICK_SECONDS), self._tick, life)

    def _tick(self, life: int) -> None:
        """Its first look at its clock after it stood still."""
        if life != self._life or self.frozen:
            return
        if self._agenda.now >= self.lease.ends_at:
            self._fence()
        elif self.linked and self.lease.is_silent:
            self.lease.resumed(self._agenda.now)
            self._agenda.after(self.round_trip_seconds / 2, self._beat, self.link_number)

    def _beat(self, link: int) -> None:
        if link == self.link_number and self.linked:
            self.coordinator.heartbeat(self)
            if self.linked:
                self.record.renewed(self.node_id, self.epoch)

    def _set_slow(self, share: float) -> None:
        self._slow_share = share
        self._set_speed()

    def _set_speed(self) -> None:
        if self.engine is not None:
            prefill, decode = self.cards.speed_shares
            self.engine.set_speed(prefill * self._slow_share, decode * self._slow_share, self._agenda.now)
            self._reschedule()

    def told_kv_tokens(self) -> float:
        """What of its cache is in use, by its last heartbeat: one a second, of which none is an event."""
        return self._newest_kv_tokens if int(self._agenda.now) > self._told_second else self._told_kv_tokens

    def _reschedule(self) -> None:
        assert self.engine is not None
        if int(self._agenda.now) != self._told_second:
            self._told_second = int(self._agenda.now)
            self._told_kv_tokens = self._newest_kv_tokens
        self._newest_kv_tokens = self.engine.kv_tokens
        self._version += 1
        due = self.engine.due_seconds()
        if due != math.inf:
            self._agenda.after(due, self._engine_due, self._version)

    def _engine_due(self, version: int) -> None:
        if version != self._version or self.engine is None:
            return
        for happening, sequence in self.engine.proceed(self._agenda.now):
            if happening is Happening.DIED or sequence is None:
                self.die()
                return
            attempt = sequence.owner
            assert isinstance(attempt, NodeAttempt)
            frame = self._frame(attempt, self._agenda.now, ends=happening is Happening.FINISHED)
            if frame is not None:
                self._uplink.send(self, frame)
        self._reschedule()

    def _frame(self, attempt: NodeAttempt, at: float, *, ends: bool = False) -> Frame | None:
        """What of an answer has not been sent."""
        assert self.engine is not None
        made = self.engine.produced(attempt.sequence, at)
        count = max(0, made - attempt.sent)
        if (count == 0 and not ends) or attempt.over:
            return None
        work = attempt.work
        frame = Frame(
            work.attempt_id,
            self.epoch,
            len(attempt.chunks),
            work.first_token_index + attempt.sent,
            count,
            ends,
            attempt.sequence.hit_tokens,
        )
        attempt.chunks.append(frame)
        attempt.sent += count
        attempt.over = ends
        return frame

    def forget(self, attempt_id: int) -> None:
        """The coordinator has all of it."""
        self.attempts.pop(attempt_id, None)
        self.lease.be_busy(self._agenda.now, busy=bool(self.attempts))

    def _flush_garbled(self) -> None:
        if self._uplink.is_garbled and self.engine is not None and not self.frozen:
            for attempt in tuple(self.attempts.values()):
                if (frame := self._frame(attempt, self._agenda.now)) is not None:
                    self._uplink.send(self, frame)
            self._agenda.after(self.lease.seconds(GARBLED_FLUSH_SECONDS), self._flush_garbled)
