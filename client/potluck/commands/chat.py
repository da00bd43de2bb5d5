"""`potluck chat`: one question, or a conversation.

Decides how a streamed answer looks on a terminal: the text on standard output, where it ran and what it cost on standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from potluck.client import Client
from potluck.commands.session import KeyFileOption, UrlOption, address
from potluck.commands.terminal import say, show_part
from potluck.errors import PoolError
from potluck.results import ChatResult
from potluck_protocol.money import credits_text


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer and how fast it came."""

    result: ChatResult
    tokens_per_second: float | None
    """Between the first piece of text and the end; None for an answer too short to tell."""


def stream_answer(
    client: Client, messages: list[Mapping[str, Any]], write: Callable[[str], None], *, model: str | None = None, **openai_fields: Any
) -> TimedAnswer:
    """Streams an answer into `write` and returns it whole; raises a `PoolError` where it breaks off."""
    first_text_at: float | None = None
    with client.chat(messages, model=model, stream=True, **openai_fields) as stream:
        for text in stream:
            if first_text_at is None:
                first_text_at = time.monotonic()
            write(text)
        result = stream.result()
    elapsed_seconds = time.monotonic() - first_text_at if first_text_at is not None else 0.0
    later_token_count = result.usage.completion_token_count - 1
    known = later_token_count > 0 and elapsed_seconds > 0
    return TimedAnswer(result, later_token_count / elapsed_seconds if known else None)


def footer(answer: TimedAnswer) -> str:
    """Where it ran, how fast, and what it cost."""
    result = answer.result
    parts = [
        result.model_id,
        f"node {result.node_id[:8]}",
        f"{result.usage.prompt_token_count} + {result.usage.completion_token_count} tokens",
        *([f"{answer.tokens_per_second:.1f} tok/s"] if answer.tokens_per_second else []),
        f"{credits_text(result.charge_micro_credits)} credits",
    ]
    return " · ".join(parts)


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="The question. Without one: standard input, or a conversation on a terminal.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model of the pool (`potluck models`). Else the first that is ready.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")] = None,
    trusted_only: Annotated[
        bool, typer.Option("--trusted-only", help="Only on nodes that the operator trusts (`potluck nodes`), or not at all.")
    ] = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Ask a model of the pool, and see the answer as it is written.

    The answer goes to standard output; the node, the speed and the cost go to standard error.

    For example: potluck chat "Name three uses for a teapot."

    Or: cat report.txt | potluck chat --max-tokens 100 --trusted-only
    """
    fields: dict[str, Any] = {"max_tokens": max_tokens, "trusted_only": trusted_only}
    found = address(url, api_key_file)
    with Client(found.url, found.api_key) as client:
        if prompt is None and sys.stdin.isatty():
            _converse(client, model, fields)
        else:
            question = sys.stdin.read() if prompt is None else prompt
            if any("\ud800" <= letter <= "\udfff" for letter in question):
                raise typer.BadParameter("what is asked must be text in UTF-8")
            if not question.strip():
                raise typer.BadParameter("there is nothing to ask: give a PROMPT, or text on standard input")
            answer = stream_answer(client, [{"role": "user", "content": question}], show_part, model=model, **fields)
            show_part("\n")
            say(footer(answer))


def _converse(client: Client, model: str | None, fields: Mapping[str, Any]) -> None:
    say("Ask away. Ctrl-D ends.")
    messages: list[Mapping[str, Any]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            continue
        try:
            asked = [*messages, {"role": "user", "content": question}]
            answer = stream_answer(client, asked, show_part, model=model, **fields)
        except PoolError as error:
            say(f"\nerror: {error.message}")
            continue
        messages = [*asked, {"role": "assistant", "content": answer.result.text}]
        show_part("\n")
        say(footer(answer))
