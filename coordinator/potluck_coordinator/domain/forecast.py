"""How much work a request will be, before anybody has read it: tokens of its prompt and of its answer.

Decides by what requests of the same model came to lately. The bounds hold whatever engines say: a prompt has no more tokens than bytes, an
answer no more than were asked for. It must not know bodies, engines or queues.
"""

from __future__ import annotations

from typing import Final, NamedTuple

BYTES_PER_TOKEN_GUESS: Final = 4.0
BYTES_PER_TOKEN_BOUNDS: Final = (1.0, 16.0)
ANSWER_TOKENS_GUESS: Final = 256.0
"""Of an answer by a model that has not answered yet."""
GAIN: Final = 0.1
"""Of the newest request in what is known of a model's."""
PROMPT_BYTES_MIN: Final = 64
"""Shorter prompts say more about the chat template."""


class Forecast(NamedTuple):
    """What is known of one model's requests."""

    bytes_per_token: float = BYTES_PER_TOKEN_GUESS
    answer_tokens: float = ANSWER_TOKENS_GUESS
    """Of one answer, where its client set no bound that it reached."""
    prompt_tokens: float = 256.0
    """Of one prompt."""


class Work(NamedTuple):
    """One request's, as it is expected."""

    prompt_tokens: float
    answer_tokens: float
    """Of all its answers together."""
    answer_tokens_high: float = 0.0
    """What nine of ten do not pass, of all its answers together; 0: nobody has looked."""

    @property
    def tokens(self) -> float:
        """What it takes of a cache when it is over."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def wanted_tokens(self) -> float:
        """What there has to be room for when it begins."""
        return self.prompt_tokens + max(self.answer_tokens, self.answer_tokens_high)


def learned(forecast: Forecast, prompt_bytes: int, prompt_tokens: int, answer_tokens: float) -> Forecast:
    """What is known after one more whole answer, by its engine's count.

    Args:
        forecast: what was known.
        prompt_bytes: of its request's text.
        prompt_tokens: as the engine counted.
        answer_tokens: of one of its answers.
    """
    bytes_per_token = forecast.bytes_per_token
    if prompt_tokens > 0 and prompt_bytes >= PROMPT_BYTES_MIN:
        least, most = BYTES_PER_TOKEN_BOUNDS
        bytes_per_token += GAIN * (min(max(prompt_bytes / prompt_tokens, least), most) - bytes_per_token)
    prompt = forecast.prompt_tokens + GAIN * (min(max(0, prompt_tokens), max(1, prompt_bytes)) - forecast.prompt_tokens)
    return Forecast(bytes_per_token, forecast.answer_tokens + GAIN * (max(0.0, answer_tokens) - forecast.answer_tokens), prompt)
