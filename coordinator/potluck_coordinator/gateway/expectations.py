"""What requests of each model, and of the accounts that ask for it, are expected to come to.

Decides how many accounts are remembered; what is expected of them is `domain.expectation` and `domain.forecast`. It must not know queues,
nodes or money.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain import forecast as forecasts
from potluck_coordinator.domain.expectation import AnswerExpectation, Lengths, expected, expected_of, guessed, learned, teaches, work_of
from potluck_coordinator.domain.forecast import Forecast, Work

if TYPE_CHECKING:
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.values import AccountId, ModelId, Usage

ACCOUNTS_REMEMBERED_MAX: Final = 256
"""Of one model, those that were answered last: about a kilobyte and a half each."""


@dataclass(slots=True)
class _Model:
    everybody: Lengths = field(default_factory=guessed)
    accounts: dict[AccountId, Lengths] = field(default_factory=dict)
    """Who was answered longest ago comes first."""
    forecast: Forecast = Forecast()  # noqa: RUF009 - a frozen value


class Expectations:
    """The expectations of one gateway."""

    def __init__(self) -> None:
        self._models: dict[ModelId, _Model] = {}

    def usual(self, model_id: ModelId) -> Forecast:
        """What requests of the model usually are."""
        return self._models[model_id].forecast if model_id in self._models else Forecast()

    def work(self, request: InferenceRequest) -> Work:
        """What the request will be, as far as one knows; the same again once that is written in it."""
        if request.work is not None:
            return request.work
        model = self._models.get(request.model_id) or _Model()
        return work_of(
            model.forecast,
            model.accounts.get(request.account_id),
            model.everybody,
            prompt_bytes=request.prompt_bytes,
            tokens_min=request.prompt_tokens_min,
            tokens_max=request.completion_tokens_max,
            answer_count=request.answer_count,
        )

    def learn(self, request: InferenceRequest, usage: Usage, completion_tokens_max: int) -> None:
        """One more whole answer, by its engine's count; of that no more is believed than can be true."""
        model = self._models.get(request.model_id)
        if model is None:
            model = self._models[request.model_id] = _Model()
        tokens = min(max(0, usage.completion_token_count), completion_tokens_max) / max(1, request.answer_count)
        own = model.accounts.pop(request.account_id, Lengths())
        own_expected, everybodys = expected_of(own, model.everybody, None), expected(model.everybody, None)
        if teaches(tokens, request.completion_tokens_max, own_expected):
            own = learned(own, tokens)
        if teaches(tokens, request.completion_tokens_max, everybodys):
            model.everybody = learned(model.everybody, tokens)
        model.accounts[request.account_id] = own
        while len(model.accounts) > ACCOUNTS_REMEMBERED_MAX:
            del model.accounts[next(iter(model.accounts))]
        usual = model.forecast.answer_tokens
        taught = tokens if teaches(tokens, request.completion_tokens_max, AnswerExpectation(usual, usual)) else usual
        model.forecast = forecasts.learned(model.forecast, request.prompt_bytes, usage.prompt_token_count, taught)
