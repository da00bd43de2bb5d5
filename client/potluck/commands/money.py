"""`potluck credits`, `potluck audit`: what is owned, claiming what nodes earned, and whether the books balance.

Decides how amounts are shown: in credits, exact. It must not do arithmetic on balances; the ledger does.
"""

from __future__ import annotations

import uuid
from typing import Annotated

import typer

from potluck import calls
from potluck.commands.progress import LiveLine
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import EXIT_FAILED, JsonOption, moment, say, show, show_json, show_table
from potluck.results import Audit, Progress
from potluck.transport import Transport
from potluck_protocol.money import credits_text

LINE_COUNT_MAX = 1000


def credits_command(
    claim: Annotated[bool, typer.Option("--claim", help="First move what your nodes earned to what you can spend.")] = False,
    lines: Annotated[int, typer.Option(min=0, max=LINE_COUNT_MAX, help="Also list this many of the last changes.")] = 0,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Show your credits: what you can spend, what running requests hold, and what your nodes earned."""
    with connected(url, api_key_file) as transport:
        if claim:
            claimed = transport.unary(calls.claim_earnings(f"claim_{uuid.uuid4().hex}"))
            say(f"Claimed {credits_text(claimed)} credits.")
        balance = transport.unary(calls.get_balance())
        entries = transport.unary(calls.list_statement(lines)) if lines else ()
    if as_json:
        show_json({"balance": balance, "lines": entries} if lines else balance)
        return
    show(f"account    {balance.account_id}")
    show(f"available  {credits_text(balance.available_micro_credits)}")
    show(f"held       {credits_text(balance.held_micro_credits)}")
    show(f"earned     {credits_text(balance.earned_micro_credits)}  (move it with --claim)")
    if entries:
        rows = [
            (moment(entry.created_at_unix_ms), entry.ledger_account_kind, entry.kind, credits_text(entry.amount_micro_credits))
            for entry in entries
        ]
        show("")
        show_table(("WHEN (UTC)", "ACCOUNT", "WHAT", "CREDITS"), rows)


def audit(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Derive every balance again from the ledger's postings and compare. Operators only.

    Exits with 1 if anything does not balance.
    """
    with connected(url, api_key_file) as transport:
        report = audited(transport)
    if as_json:
        show_json(report)
    else:
        show(
            f"{report.account_count} accounts, {report.transaction_count} transactions, {report.posting_count} postings, "
            f"{report.open_hold_count} open holds, {credits_text(report.issued_micro_credits)} credits issued"
        )
        for finding in report.findings:
            show(f"FINDING  {finding}")
        show("The books balance." if not report.findings else f"{len(report.findings)} findings: the books do not balance.")
    if report.findings:
        raise typer.Exit(EXIT_FAILED)


def audited(operator: Transport) -> Audit:
    """The report, once the coordinator has looked through all of the books; a line on the screen says how far it is."""
    with LiveLine() as line:
        while isinstance(found := operator.unary(calls.audit_ledger()), Progress):
            line.update(found.words)
    return found
