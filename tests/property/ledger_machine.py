"""A state machine that drives the ledger's desk and a model of a few dictionaries side by side, and compares them after every step.

Several gateways open holds, under an epoch each, and die and come back one by one; a directory that starts anew may run fewer of them.

The model shares no code with the ledger. It says what each command must answer and what everybody must then own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy import text

from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.gateways import Gateways
from potluck_coordinator.directory.ledger import LedgerDesk
from potluck_coordinator.domain.ledger import MarkDelivered, OpenHold, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_protocol.values import AccountId
from tests.support.books import FEE_BASIS_POINTS, Books

PEOPLE = ("ann", "bob", "cat")
GRANT = 1_000
GATEWAYS = 3
OPERATIONS: Counter[str] = Counter()
"""Commands that went to the ledger, by outcome, over all runs of this process."""

amounts = st.integers(0, 400)
numbers = st.integers(0, GATEWAYS - 1)
people = st.sampled_from(PEOPLE)
everybody = st.sampled_from([*PEOPLE, "nobody"])


def payees_among(names):
    """Up to four (name, weight) pairs, half of the time one; a name may come twice."""
    share = st.tuples(names, st.integers(1, 6))
    return st.one_of(st.lists(share, min_size=1, max_size=1), st.lists(share, min_size=2, max_size=4))


payees = payees_among(people)


@dataclass
class ModelHold:
    opened_as: tuple
    payer: str
    proportions: dict[str, Fraction]
    amount: int
    expires: int
    epoch: int
    mark: int = 0
    paid: int | None = None


class Model:
    def __init__(self) -> None:
        self.spendable = dict.fromkeys(PEOPLE, GRANT)
        self.earned = dict.fromkeys(PEOPLE, 0)
        self.fees = 0
        self.holds: dict[str, ModelHold] = {}
        self.claims: dict[tuple[str, str], int] = {}
        self.epochs: dict[int, int] = {}
        """Of each gateway's number, the one that holds."""

    def held(self, person: str) -> int:
        return sum(hold.amount for hold in self.holds.values() if hold.payer == person and hold.paid is None)

    def answer(self, command) -> str:
        if isinstance(command, OpenHold):
            return self._open(command)
        hold = self.holds.get(command.hold_id)
        amount = command.amount_micro_credits
        if hold is None or amount > hold.amount:
            return "conflict"
        if isinstance(command, MarkDelivered):
            if hold.paid is None:
                hold.mark = max(hold.mark, amount)
            return "applied" if amount <= hold.mark else "conflict"
        if hold.paid is None:
            self.pay(hold, amount)
        return "applied" if hold.paid == amount else "conflict"

    def _open(self, command: OpenHold) -> str:
        proportions = proportions_of(command.payees)
        values = (command.payer, proportions, command.amount_micro_credits, command.expires_at_unix_ms, command.gateway_epoch)
        known = self.holds.get(command.hold_id)
        if known is not None:
            return "applied" if known.opened_as == values else "conflict"
        if not proportions.keys() <= set(PEOPLE) or command.gateway_epoch not in self.epochs.values():
            return "conflict"
        if command.payer not in PEOPLE or self.spendable[command.payer] - self.held(command.payer) < command.amount_micro_credits:
            return "insufficient_credits"
        self.holds[command.hold_id] = ModelHold(values, *values)
        return "applied"

    def pay(self, hold: ModelHold, amount: int) -> None:
        fee = amount * FEE_BASIS_POINTS // 10_000
        hold.paid = amount
        self.spendable[hold.payer] -= amount
        for person, part in parts_of(amount - fee, hold.proportions).items():
            self.earned[person] += part
        self.fees += fee

    def claim(self, person: str, claim_id: str) -> int:
        if (person, claim_id) not in self.claims:
            self.claims[person, claim_id] = self.earned[person]
            self.spendable[person] += self.earned[person]
            self.earned[person] = 0
        return self.claims[person, claim_id]


def proportions_of(shares) -> dict[str, Fraction]:
    total = sum(share.weight for share in shares)
    proportions: Counter[str] = Counter()
    for share in shares:
        proportions[share.account_id] += Fraction(share.weight, total)
    return dict(proportions)


def parts_of(amount: int, proportions: dict[str, Fraction]) -> dict[str, int]:
    """Everyone's whole part; then one more, again and again, to whoever is furthest below the exact one, of equals the first by name."""
    parts = {name: int(amount * proportion) for name, proportion in proportions.items()}
    while sum(parts.values()) < amount:
        poorest = min(sorted(parts), key=lambda name: parts[name] - amount * proportions[name])
        parts[poorest] += 1
    return parts


class LedgerMachine(RuleBasedStateMachine):
    """Opens, marks, settles, repeats, contradicts, expires, orphans and claims, one by one and in batches."""

    commands = Bundle("commands")
    fresh_database = staticmethod(nullcontext)
    """Gives the URL of an empty one."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.database = self.fresh_database()
        self.books = Books(self.database.__enter__() or "sqlite://")
        self.books.gateways_are()
        self.books.add_people(*PEOPLE, grant=GRANT)
        self.model = Model()
        self.hold_count = 0
        self.newest_epoch = 0
        self.directory_is_replaced(GATEWAYS)
        for number in range(GATEWAYS):
            self.gateway_is_replaced(number)

    def send(self, *commands) -> None:
        outcomes = self.books.apply_now(*commands)
        OPERATIONS.update(str(outcome) for outcome in outcomes)
        assert [str(outcome) for outcome in outcomes] == [self.model.answer(command) for command in commands]

    def new_hold(self, payer: str, payees: list[tuple[str, int]], amount: int, lifetime_ms: int, number: int = 0) -> OpenHold:
        """Of the gateway with that number; of a number that is not run any more, under an epoch that is nobody's."""
        self.hold_count += 1
        epoch = self.model.epochs.get(number, self.newest_epoch + 1)
        expires = self.books.clock.now_ms + lifetime_ms
        return OpenHold(f"h{self.hold_count}", AccountId(payer), shares_of(payees), amount, expires, epoch)

    @rule(target=commands, payer=people, payees=payees, amount=amounts, lifetime_ms=st.integers(0, 5_000), number=numbers)
    def open(self, payer, payees, amount, lifetime_ms, number):
        command = self.new_hold(payer, payees, amount, lifetime_ms, number)
        self.send(command)
        return command

    @rule(payer=everybody, payees=payees_among(everybody), amount=amounts)
    def open_for_strangers(self, payer, payees, amount):
        self.send(self.new_hold(payer, payees, amount, 1_000))

    @rule(target=commands, known=commands, amount=amounts)
    def mark(self, known, amount):
        command = MarkDelivered(known.hold_id, amount)
        self.send(command)
        return command

    @rule(target=commands, known=commands, amount=amounts)
    def settle(self, known, amount):
        command = SettleHold(known.hold_id, amount)
        self.send(command)
        return command

    @rule(payer=people, payees=payees, amount=amounts, back=st.integers(0, 2 * GATEWAYS))
    def an_earlier_epoch_speaks(self, payer, payees, amount, back):
        self.send(replace(self.new_hold(payer, payees, amount, 1_000), gateway_epoch=self.newest_epoch - back))

    @rule(known=commands)
    def repeat(self, known):
        self.send(known)

    @rule(known=commands, payer=people, amount=amounts)
    def contradict(self, known, payer, amount):
        self.send(OpenHold(known.hold_id, AccountId(payer), shares_of([("bob", 1)]), amount, self.books.clock.now_ms, self.newest_epoch))

    @rule(known=commands, payees=payees)
    def contradict_the_shares(self, known, payees):
        if isinstance(known, OpenHold):
            self.send(replace(known, payees=shares_of(payees)))

    @rule(target=commands, payer=people, payees=payees, batch=st.lists(st.tuples(amounts, amounts, amounts), min_size=2, max_size=5))
    def batch(self, payer, payees, batch):
        sent = []
        for amount, marked, settled in batch:
            hold = self.new_hold(payer, payees, amount, 2_000)
            sent += [hold, MarkDelivered(hold.hold_id, marked), SettleHold(hold.hold_id, settled)]
        self.send(*sent)
        return multiple(*sent[-3:])

    @rule(milliseconds=st.integers(1, 3_000))
    def time_passes(self, milliseconds):
        self.books.clock.now_ms += milliseconds
        now = self.books.clock.now_ms
        due = [hold for hold in self.model.holds.values() if hold.paid is None and hold.expires <= now]
        for hold in due:
            self.model.pay(hold, hold.mark)
        assert self.loop.run_until_complete(self.books.ledger.settle_expired(now)) == len(due)
        OPERATIONS["expired"] += 1

    @rule(number=numbers)
    def gateway_is_replaced(self, number):
        if number >= self.gateway_count:
            return
        epoch = self.loop.run_until_complete(self.gateways.register(number))
        assert epoch > self.newest_epoch
        self.newest_epoch = self.model.epochs[number] = epoch
        self.orphans_are_settled()

    def orphans_are_settled(self) -> None:
        """Those of epochs that are nobody's, at their marks; no others."""
        orphans = [hold for hold in self.model.holds.values() if hold.paid is None and hold.epoch not in self.model.epochs.values()]
        for hold in orphans:
            self.model.pay(hold, hold.mark)
        assert self.loop.run_until_complete(self.books.ledger.settle_orphans()) == len(orphans)
        OPERATIONS["orphaned"] += 1

    @rule(person=people, claim_id=st.sampled_from(["c1", "c2", "c3"]))
    def claim(self, person, claim_id):
        expected = self.model.claim(person, claim_id)
        assert self.loop.run_until_complete(self.books.ledger.claim_earnings(AccountId(person), claim_id)) == expected
        OPERATIONS["claimed"] += 1

    @rule(gateway_count=st.integers(1, GATEWAYS))
    def directory_is_replaced(self, gateway_count):
        self.gateway_count = gateway_count
        self.gateways = Gateways(self.books.store, SnapshotBoard(1), self.books.clock, gateway_count)
        self.loop.run_until_complete(self.gateways.load())
        self.model.epochs = {number: epoch for number, epoch in self.model.epochs.items() if number < gateway_count}
        assert self.gateways.epochs == set(self.model.epochs.values())
        self.orphans_are_settled()
        self.books.ledger = LedgerDesk(self.books.store, self.books.clock, fee_basis_points=FEE_BASIS_POINTS)
        assert self.books.audit_now().findings == ()

    @invariant()
    def everybody_owns_what_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        accounts = self.books.run_now(lambda work: _rows(work, "SELECT ledger_account_id, posted, held FROM ledger_account"))
        expected = {"issuer": (-GRANT * len(PEOPLE), 0), "fee": (self.model.fees, 0)}
        for person in PEOPLE:
            expected[f"user:{person}"] = (self.model.spendable[person], self.model.held(person))
            expected[f"node_owner:{person}"] = (self.model.earned[person], 0)
        assert {account: (posted, held) for account, posted, held in accounts} == expected
        assert sum(posted for posted, _ in expected.values()) == 0
        assert all(posted - held >= 0 for account, (posted, held) in expected.items() if account != "issuer")

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        try:
            assert self.books.audit_now().findings == ()
            self._rebuild_from_postings()
        finally:
            self.books.store.close()
            self.loop.close()
            self.database.__exit__(None, None, None)

    def _rebuild_from_postings(self) -> None:
        """Adds the postings up from nothing, without the ledger's own queries."""
        postings = self.books.run_now(lambda work: _rows(work, "SELECT transaction_id, ledger_account_id, amount FROM posting"))
        by_transaction: Counter[str] = Counter()
        by_account: Counter[str] = Counter()
        for transaction_id, account, amount in postings:
            by_transaction[transaction_id] += amount
            by_account[account] += amount
        assert set(by_transaction.values()) <= {0}
        assert [by_account[f"user:{person}"] for person in PEOPLE] == list(self.model.spendable.values())
        assert [by_account[f"node_owner:{person}"] for person in PEOPLE] == list(self.model.earned.values())
        paid = {f"settle:{hold_id}" for hold_id, hold in self.model.holds.items() if hold.paid}
        assert {transaction_id for transaction_id in by_transaction if transaction_id.startswith("settle:")} == paid


def shares_of(payees: list[tuple[str, int]]) -> tuple[PayeeShare, ...]:
    return tuple(PayeeShare(AccountId(name), weight) for name, weight in payees)


def _rows(work, query):
    return work.audit._connection.execute(text(query)).all()
