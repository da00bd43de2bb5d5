"""The http port as the `openai` package and curl meet it: a real socket, the real routes, a scripted request service."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from structlog.testing import capture_logs

from potluck_coordinator.gateway.authorisation import HTTP_ROUTES, Audience
from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX
from potluck_protocol.errors import CATALOGUE, ErrorCode, PotluckError
from tests.support.http_edge import (
    CHAT_DOCUMENT,
    CHAT_END,
    CHAT_STREAM,
    CONNECTION_DOCUMENT,
    MODEL_ID,
    NODE_ID,
    OPERATOR_KEY,
    USER_KEY,
    HttpEdge,
    Script,
    chat_body,
    exchange,
    http_edge,
)

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say hello"}]


@pytest.fixture
async def edge() -> AsyncIterator[HttpEdge]:
    async with http_edge() as running:
        yield running


@pytest.fixture
async def client(edge: HttpEdge) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=USER_KEY, base_url=f"{edge.url}/v1", max_retries=0, timeout=10) as made:
        yield made


async def collect(stream: openai.AsyncStream[ChatCompletionChunk], texts: list[str]) -> None:
    """Takes what comes until the end or an error."""
    async for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - what came before an error must stay


async def test_whole_answer(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    edge.requests.script = Script(pieces=(CHAT_DOCUMENT[:40], CHAT_DOCUMENT[40:]), charge_micro_credits=42)
    raw = await client.chat.completions.with_raw_response.create(model=MODEL_ID, messages=MESSAGES, max_tokens=5, extra_body={"top_k": 3})
    assert raw.parse().choices[0].message.content == "Hello there"
    assert raw.headers["x-potluck-node"] == NODE_ID
    assert raw.headers["x-potluck-cost-micro-credits"] == "42"
    assert raw.headers["content-type"] == "application/json"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert "server" not in raw.headers
    request = edge.requests.seen[0]
    assert (request.account_id, request.model_id, request.completion_tokens_max) == ("acct_user", MODEL_ID, 5)
    assert json.loads(request.body)["top_k"] == 3
    assert raw.headers["x-request-id"] == request.request_id
    assert edge.requests.answers[0].closed.is_set()


async def test_streamed_answer(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    edge.requests.script = Script(pieces=(*CHAT_STREAM, CHAT_END))
    stream = await client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, stream=True)
    texts: list[str] = []
    await collect(stream, texts)
    assert "".join(texts) == "Hello there"
    headers = stream.response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert headers["x-potluck-node"] == NODE_ID
    assert "x-potluck-cost-micro-credits" not in headers
    assert edge.requests.answers[0].closed.is_set()


@pytest.mark.parametrize("asked", [True, False])
async def test_include_usage_reaches_the_service(edge: HttpEdge, client: openai.AsyncOpenAI, asked: bool) -> None:
    edge.requests.script = Script(pieces=(*CHAT_STREAM, CHAT_END))
    stream = await client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, stream=True, stream_options={"include_usage": True} if asked else openai.omit
    )
    await anext(aiter(stream))
    assert edge.requests.seen[0].include_usage is asked
    assert json.loads(edge.requests.seen[0].body)["stream_options"] == {"include_usage": True}


async def test_stream_is_relayed_byte_for_byte(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(*CHAT_STREAM, CHAT_END))
    answer = await exchange(edge.port, "POST", CHAT, chat_body(stream=True))
    assert answer.body == b"".join(CHAT_STREAM) + CHAT_END


async def test_completions_and_embeddings(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    document = {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": MODEL_ID,
        "choices": [{"text": "a", "index": 0, "finish_reason": "stop"}],
    }
    edge.requests.script = Script(pieces=(json.dumps(document).encode(),))
    assert (await client.completions.create(model=MODEL_ID, prompt="x")).choices[0].text == "a"
    document = {
        "object": "list",
        "model": MODEL_ID,
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    edge.requests.script = Script(pieces=(json.dumps(document).encode(),))
    embedding = await client.embeddings.create(model=MODEL_ID, input="x", encoding_format="float")
    assert embedding.data[0].embedding == [0.5, 0.25]


async def test_models(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [(model.id, model.owned_by, model.created) for model in listed] == [(MODEL_ID, "potluck", 1_700_000_000)]
    assert (await client.models.retrieve(MODEL_ID)).id == MODEL_ID
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


EXCEPTIONS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    502: openai.InternalServerError,
    503: openai.InternalServerError,
    405: openai.APIStatusError,
    413: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
    499: openai.APIStatusError,
}


async def test_every_refusal_is_the_right_exception(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    for code, stream in itertools.product(ErrorCode, (True, False)):
        edge.requests.script = Script(refusal=PotluckError(code, "the cause", param="model"))
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, stream=stream)
        error, spec = caught.value, CATALOGUE[code]
        assert isinstance(error, EXCEPTIONS[spec.http_status])
        assert error.status_code == spec.http_status
        assert (error.type, error.code, error.param) == (spec.openai_type, spec.openai_code or code.value, "model")
        assert error.request_id == edge.requests.seen[-1].request_id
        assert ("retry-after" in error.response.headers) is spec.retry_is_safe


async def test_wrong_keys(edge: HttpEdge) -> None:
    for key in ("sk-potluck-wrong000-" + "x" * 43, "sk-other", "x" * 3000):
        with pytest.raises(openai.AuthenticationError) as caught:
            async with openai.AsyncOpenAI(api_key=key, base_url=f"{edge.url}/v1", max_retries=0) as wrong:
                await wrong.models.list()
        assert caught.value.code == "invalid_api_key"
    answer = await exchange(edge.port, "POST", CHAT, chat_body(), key=None)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert not edge.requests.seen


async def test_bad_bodies(edge: HttpEdge) -> None:
    bad = ((b"", None), (b"{", None), (b'{"model":1}', "model"), (chat_body(temperature="hot"), "temperature"), (chat_body(n=9), "n"))
    for body, param in bad:
        answer = await exchange(edge.port, "POST", CHAT, body)
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["type"], error["code"], error["param"]) == (400, "invalid_request_error", "invalid_request", param)
    assert not edge.requests.seen


async def test_bad_type_through_openai(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, max_tokens="five")  # type: ignore[call-overload]
    assert caught.value.param == "max_tokens"


async def test_unknown_paths(edge: HttpEdge) -> None:
    for path in ("/", "/v1", "/v1/chat", "/v1/responses", f"{CHAT}/", "/v1//models", "/../etc", "/v1/models%2f..", "/docs", "/v1/models/"):
        answer = await exchange(edge.port, "GET", path)
        assert (path, answer.status) == (path, 404)
        assert json.loads(answer.body)["error"]["code"] in {"not_found", "model_not_found"}


async def test_wrong_methods(edge: HttpEdge) -> None:
    calls = (("GET", CHAT), ("POST", "/v1/models"), ("DELETE", "/v1/models/x"), ("PUT", "/health"), ("HEAD", CHAT))
    for method, path in calls:
        answer = await exchange(edge.port, method, path)
        assert (method, path, answer.status) == (method, path, 405)
        assert answer.headers["allow"] in {"GET", "POST"}
        assert method == "HEAD" or json.loads(answer.body)["error"]["code"] == "method_not_allowed"


async def test_routes_are_for_whom_the_table_says(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(CHAT_DOCUMENT,))
    keys = {None: 0, "sk-potluck-wrong000-" + "x" * 43: 0, USER_KEY: 1, OPERATOR_KEY: 2}
    needed = {Audience.ANYONE: 0, Audience.USER: 1, Audience.OPERATOR: 2}
    for (method, pattern), audience in HTTP_ROUTES.items():
        for key, rank in keys.items():
            body = {"/v1/completions": b'{"model":"m","prompt":"x"}', "/v1/embeddings": b'{"model":"m","input":"x"}'}.get(
                pattern, chat_body()
            )
            path = pattern.replace("{model_id}", MODEL_ID)
            answer = await exchange(edge.port, method, path, body if method == "POST" else b"", key=key)
            expected = 200 if rank >= needed[audience] else (401 if rank == 0 else 403)
            assert (method, pattern, key, answer.status) == (method, pattern, key, expected)
            if method == "GET":
                head = await exchange(edge.port, "HEAD", path, key=key)
                assert (pattern, key, head.status, head.body) == (pattern, key, expected, b"")


async def test_open_routes(edge: HttpEdge) -> None:
    assert (await exchange(edge.port, "GET", "/health", key=None)).body == b'{"status":"ok"}'
    answer = await exchange(edge.port, "GET", "/pool/v1/connection?x=1", key=None)
    assert (answer.body, answer.headers["content-type"]) == (CONNECTION_DOCUMENT, "application/json")
    assert (await exchange(edge.port, "GET", "/ready", key=None)).status == 200
    edge.requests.ready_replica_count = 0
    assert (await exchange(edge.port, "GET", "/ready", key=None)).status == 503


async def test_request_id_is_echoed_only_if_it_is_sane(edge: HttpEdge) -> None:
    for offered in ("abc-1.2_3", "x" * 64):
        assert (await exchange(edge.port, "GET", "/health", headers={"x-request-id": offered})).headers["x-request-id"] == offered
    for offered in ("x" * 65, "a b", "a;b", "\xe9", ""):
        given = (await exchange(edge.port, "GET", "/health", headers={"x-request-id": offered})).headers["x-request-id"]
        assert given.startswith("req_")


@pytest.mark.parametrize("loss", [PotluckError(ErrorCode.NODE_LOST, "The node is gone."), PotluckError(ErrorCode.ENGINE_FAILED)])
async def test_stream_that_breaks_off_says_so_and_never_done(edge: HttpEdge, client: openai.AsyncOpenAI, loss: PotluckError) -> None:
    edge.requests.script = Script(pieces=(*CHAT_STREAM, loss), charge_micro_credits=5)
    answer = await exchange(edge.port, "POST", CHAT, chat_body(stream=True))
    relayed, last = answer.body[: len(b"".join(CHAT_STREAM))], answer.body[len(b"".join(CHAT_STREAM)) :]
    assert relayed == b"".join(CHAT_STREAM)
    assert last.startswith(b"data: ")
    assert json.loads(last[6:]) == {"error": {"message": loss.message, "type": "server_error", "param": None, "code": loss.code.value}}
    assert b"[DONE]" not in answer.body

    stream = await client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        await collect(stream, texts)
    assert ("".join(texts), caught.value.code) == ("Hello there", loss.code.value)
    assert all(made.closed.is_set() for made in edge.requests.answers)


async def test_loss_before_the_first_byte_keeps_its_status(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    edge.requests.script = Script(pieces=(PotluckError(ErrorCode.NODE_LOST),))
    for stream in (True, False):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (502, "node_lost")
        assert "x-should-retry" not in caught.value.response.headers


async def test_openai_does_not_repeat_what_was_billed(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(b"{", PotluckError(ErrorCode.NODE_LOST)), charge_micro_credits=7)
    async with openai.AsyncOpenAI(api_key=USER_KEY, base_url=f"{edge.url}/v1", max_retries=2) as eager:
        with pytest.raises(openai.InternalServerError):
            await eager.chat.completions.create(model=MODEL_ID, messages=MESSAGES)
    assert len(edge.requests.seen) == 1


async def test_openai_repeats_what_may_succeed_later(edge: HttpEdge) -> None:
    edge.requests.script = Script(refusal=PotluckError(ErrorCode.QUEUE_FULL, retry_after_seconds=0.01))
    async with openai.AsyncOpenAI(api_key=USER_KEY, base_url=f"{edge.url}/v1", max_retries=2) as eager:
        with pytest.raises(openai.RateLimitError):
            await eager.chat.completions.create(model=MODEL_ID, messages=MESSAGES)
    assert len(edge.requests.seen) == 3


async def test_unexpected_failures_show_nothing_of_themselves(edge: HttpEdge) -> None:
    with capture_logs() as lines:
        for script in (Script(refusal=RuntimeError("canary")), Script(pieces=(*CHAT_STREAM, RuntimeError("canary")))):
            edge.requests.script = script
            answer = await exchange(edge.port, "POST", CHAT, chat_body(stream=True))
            assert b"canary" not in answer.body
            assert b'"code":"internal_error"' in answer.body
            assert b"[DONE]" not in answer.body
    assert "RuntimeError" in str(lines)
    assert "canary" not in str(lines)


async def test_too_large_through_openai(edge: HttpEdge, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model=MODEL_ID, messages=[{"role": "user", "content": "x" * (BODY_BYTES_MAX + 10)}])
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    assert not edge.requests.seen


async def test_one_log_line_per_request_without_its_words(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(*CHAT_STREAM, CHAT_END), charge_micro_credits=9)
    with capture_logs() as lines:
        await exchange(
            edge.port,
            "POST",
            CHAT,
            chat_body(stream=True, messages=[{"role": "user", "content": "canary"}]),
            headers={"x-request-id": "r1"},
        )
        await exchange(edge.port, "POST", CHAT, b'{"model":"canary","messages":[{"role":"canary"}]}')
        await exchange(edge.port, "GET", "/canary")
    assert [line["event"] for line in lines] == ["http_request"] * 3
    first = lines[0]
    expected = {
        "request_id": "r1",
        "account_id": "acct_user",
        "model_id": MODEL_ID,
        "node_id": NODE_ID,
        "endpoint": CHAT,
        "status": 200,
        "outcome": "ok",
        "stream": True,
        "prompt_token_count": 12,
        "completion_token_count": 3,
        "charge_micro_credits": 9,
    }
    assert expected.items() <= first.items()
    assert first["duration_ms"] >= first["first_byte_ms"] >= 0
    assert [line["status"] for line in lines] == [200, 400, 404]
    assert "canary" not in str(lines)
    assert USER_KEY not in str(lines)


async def test_metrics(edge: HttpEdge) -> None:
    edge.requests.script = Script(pieces=(*CHAT_STREAM, CHAT_END))
    await exchange(edge.port, "POST", CHAT, chat_body(stream=True))
    await exchange(edge.port, "GET", "/not/there")
    edge.requests.script = Script(refusal=PotluckError(ErrorCode.MODEL_NOT_FOUND))
    await exchange(edge.port, "POST", CHAT, chat_body(model="made-up-name"))
    answer = await exchange(edge.port, "GET", "/metrics", key=OPERATOR_KEY)
    text = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for line in (
        f'potluck_requests_total{{endpoint="{CHAT}",status="200"}} 1.0',
        f'potluck_requests_total{{endpoint="{CHAT}",status="404"}} 1.0',
        'potluck_requests_total{endpoint="other",status="404"} 1.0',
        f'potluck_tokens_total{{kind="prompt",model="{MODEL_ID}"}} 12.0',
        f'potluck_tokens_total{{kind="completion",model="{MODEL_ID}"}} 3.0',
        f'potluck_relayed_bytes_total{{model="{MODEL_ID}"}} {float(len(b"".join(CHAT_STREAM) + CHAT_END))}',
        f'potluck_request_ttft_seconds_count{{model="{MODEL_ID}"}} 1.0',
    ):
        assert line in text
    assert "made-up-name" not in text
    assert "acct_" not in text
