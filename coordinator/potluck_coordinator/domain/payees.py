"""Who earns what an attempt pays, and how much of it each of them gets.

Decides the shares of several owners whose nodes answered together, as the stages of a shard group do: by whole weights, with nothing lost
to rounding. It must not know where the weights come from, nor what is posted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Final

from potluck_protocol.values import AccountId

WEIGHT_SUM_MAX: Final = 10**15
"""Of one payment's weights: every one of them, and the sum, has to fit into the database's 64 bits."""


@dataclass(frozen=True, slots=True)
class PayeeShare:
    """One owner's part of a payment: its weight of all the weights."""

    account_id: AccountId
    weight: int

    def __post_init__(self) -> None:
        if not 1 <= self.weight <= WEIGHT_SUM_MAX:
            raise ValueError(f"a weight is from 1 to {WEIGHT_SUM_MAX}, not {self.weight}")


def merged(shares: Sequence[PayeeShare]) -> tuple[PayeeShare, ...]:
    """The same shares as they are always written: one for each owner, by account id, in lowest terms. So a single payee's weight is 1.

    Raises:
        ValueError: nobody is named, or the weights sum to more than `WEIGHT_SUM_MAX`.
    """
    if len(shares) == 1:
        # Almost every payment; kept cheap because a client waits for it.
        return tuple(shares) if shares[0].weight == 1 else (PayeeShare(shares[0].account_id, 1),)
    weights: Counter[AccountId] = Counter()
    for share in shares:
        weights[share.account_id] += share.weight
    if not 1 <= weights.total() <= WEIGHT_SUM_MAX:
        raise ValueError(f"a payment needs payees whose weights sum to {WEIGHT_SUM_MAX} at most, not to {weights.total()}")
    divisor = gcd(*weights.values())
    return tuple(PayeeShare(account_id, weights[account_id] // divisor) for account_id in sorted(weights))


def split(amount: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Divides an amount by weights: the parts sum to it, and each is less than 1 away from its exact proportion.

    The largest-remainder method (Hamilton's): everyone gets the whole part of the proportion, and what is left goes in ones to the largest
    remainders, of equal ones to the earlier.
    """
    if len(weights) == 1:
        return (amount,)
    total = sum(weights)
    wholes = [divmod(amount * weight, total) for weight in weights]
    left = amount - sum(whole for whole, _ in wholes)
    by_remainder = sorted(range(len(wholes)), key=lambda place: wholes[place][1], reverse=True)
    rounded_up = frozenset(by_remainder[:left])
    return tuple(whole + (place in rounded_up) for place, (whole, _) in enumerate(wholes))
