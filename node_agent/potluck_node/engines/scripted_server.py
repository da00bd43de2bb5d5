"""An OpenAI-compatible server that says what its script says, at the pace and with the faults the script asks for.

`python -m potluck_node.engines.scripted_server --model SCRIPT.json --alias NAME --context TOKENS --slots COUNT` prints one line of JSON
with its URL and serves on loopback. It is the engine of tests and benchmarks, so a token costs it little: the event of each token is made
once for an answer, and sending it is one write.

Decides how tokens are counted: a prompt's words are its tokens, and that it goes on behind a last message of the assistant's that is the
beginning of what the script says, as llama.cpp does. What is said, when, and with which fault is for `script` to say; where
the script has a cost, `batch_runner` says when.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import uvloop
from aiohttp import web

from potluck_node.engines.batch_runner import BatchRunner
from potluck_node.engines.script import Script, read_script
from potluck_node.lifeline import exit_with_parent

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
_EXIT_STATUS: Final = 86


class RequestRefusedError(Exception):
    """A request that is answered with an OpenAI error body."""

    def __init__(self, http_status: int, message: str, error_type: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.http_status = http_status
        self.error_type = error_type


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request wants, read from its body."""

    script: Script
    stream: bool
    include_usage: bool
    prompt_token_count: int
    completion_token_count: int
    finish_reason: str
    chat: bool
    answer_id: str
    first_token: int = 0
    """Its number in the script's answer: those before it are in the prompt."""


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise RequestRefusedError(400, "the body is not valid JSON") from error
    if not isinstance(value, dict):
        raise RequestRefusedError(400, "the body must be a JSON object")
    return value


def _number(body: dict[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise RequestRefusedError(400, f"Field '{name}': type must be number, but is {type(value).__name__}")
    return value


def _prompt_text(body: dict[str, Any], *, chat: bool) -> str:
    if not chat:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise RequestRefusedError(400, "'prompt' must be a string")
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestRefusedError(400, "Expected 'messages' to be an array")
    return " ".join(str(message.get("content", "")) for message in messages)


def _said_before(body: dict[str, Any], script: Script) -> tuple[int, dict[str, Any]]:
    """How many of the script's tokens a last message of the assistant's already has, and the body without it."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return 0, body
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return 0, body
    said, text = str(last.get("content", "")), ""
    if script.stamped:
        numbers = [token.split(":")[0] for token in said.split()]
        in_order = numbers == [str(number) for number in range(len(numbers))]
        return (len(numbers), {**body, "messages": messages[:-1]}) if in_order else (0, body)
    for count in range(script.answer_token_count + 1):
        if text == said:
            return count, {**body, "messages": messages[:-1]}
        text += script.tokens[count % len(script.tokens)]
    return 0, body


def _answer_token_count(script: Script, words: list[str]) -> int:
    if script.count_in_prompt and words and words[-1].isdecimal():
        return min(int(words[-1]), script.answer_token_count)
    return script.answer_token_count


class ScriptedServer:
    """One running engine: its script, its slots and its counts."""

    def __init__(self, script: Script, alias: str, context_length_tokens: int, slot_count: int) -> None:
        if script.cost is not None and script.cost.kv_capacity_tokens <= context_length_tokens:
            raise ValueError("the script's cost.kv_capacity_tokens holds no request of the whole context")
        self._script = script
        self.batching = BatchRunner(script.cost) if script.cost is not None else None
        """Its loop is whoever starts the server's to run."""
        self._alias = alias
        self._context_length_tokens = context_length_tokens
        self._slots = asyncio.Semaphore(slot_count) if script.cost is None else nullcontext()
        self._created = int(time.time())
        self.counts = {"requests": 0, "running": 0, "finished": 0, "cancelled": 0, "tokens": 0}

    def application(self) -> web.Application:
        """The routes of an OpenAI server, and `/scripted/counts` for tests."""
        application = web.Application(client_max_size=BODY_BYTES_MAX)
        application.router.add_post("/v1/chat/completions", self._guarded(self._answer))
        application.router.add_post("/v1/completions", self._guarded(self._answer))
        application.router.add_post("/v1/embeddings", self._guarded(self._embed))
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/health", self._health)
        application.router.add_get("/scripted/counts", self._show_counts)
        if self.batching is not None:
            application.router.add_get("/metrics", self._metrics)
        return application

    def _guarded(self, handler: Any) -> Any:
        async def guarded(request: web.Request) -> web.StreamResponse:
            self.counts["requests"] += 1
            try:
                body = _decoded(await request.read())
                async with self._slots:
                    self.counts["running"] += 1
                    try:
                        response: web.StreamResponse = await handler(request, body)
                    finally:
                        self.counts["running"] -= 1
            except RequestRefusedError as refused:
                return _error(refused)
            except (asyncio.CancelledError, ConnectionError):
                self.counts["cancelled"] += 1
                raise
            self.counts["finished"] += 1
            return response

        return guarded

    def _ask(self, path: str, body: dict[str, Any]) -> Ask:
        chat = path.endswith("/chat/completions")
        override = body.get("scripted", {})
        try:
            script = self._script.overridden(override) if override else self._script
        except (TypeError, ValueError) as error:
            raise RequestRefusedError(400, str(error)) from error
        first_token, asked = _said_before(body, script)
        words = _prompt_text(asked, chat=chat).split()
        if script.pace_in_prompt and words and words[-1].isdecimal():
            script = replace(script, inter_token_ms=int(words[-1]))
        prompt_token_count = len(words) + first_token
        if prompt_token_count >= self._context_length_tokens:
            message = f"request ({prompt_token_count} tokens) exceeds the available context size ({self._context_length_tokens} tokens)"
            raise RequestRefusedError(400, message, "exceed_context_size_error")
        answer_token_count = max(0, _answer_token_count(script, words) - first_token)
        wanted = _number(body, "max_completion_tokens") or _number(body, "max_tokens") or answer_token_count
        count = min(wanted, self._context_length_tokens - prompt_token_count, answer_token_count)
        options = body.get("stream_options") or {}
        return Ask(
            script=script,
            stream=body.get("stream") is True,
            include_usage=isinstance(options, dict) and options.get("include_usage") is True,
            prompt_token_count=prompt_token_count,
            completion_token_count=count,
            finish_reason="length" if count < answer_token_count else "stop",
            chat=chat,
            answer_id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            first_token=first_token,
        )

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        ask = self._ask(request.path, body)
        if ask.script.fail_status is not None:
            raise RequestRefusedError(ask.script.fail_status, "the script asks for this failure", "server_error")
        if ask.stream:
            return await self._answer_streamed(request, ask)
        text = "".join([token async for token in self._tokens(request, ask)])
        content: dict[str, object] = {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
        choice = {"index": 0, "finish_reason": ask.finish_reason, "logprobs": None, **content}
        answer = {**self._head(ask, streamed=False), "choices": [choice], "usage": _usage(ask)}
        return web.json_response(answer)

    async def _answer_streamed(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        head = json.dumps(self._head(ask, streamed=True))[:-1].encode()
        opened = b"data: " + head + b', "choices": [{"index": 0, "finish_reason": null, '
        before, after = (b'"delta": {"content": ', b"}}]}\n\n") if ask.chat else (b'"text": ', b"}]}\n\n")
        if ask.chat:
            await response.write(opened + b'"delta": {"role": "assistant", "content": null}}]}\n\n')
        texts = {token: opened + before + json.dumps(token).encode() + after for token in set(ask.script.tokens)}
        async for token in self._tokens(request, ask):
            event = opened + before + b'"' + token.encode() + b'"' + after if ask.script.stamped else texts[token]
            await response.write(event)
        nothing: dict[str, object] = {"delta": {}} if ask.chat else {"text": ""}
        last = {"index": 0, "finish_reason": ask.finish_reason, **nothing}
        tail = b"data: " + head + b', "choices": [' + json.dumps(last).encode() + b"]}\n\n"
        if ask.include_usage:
            tail += b"data: " + head + b', "choices": [], "usage": ' + json.dumps(_usage(ask)).encode() + b"}\n\n"
        await response.write(tail + b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _tokens(self, request: web.Request, ask: Ask) -> AsyncIterator[str]:
        """The answer at the script's pace, or its engine's, with the script's faults."""
        paced = self._paced(ask) if self.batching is None else self.batching.tokens(ask.prompt_token_count, ask.completion_token_count)
        async with aclosing(paced) as ticks:
            index = 0
            await self._misbehave(request, ask.script, index)
            async for _ in ticks:
                self.counts["tokens"] += 1
                number = ask.first_token + index
                yield f" {number}:{time.monotonic_ns()}" if ask.script.stamped else ask.script.tokens[number % len(ask.script.tokens)]
                index += 1
                await self._misbehave(request, ask.script, index)

    async def _paced(self, ask: Ask) -> AsyncGenerator[None, None]:
        """Once for each token, when the script has it."""
        script, loop = ask.script, asyncio.get_running_loop()
        pace_seconds = script.inter_token_ms / 1000
        due_at = loop.time() + script.ttft_ms / 1000
        for index in range(ask.completion_token_count):
            delay_seconds = due_at - loop.time()
            # Without a pace the loop still turns now and then, so that a client that hung up is noticed.
            if delay_seconds > 0 or index % 64 == 0:
                await asyncio.sleep(max(0.0, delay_seconds))
            due_at += pace_seconds
            yield

    async def _misbehave(self, request: web.Request, script: Script, token_count: int) -> None:
        if token_count == script.exit_after_tokens:
            os._exit(_EXIT_STATUS)
        if token_count == script.hang_after_tokens:
            await asyncio.Event().wait()
        if token_count == script.break_after_tokens:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the script breaks the answer off")

    async def _embed(self, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        inputs = body.get("input")
        inputs = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(inputs, list) or not inputs:
            raise RequestRefusedError(400, "'input' must be a string or a list")
        dimensions = range(1, self._script.embedding_dimension_count + 1)
        data = [
            {"object": "embedding", "index": index, "embedding": [((len(str(text)) * factor) % 17) / 17 for factor in dimensions]}
            for index, text in enumerate(inputs)
        ]
        count = sum(len(str(text).split()) for text in inputs)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return web.json_response({"object": "list", "model": self._alias, "data": data, "usage": usage})

    async def _models(self, _request: web.Request) -> web.Response:
        model = {"id": self._alias, "object": "model", "created": self._created, "owned_by": "scripted"}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _request: web.Request) -> web.Response:
        assert self.batching is not None, "there is no such route without it"
        return web.Response(text=self.batching.metrics())

    async def _show_counts(self, _request: web.Request) -> web.Response:
        return web.json_response(self.counts)

    def _head(self, ask: Ask, *, streamed: bool) -> dict[str, object]:
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if ask.chat else "text_completion"
        return {"id": ask.answer_id, "object": kind, "created": self._created, "model": self._alias}


def _usage(ask: Ask) -> dict[str, object]:
    return {
        "prompt_tokens": ask.prompt_token_count,
        "completion_tokens": ask.completion_token_count,
        "total_tokens": ask.prompt_token_count + ask.completion_token_count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _error(refused: RequestRefusedError) -> web.Response:
    error = {"code": refused.http_status, "message": str(refused), "type": refused.error_type}
    return web.json_response({"error": error}, status=refused.http_status)


async def serve(server: ScriptedServer, port: int = 0) -> tuple[web.AppRunner, str]:
    """Starts serving on loopback; the runner to clean up, and the URL."""
    runner = web.AppRunner(server.application(), handler_cancellation=True, access_log=None)
    if server.batching is not None:
        runner.app.cleanup_ctx.append(server.batching.running)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _run(options: argparse.Namespace) -> None:
    script = read_script(options.model)
    await asyncio.sleep(script.load_ms / 1000)
    url = ""
    if not options.stage:
        _, url = await serve(ScriptedServer(script, options.alias, options.context, options.slots), options.port)
    print(json.dumps({"url": url}), flush=True)  # noqa: T201 - how the supervisor learns the port
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="potluck_node.engines.scripted_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the script, a JSON file; {} is a short default answer")
    parser.add_argument("--alias", required=True, help="the model's name in answers")
    parser.add_argument("--context", type=int, required=True, help="tokens of one slot, prompt and answer together")
    parser.add_argument("--slots", type=int, required=True, help="requests answered at a time")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--stage", action="store_true", help="be a stage of a group that does not lead: serve nothing")
    parser.add_argument("--lifeline", action="store_true", help="exit when stdin ends")
    options = parser.parse_args()
    if options.lifeline:
        exit_with_parent()
    uvloop.run(_run(options))


if __name__ == "__main__":
    main()
