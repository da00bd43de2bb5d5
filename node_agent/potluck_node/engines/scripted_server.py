"""An OpenAI-compatible server that says what its script says, at the pace and with the faults the script asks for.

`python -m potluck_node.engines.scripted_server --model SCRIPT.json --alias NAME --context TOKENS --slots COUNT` prints one line of JSON
with its URL and serves on loopback. It is the engine of tests and benchmarks, so a token costs it little: the event of each token is made
once for an answer, and sending it is one write.

Decides how tokens are counted: a prompt's words are its tokens, or a quarter of its characters where answers are stamped; and that it goes
on behind a last message of the assistant's that is the beginning of what the script says, as llama.cpp does. What is said, when, and with
which fault is for `script` to say; where the script has a cost, `batch_runner` says when.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import uvloop

from potluck_node.engines.batch_runner import BatchRunner
from potluck_node.engines.script import Script, read_script
from potluck_node.engines.scripted_http import Exchange, serve_http
from potluck_node.lifeline import exit_with_parent

_EXIT_STATUS: Final = 86
_CHARACTERS_PER_TOKEN: Final = 4
"""Of a stamped script's prompts: about what real ones have, and nothing to count."""
_LAST_WORD_CHARACTERS_MAX: Final = 16


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

    async def answer(self, exchange: Exchange) -> None:
        """Answers as an OpenAI server does, and `/scripted/counts` for tests."""
        told = self._tellers().get(exchange.path) if exchange.method == "GET" else None
        asked = self._askers().get(exchange.path) if exchange.method == "POST" else None
        if asked is not None:
            await self._answer_guarded(exchange, asked)
        elif told is not None:
            exchange.answer(200, *told())
        else:
            _answer_json(exchange, {"error": {"code": 404, "message": "Not Found", "type": "not_found_error"}}, 404)

    def _askers(self) -> Mapping[str, Callable[[Exchange, dict[str, Any]], Awaitable[None]]]:
        return {"/v1/chat/completions": self._answer, "/v1/completions": self._answer, "/v1/embeddings": self._embed}

    def _tellers(self) -> Mapping[str, Callable[[], tuple[str, bytes]]]:
        model = {"id": self._alias, "object": "model", "created": self._created, "owned_by": "scripted"}
        tellers: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/v1/models": lambda: _json({"object": "list", "data": [model]}),
            "/health": lambda: _json({"status": "ok"}),
            "/scripted/counts": lambda: _json(self.counts),
        }
        if (batching := self.batching) is not None:
            tellers["/metrics"] = lambda: ("text/plain; charset=utf-8", batching.metrics().encode())
        return tellers

    async def _answer_guarded(self, exchange: Exchange, asked: Callable[[Exchange, dict[str, Any]], Awaitable[None]]) -> None:
        self.counts["requests"] += 1
        try:
            body = _decoded(exchange.body)
            async with self._slots:
                self.counts["running"] += 1
                try:
                    await asked(exchange, body)
                finally:
                    self.counts["running"] -= 1
        except RequestRefusedError as refused:
            error = {"code": refused.http_status, "message": str(refused), "type": refused.error_type}
            _answer_json(exchange, {"error": error}, refused.http_status)
        except (asyncio.CancelledError, ConnectionError):
            self.counts["cancelled"] += 1
            raise
        else:
            self.counts["finished"] += 1

    def _ask(self, path: str, body: dict[str, Any]) -> Ask:
        chat = path.endswith("/chat/completions")
        override = body.get("scripted", {})
        try:
            script = self._script.overridden(override) if override else self._script
        except (TypeError, ValueError) as error:
            raise RequestRefusedError(400, str(error)) from error
        first_token, asked = _said_before(body, script)
        text = _prompt_text(asked, chat=chat)
        words = text[-_LAST_WORD_CHARACTERS_MAX:].split() if script.stamped else text.split()
        if script.pace_in_prompt and words and words[-1].isdecimal():
            script = replace(script, inter_token_ms=int(words[-1]))
        prompt_token_count = (len(text) // _CHARACTERS_PER_TOKEN if script.stamped else len(words)) + first_token
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

    async def _answer(self, exchange: Exchange, body: dict[str, Any]) -> None:
        ask = self._ask(exchange.path, body)
        if ask.script.fail_status is not None:
            raise RequestRefusedError(ask.script.fail_status, "the script asks for this failure", "server_error")
        if ask.stream:
            await self._answer_streamed(exchange, ask)
            return
        said: list[str] = []

        async def say(token: str) -> None:
            said.append(token)

        await self._say(exchange, ask, say)
        content: dict[str, object] = {"message": {"role": "assistant", "content": "".join(said)}} if ask.chat else {"text": "".join(said)}
        choice = {"index": 0, "finish_reason": ask.finish_reason, "logprobs": None, **content}
        _answer_json(exchange, {**self._head(ask, streamed=False), "choices": [choice], "usage": _usage(ask)})

    async def _answer_streamed(self, exchange: Exchange, ask: Ask) -> None:
        head = json.dumps(self._head(ask, streamed=True))[:-1].encode()
        opened = b"data: " + head + b', "choices": [{"index": 0, "finish_reason": null, '
        before, after = (b'"delta": {"content": ', b"}}]}\n\n") if ask.chat else (b'"text": ', b"}]}\n\n")
        exchange.open("text/event-stream")
        if ask.chat:
            await exchange.write(opened + b'"delta": {"role": "assistant", "content": null}}]}\n\n')
        texts = {token: opened + before + json.dumps(token).encode() + after for token in set(ask.script.tokens)}
        before, after = opened + before + b'"', b'"' + after
        if ask.script.stamped:
            await self._say(exchange, ask, lambda token: exchange.write(before + token.encode() + after))
        else:
            await self._say(exchange, ask, lambda token: exchange.write(texts[token]))
        nothing: dict[str, object] = {"delta": {}} if ask.chat else {"text": ""}
        last = {"index": 0, "finish_reason": ask.finish_reason, **nothing}
        tail = b"data: " + head + b', "choices": [' + json.dumps(last).encode() + b"]}\n\n"
        if ask.include_usage:
            tail += b"data: " + head + b', "choices": [], "usage": ' + json.dumps(_usage(ask)).encode() + b"}\n\n"
        await exchange.write(tail + b"data: [DONE]\n\n")
        exchange.close()

    async def _say(self, exchange: Exchange, ask: Ask, say: Callable[[str], Awaitable[None]]) -> None:
        """The answer's tokens at the script's pace, or its engine's, with the script's faults."""
        script, counts, number = ask.script, self.counts, ask.first_token
        paced = self._paced(ask) if self.batching is None else self.batching.tokens(ask.prompt_token_count, ask.completion_token_count)
        faults = {script.exit_after_tokens, script.hang_after_tokens, script.break_after_tokens}
        async with aclosing(paced) as ticks:
            if 0 in faults:
                await _misbehave(exchange, script, 0)
            async for _ in ticks:
                counts["tokens"] += 1
                await say(f" {number}:{time.monotonic_ns()}" if script.stamped else script.tokens[number % len(script.tokens)])
                number += 1
                if number - ask.first_token in faults:
                    await _misbehave(exchange, script, number - ask.first_token)

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

    async def _embed(self, exchange: Exchange, body: dict[str, Any]) -> None:
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
        _answer_json(exchange, {"object": "list", "model": self._alias, "data": data, "usage": usage})

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


async def _misbehave(exchange: Exchange, script: Script, token_count: int) -> None:
    if token_count == script.exit_after_tokens:
        os._exit(_EXIT_STATUS)
    if token_count == script.hang_after_tokens:
        await asyncio.Event().wait()
    if token_count == script.break_after_tokens:
        exchange.abort()
        raise ConnectionResetError("the script breaks the answer off")


def _json(value: object) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(value).encode()


def _answer_json(exchange: Exchange, value: object, status: int = 200) -> None:
    exchange.answer(status, *_json(value))


@asynccontextmanager
async def serving(server: ScriptedServer, port: int = 0) -> AsyncIterator[str]:
    """Serves on loopback while the block runs; its URL."""
    http = await serve_http(server.answer, port)
    batching = asyncio.create_task(server.batching.run()) if server.batching is not None else None
    try:
        yield http.url
    finally:
        if batching is not None:
            batching.cancel()
        await http.cleanup()


async def _run(options: argparse.Namespace) -> None:
    script = read_script(options.model)
    await asyncio.sleep(script.load_ms / 1000)
    server = ScriptedServer(script, options.alias, options.context, options.slots)
    async with nullcontext("") if options.stage else serving(server, options.port) as url:
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
