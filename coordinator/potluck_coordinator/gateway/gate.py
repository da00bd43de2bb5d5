"""Who is let in before anything waits, and what became of the promise to those in the default tier.

Decides nothing of its own: which tier a request gets, and the promise, are `domain.tiers`, its key's day is `domain.quotas`, its account's
hour `rate_windows`. Accounts' hours are this process's: one that starts anew begins with none. The promise and the keys' days are in
the books, which are told every second; where there are several gateways, each is told as often what the others let in. It must not know
queues or nodes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from limits import RateLimitItem

from potluck_coordinator.domain import quotas as key_quotas
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fairness import weight_of
from potluck_coordinator.domain.gate_counts import NOTHING_UNDER_WAY, GateCounts, under_way, with_more
from potluck_coordinator.domain.pricing import most_tokens
from potluck_coordinator.domain.quotas import NO_USE, KeyDay, KeyUse
from potluck_coordinator.domain.tiers import NONE, RESERVE_PERCENT, Compliance, PromiseCount, PromiseRecord, choose, is_kept
from potluck_coordinator.gateway.engine_errors import INPUT_PARAM
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.gateway.rate_windows import RateWindows
from potluck_coordinator.rate_text import rate_limit
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.desks import KeyIdentity
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.forecast import Work
    from potluck_coordinator.domain.gate_counts import OthersCounts, UnderWay
    from potluck_coordinator.domain.quotas import Claim
    from potluck_coordinator.gateway.expectations import Expectations
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, KeyPrefix, ModelId, Usage

KEYS_MAX: Final = 10_000
"""With quotas, whose use is remembered; of those with nothing under way that goes first which asked longest ago."""
HOUR_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class TierLimits:
    """What the operator set for the tiers."""

    default_rate: RateLimitItem = rate_limit("100/hour")  # noqa: RUF009 - a value that nobody changes
    """Requests of one account in the default tier."""
    reserve_percent: int = RESERVE_PERCENT
    """Of a model's room, what flex leaves to the default tier."""
    first_token_seconds: float = 5.0
    """What the default tier promises."""
    is_shared: bool = False
    """Other gateways let requests in, too."""


def caller_of(identity: KeyIdentity) -> Caller:
    """Who asks, by whose key it is."""
    return Caller(identity.key_prefix, identity.quotas, weight_of(identity.earned_micro_credits))


TIER_LIMITS_DEFAULT: Final = TierLimits()


class Visit:
    """One request that was let in, until it is over.

    Args:
        gate: where it is counted.
        request: with its tier and its work.
        work: what it is expected to be.
        claim: what it may come to; the most of that is set aside of its key's day.
        counted_at: the moment by which it counts against its account's hour; None: it does not.
    """

    def __init__(self, gate: Gate, request: InferenceRequest, work: Work, claim: Claim, counted_at: float | None) -> None:
        self._gate = gate
        self._work = work
        self._claim = claim
        self._counted_at = counted_at
        self._marked = NO_USE
        """What of it is counted already."""
        self._over = False
        self.request = request

    def mark(self, token_count: int, charge_micro_credits: int) -> None:
        """So much has come of it, and it runs on: its key's day has that, should this gateway die before its end."""
        before, now = self._marked, KeyDay(0, float(token_count), charge_micro_credits)
        if self._over or now == before:
            return
        self._marked = now
        self._gate.use(self.request, lambda use: key_quotas.marked(use, self._claim, before, now))

    def end(
        self,
        usage: Usage | None,
        relayed_token_count: int,
        charge_micro_credits: int,
        first_token_seconds: float | None,
        *,
        waited_seconds: float,
    ) -> None:
        """It was answered, in whole or in part, or its client went. Again is harmless.

        Args:
            usage: as its engines counted; None: they did not say, as where the client hung up.
            relayed_token_count: of its answer, as far as it went by.
            charge_micro_credits: for all of it.
            first_token_seconds: from its coming; None: there was none.
            waited_seconds: from its coming until now.
        """
        if self._over:
            return
        self._over = True
        if usage is not None:
            tokens = float(usage.prompt_token_count + usage.completion_token_count)
        else:
            # Whoever hangs up in the middle has had the prompt read, and what was relayed.
            tokens = relayed_token_count + (self._work.prompt_tokens if first_token_seconds is not None else 0.0)
        set_aside, marked = key_quotas.set_aside(self._claim, self._marked), self._marked
        more_tokens, more_micro_credits = tokens - marked.token_count, charge_micro_credits - marked.spend_micro_credits
        self._gate.use(self.request, lambda use: key_quotas.ended(use, *set_aside, more_tokens, more_micro_credits))
        # Whoever goes before his time was up says nothing of the promise.
        if first_token_seconds is not None or waited_seconds > self._gate.limits.first_token_seconds:
            self._gate.judge(self.request, first_token_seconds)

    def take_back(self) -> None:
        """It was no request: it does not count against hour and day."""
        if self._over:
            return
        self._over = True
        if self._counted_at is not None:
            self._gate.windows.take_back(self.request.account_id, self._counted_at)
            self._gate.tell_requests(self.request.account_id, -1)
        set_aside = key_quotas.set_aside(self._claim, self._marked)
        self._gate.use(self.request, lambda use: key_quotas.taken_back(use, *set_aside))

    def refuse(self, error: PotluckError) -> None:
        """It got no answer, by no fault of its own or by its own: only the promise is told of it."""
        if self._over:
            return
        self.take_back()
        if error.spec.http_status >= 500 or error.code is ErrorCode.QUEUE_FULL:
            self._gate.judge_refusal(self.request)


class Gate:
    """The gate of one gateway.

    Args:
        limits: the operator's.
        flex_models: those that are deployed in the flex tier.
        expectations: what requests are expected to be.
        clock: for windows and days.
    """

    def __init__(self, limits: TierLimits, flex_models: Callable[[], frozenset[ModelId]], expectations: Expectations, clock: Clock) -> None:
        self.limits = limits
        self._flex_models = flex_models
        self._expectations = expectations
        self._clock = clock
        self.windows = RateWindows(limits.default_rate, clock.monotonic_seconds)
        self._refusals = RateWindows(limits.default_rate, clock.monotonic_seconds)
        """Those that count as promises which were not kept: of an account no more than it may ask for."""
        self._uses: OrderedDict[KeyPrefix, KeyUse] = OrderedDict()
        self._record = PromiseRecord()
        self._untold_hours: dict[int, PromiseCount] = {}
        self._untold_days: dict[tuple[KeyPrefix, int], KeyDay] = {}
        self._untold_requests: dict[AccountId, int] = {}
        self._untold_under_way: dict[KeyPrefix, UnderWay] = {}
        self._elsewhere: dict[KeyPrefix, UnderWay] = {}
        """What keys have under way at other gateways."""
        self._others_version = 0

    def enter(self, request: InferenceRequest, entry: CatalogueEntry) -> Visit:
        """Lets a request in, with its tier and its work.

        Raises:
            PotluckError: RATE_LIMITED, QUOTA_EXCEEDED, or INVALID_REQUEST for a tier that the model is not offered in, and for what its key
                may not use on any day.
        """
        choice = choose(request.asked_tier, self._offered(request.model_id), allowance_left=self.windows.has_room(request.account_id))
        if choice.tier is None:
            raise self._no_tier(request)
        work = self._expectations.work(request)
        claim = _claim_of(request, entry, work)
        self._check_quotas(request, claim)
        counted_at = None
        if choice.counts:
            counted_at = self.windows.count(request.account_id)
            self.tell_requests(request.account_id, 1)
        self.use(request, lambda use: key_quotas.begun(use, claim.tokens_max, claim.micro_credits_max))
        return Visit(self, request.let_in(choice.tier, work), work, claim, counted_at)

    def use(self, request: InferenceRequest, change: Callable[[KeyUse], KeyUse]) -> None:
        """Counts for the request's key, if that has bounds."""
        if not request.caller.quotas.any:
            return
        key_prefix = request.caller.key_prefix
        before = key_quotas.today(self._uses.pop(key_prefix, KeyUse()), self._clock.unix_ms())
        after = self._uses[key_prefix] = change(before)
        self._tell_day((key_prefix, after.day), key_quotas.more_used(before, after))
        if self.limits.is_shared:
            self._untold_under_way[key_prefix] = under_way(after)
        if len(self._uses) > KEYS_MAX:
            idle = next((key for key, use in self._uses.items() if not use.running_count), None)
            if idle is not None:
                del self._uses[idle]

    def judge(self, request: InferenceRequest, first_token_seconds: float | None) -> None:
        """Counts what became of the promise; to a flex request there was none."""
        if request.tier is not ServiceTier.DEFAULT:
            return
        count = PromiseCount(1, int(is_kept(first_token_seconds, self.limits.first_token_seconds)))
        now_ms = self._clock.unix_ms()
        self._record.add(now_ms / 1000, count)
        self._tell_hour(now_ms // HOUR_MS, count)

    def judge_refusal(self, request: InferenceRequest) -> None:
        """The same, where there was no room. Whoever asks again and again is refused again and again, and was promised no more."""
        if request.tier is ServiceTier.DEFAULT and self._refusals.has_room(request.account_id):
            self._refusals.count(request.account_id)
            self.judge(request, None)

    def remember(self, counts: GateCounts) -> None:
        """What the books have of earlier hours, and of today."""
        for hour in sorted(counts.promise_hours):
            self._record.add_hour(hour, counts.promise_hours[hour])
        for (key_prefix, day), used in counts.key_days.items():
            self._uses[key_prefix] = key_quotas.remembered(day, used)

    def take_untold(self) -> GateCounts:
        """What the books do not have yet; told once."""
        untold = GateCounts(self._untold_hours, self._untold_days, self._untold_requests, self._untold_under_way)
        self._untold_hours, self._untold_days, self._untold_requests, self._untold_under_way = {}, {}, {}, {}
        return untold

    @property
    def others_version(self) -> int:
        """Of what was heard of other gateways."""
        return self._others_version

    def learn(self, others: OthersCounts) -> None:
        """What other gateways counted. Days are the books' sums: what of this one's the books do not have yet is added."""
        self._others_version = others.version
        today = self._clock.unix_ms() // key_quotas.DAY_MS
        for (key_prefix, day), total in others.key_days.items():
            if day == today and (key_prefix in self._uses or len(self._uses) < KEYS_MAX):
                known = key_quotas.today(self._uses.get(key_prefix, KeyUse()), self._clock.unix_ms())
                self._uses[key_prefix] = key_quotas.with_total(known, total + self._untold_days.get((key_prefix, day), NO_USE))
        for account_id, count in others.account_requests.items():
            self.windows.count_elsewhere(account_id, count)
        self._elsewhere |= others.under_way
        self._elsewhere = {key: elsewhere for key, elsewhere in self._elsewhere.items() if elsewhere != NOTHING_UNDER_WAY}

    def tell_requests(self, account_id: AccountId, count: int) -> None:
        """So many more of an account's were let in, or fewer."""
        if self.limits.is_shared:
            self._untold_requests[account_id] = self._untold_requests.get(account_id, 0) + count

    def put_back(self, untold: GateCounts) -> None:
        """The books could not be told."""
        for hour, count in untold.promise_hours.items():
            self._tell_hour(hour, count)
        for key_day, used in untold.key_days.items():
            self._tell_day(key_day, used)
        for account_id, request_count in untold.account_requests.items():
            self.tell_requests(account_id, request_count)
        self._untold_under_way = {**untold.under_way, **self._untold_under_way}

    def _tell_hour(self, hour: int, count: PromiseCount) -> None:
        self._untold_hours[hour] = self._untold_hours.get(hour, NONE) + count

    def _tell_day(self, key_day: tuple[KeyPrefix, int], more: KeyDay) -> None:
        if more != NO_USE:
            self._untold_days[key_day] = self._untold_days.get(key_day, NO_USE) + more

    def compliance(self) -> Compliance:
        """How the promise was kept."""
        return self._record.compliance(self._clock.unix_ms() / 1000)

    def _check_quotas(self, request: InferenceRequest, claim: Claim) -> None:
        caller, now_ms = request.caller, self._clock.unix_ms()
        use = key_quotas.today(self._uses.get(caller.key_prefix, KeyUse()), now_ms)
        elsewhere = self._elsewhere.get(caller.key_prefix, NOTHING_UNDER_WAY)
        refusal = key_quotas.refusal(caller.quotas, with_more(use, elsewhere), claim, now_ms)
        if refusal is None:
            return
        if refusal.retry_after_seconds is None:
            # Not QUOTA_EXCEEDED: clients would ask the same again, now or tomorrow.
            param = INPUT_PARAM[request.endpoint] if request.endpoint is Endpoint.EMBEDDINGS else "max_tokens"
            raise PotluckError(ErrorCode.INVALID_REQUEST, refusal.words, param=param)
        raise PotluckError(ErrorCode.QUOTA_EXCEEDED, refusal.words, retry_after_seconds=refusal.retry_after_seconds)

    def _offered(self, model_id: ModelId) -> ServiceTier:
        return ServiceTier.FLEX if model_id in self._flex_models() else ServiceTier.DEFAULT

    def _no_tier(self, request: InferenceRequest) -> PotluckError:
        if self._offered(request.model_id) is ServiceTier.FLEX:
            words = f"The model {request.model_id!r} is served in the flex tier only: ask with service_tier auto or flex."
            return PotluckError(ErrorCode.INVALID_REQUEST, words, param="service_tier")
        allowance = self.windows.allowance(request.account_id)
        words = (
            f"The default tier gives an account {self.windows.words}, and this one has had them; there is room for one more in"
            f" {allowance.reset_seconds:.0f} s. With service_tier flex, or without the field, requests are answered meanwhile."
        )
        return PotluckError(ErrorCode.RATE_LIMITED, words, retry_after_seconds=allowance.reset_seconds)


def _claim_of(request: InferenceRequest, entry: CatalogueEntry, work: Work) -> Claim:
    asked = request.completion_tokens_max
    most = most_tokens(entry, request.prompt_bytes, asked, request.answer_count, request.prompt_count)
    return key_quotas.claim(entry, most, work.prompt_tokens, work.answer_tokens if asked is None else None)
