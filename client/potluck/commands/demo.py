"""`potluck demo`: the whole of Potluck once, from nothing to an answered and paid question, and back to nothing.

Decides what is asked, what is shown of it, and that books which do not balance are a failure. It must not know how the pool is started;
`local_pool` does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from potluck import calls
from potluck.client import Client
from potluck.command import EXIT_INTERRUPTED
from potluck.commands.chat import TimedAnswer, stream_answer
from potluck.commands.local_pool import LocalPool, LocalPoolPlan, person_key
from potluck.commands.money import audited
from potluck.commands.progress import LiveLine
from potluck.commands.terminal import EXIT_FAILED, say, show, show_part
from potluck.commands.up import CatalogueOption
from potluck.errors import pool_error
from potluck.results import Audit
from potluck.transport import Transport
from potluck_protocol.errors import ErrorCode
from potluck_protocol.interruption import ended_by_signals
from potluck_protocol.money import credits_text
from potluck_protocol.values import AccountId

QUESTION: Final = "Why do people like to share food? Answer in two sentences."
ANSWER_TOKENS_MAX: Final = 120
SETTLEMENT_LINE_COUNT: Final = 10
SETTLEMENT_SECONDS_MAX: Final = 5.0
SETTLEMENT_POLL_SECONDS: Final = 0.1


def demo(
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    catalogue: CatalogueOption = None,
) -> None:
    """Start a pool on this machine, ask it one question, show who was paid what, and stop it.

    The pool lives in a temporary folder and on free ports of this machine only. The model is kept in `$XDG_CACHE_HOME/potluck`, so that the
    first run fetches about 100 MB and later ones take seconds.
    """
    try:
        with ended_by_signals(), tempfile.TemporaryDirectory(prefix="potluck-demo-") as folder, LiveLine() as line:
            report = _run(LocalPoolPlan(Path(folder), 0, 0, 0, catalogue), line, question)
    except KeyboardInterrupt:
        say("Stopped; nothing is left running.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if report.findings:
        raise typer.Exit(EXIT_FAILED)


def _run(plan: LocalPoolPlan, line: LiveLine, question: str) -> Audit:
    with LocalPool(plan, line) as pool:
        pool.start()
        line.end()
        operator = pool.transport
        api_key = person_key(operator, "guest", "potluck demo")
        show(f"\n> {question}")
        with Client(pool.operator.url, api_key) as client:
            answer = stream_answer(client, [{"role": "user", "content": question}], show_part, max_tokens=ANSWER_TOKENS_MAX)
        show_part("\n\n")
        report = _settled_books(operator)
        for text in (*_story(operator, answer), *_books(report)):
            show(text)
        line.update("Stopping")
    line.update("Stopped; nothing is left running")
    return report


def _settled_books(operator: Transport) -> Audit:
    """The audit, once the answer's hold is settled; it is on its way when the answer ends."""
    deadline = time.monotonic() + SETTLEMENT_SECONDS_MAX
    while (report := audited(operator)).open_hold_count and time.monotonic() < deadline:
        time.sleep(SETTLEMENT_POLL_SECONDS)
    return report


def _story(operator: Transport, answer: TimedAnswer) -> Sequence[str]:
    """Where it ran, how fast, what it cost, and who earned it."""
    result = answer.result
    node = next(node for node in operator.unary(calls.list_nodes()) if node.node_id == result.node_id)
    owner_id = node.owner_account_id
    if owner_id is None:
        raise pool_error(ErrorCode.INTERNAL_ERROR, "The node that answered has no owner.")
    names = {account.account_id: account.name for account in operator.unary(calls.list_accounts())}
    speed = f"{answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else "too short to tell its speed"
    earned = credits_text(_earned_micro_credits(operator, owner_id))
    return (
        f"node    {node.display_name} ({node.node_id}), {result.model_id}",
        f"speed   {speed} ({result.usage.prompt_token_count} prompt + {result.usage.completion_token_count} answer tokens)",
        f"cost    {credits_text(result.charge_micro_credits)} credits, paid by guest",
        f"earned  {earned} credits, by {names[owner_id]}, the node's owner; the rest is the fee",
    )


def _earned_micro_credits(operator: Transport, owner_id: AccountId) -> int:
    lines = operator.unary(calls.list_statement(SETTLEMENT_LINE_COUNT, owner_id))
    return sum(line.amount_micro_credits for line in lines if line.ledger_account_kind == "earnings")


def _books(report: Audit) -> Sequence[str]:
    verdict = "the books balance" if not report.findings else "the books do NOT balance"
    return (
        f"audit   {verdict}: {report.account_count} accounts, {report.transaction_count} transactions, {report.posting_count} postings",
        *(f"FINDING {finding}" for finding in report.findings),
    )
