"""The `openai` package against a whole pool with a real llama.cpp engine: answers, and the exception class of every mistake."""

from __future__ import annotations

import openai
import pytest

from tests.support.pool_processes import LLAMACPP_MODEL, running_pool

MESSAGES = [{"role": "user", "content": "Say something."}]
GREEDY = {"max_tokens": 8, "temperature": 0}
"""The model is made of random numbers: of eight tokens drawn from all of them none may be text."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with running_pool(tmp_path_factory.mktemp("openai"), with_llamacpp=True) as pool:
        yield pool


@pytest.fixture
def client(pool):
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key=pool.api_key, max_retries=0) as client:
        yield client


def test_models_are_listed_and_found(client):
    assert LLAMACPP_MODEL in {model.id for model in client.models.list()}
    assert client.models.retrieve(LLAMACPP_MODEL).id == LLAMACPP_MODEL


def test_an_answer_in_one_piece(client):
    answer = client.chat.completions.create(model=LLAMACPP_MODEL, messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 8
    assert answer.model == LLAMACPP_MODEL


@pytest.mark.parametrize("asked", [False, True])
def test_a_streamed_answer_has_the_usage_event_only_if_asked(client, asked):
    options = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(client.chat.completions.create(model=LLAMACPP_MODEL, messages=MESSAGES, stream=True, **GREEDY, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.usage is not None for chunk in chunks if not chunk.choices] == [True] * asked


def test_completions(client):
    assert client.completions.create(model=LLAMACPP_MODEL, prompt="Once", **GREEDY).choices[0].text


def test_a_wrong_key(pool):
    client = openai.OpenAI(base_url=f"{pool.url}/v1", api_key="sk-potluck-aaaaaaaa-" + "a" * 43, max_retries=0)
    with pytest.raises(openai.AuthenticationError) as failure:
        client.models.list()
    assert failure.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("fields", "exception", "code"),
    [
        ({"model": "gpt-none"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": "hot"}, openai.BadRequestError, "invalid_request"),
        ({"messages": "hello"}, openai.BadRequestError, "invalid_request"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_has_its_exception(client, fields, exception, code, stream):
    with pytest.raises(exception) as failure:
        client.chat.completions.create(**{"model": LLAMACPP_MODEL, "messages": MESSAGES, "stream": stream, **fields})
    assert failure.value.code == code
    assert failure.value.request_id


def test_an_endpoint_that_the_model_does_not_serve(client):
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=LLAMACPP_MODEL, input="hello")


@pytest.mark.parametrize("count", [1, 2])
def test_several_answers_cost_the_same_streamed_or_not(client, count):
    body = {"model": LLAMACPP_MODEL, "messages": MESSAGES, "max_tokens": 6, "n": count, "temperature": 0}
    whole = client.chat.completions.with_raw_response.create(**body)
    usage = whole.parse().usage
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    (streamed,) = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert usage.completion_tokens == streamed.completion_tokens == 6 * count
    assert int(whole.headers["x-potluck-cost-micro-credits"]) == usage.prompt_tokens + 4 * usage.completion_tokens
