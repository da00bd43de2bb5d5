"""`potluck node doctor`: looks at this machine once, and says what to mend.

Decides what is looked at before and after joining, how findings are shown, and what of them may be pasted in public. It must not know what
is wrong with what: `domain.doctor` judges, the probes look, `domain.redaction` takes names out.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import socket
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from potluck_node.control import read_status
from potluck_node.domain.doctor import diagnose
from potluck_node.domain.findings import Examination, Finding, Level, OwnerWord, exit_code
from potluck_node.domain.hardware import Card, Network
from potluck_node.domain.redaction import redacted
from potluck_node.engines.registry import available_engines
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.probe.inventory import examine
from potluck_node.probe.network import listening_beyond_loopback, process_tree, read_network
from potluck_node.settings import Settings, load_settings
from potluck_protocol.observe import configure_logging
from potluck_protocol.version import package_version

_SUBJECT_CHARACTERS: Final = 13
_LEVEL_CHARACTERS: Final = 5


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: the findings and every fact behind them.")] = False,
    report: Annotated[bool, typer.Option("--report", help="To paste in public: names, places and keys are taken out.")] = False,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="Where the node's key and settings lie.", show_default=False)
    ] = None,
) -> None:
    """Look at cards, driver, disk, clock and network, and say what to mend. Needs no pool. Exits 0, 1 with a warning, 2 with a failure."""
    if as_json and report:
        raise typer.BadParameter("give --json or --report, not both")
    configure_logging(json=False, level="warning")
    settings = load_settings(state_dir=state_dir)
    folder = StateFolder(settings.state_dir)
    identity = folder.identity() if folder.joined else None
    examination = look(settings, folder, identity)
    if report:
        examination = without_process_names(examination)
    findings = diagnose(examination)
    if as_json:
        typer.echo(as_document(examination, findings))
    elif report:
        typer.echo(redacted(as_report(examination, findings), private_names(settings, identity)))
    else:
        typer.echo(as_lines(findings))
        typer.echo(summary(findings))
    raise typer.Exit(exit_code(findings))


def look(settings: Settings, folder: StateFolder, identity: NodeIdentity | None) -> Examination:
    """Everything that the checks need. Blocks for some seconds."""
    status = read_status(folder.path) if identity is not None and folder.locked else None
    agent_process_ids = frozenset[int]() if status is None else process_tree(status.pid)
    hardware = examine(settings.cache_dir, own_process_ids=agent_process_ids)
    listening = listening_beyond_loopback(agent_process_ids) if agent_process_ids else None
    network = None if identity is None else asyncio.run(_network(settings, identity, listening))
    engine_kinds = frozenset(available_engines(settings))
    return Examination(hardware, network, OwnerWord(settings.power_supply_watts, engine_kinds, bool(settings.group_site)))


def as_lines(findings: Iterable[Finding]) -> str:
    """A finding a line, as in "WARN  card 1        what  → fix"."""
    lines = []
    for finding in findings:
        line = f"{finding.level:<{_LEVEL_CHARACTERS}} {finding.subject:<{_SUBJECT_CHARACTERS}} {finding.what}"
        lines.append(f"{line}  → {finding.fix}" if finding.fix else line)
    return "\n".join(lines)


def summary(findings: Iterable[Finding]) -> str:
    """The last line."""
    levels = [finding.level for finding in findings]
    warning_count, failure_count = levels.count(Level.WARN), levels.count(Level.FAIL)
    warnings = "1 warning" if warning_count == 1 else f"{warning_count} warnings"
    failures = "1 failure" if failure_count == 1 else f"{failure_count} failures"
    return f"{warnings}, {failures}."


def as_document(examination: Examination, findings: tuple[Finding, ...]) -> str:
    """For programs. A fact that could not be got is null."""
    document = {
        "exit_code": exit_code(findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": _facts(examination),
        "agent_version": package_version(),
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def as_report(examination: Examination, findings: tuple[Finding, ...]) -> str:
    """Markdown, before names are taken out."""
    return "\n".join(
        (
            "### potluck node doctor",
            "",
            f"potluck {package_version()} · {summary(findings)} Names, places and keys are taken out.",
            "",
            "```",
            as_lines(findings),
            "```",
            "",
            "<details><summary>Facts</summary>",
            "",
            "```json",
            json.dumps(_facts(examination), indent=1, ensure_ascii=False),
            "```",
            "",
            "</details>",
        )
    )


def without_process_names(examination: Examination) -> Examination:
    """What an owner runs besides is nobody else's business."""
    cards = tuple(_without_process_names(card) for card in examination.hardware.cards)
    return replace(examination, hardware=replace(examination.hardware, cards=cards))


def private_names(settings: Settings, identity: NodeIdentity | None) -> dict[str, str]:
    """Names of this machine, its user and its pool, each with the word that replaces it."""
    names = {socket.gethostname(): "<host>", socket.gethostname().split(".")[0]: "<host>", str(Path.home()): "<home>"}
    names |= {str(settings.state_dir.absolute()): "<state>", str(settings.cache_dir.absolute()): "<cache>"}
    # A user for whom the system has no name is not told by name either.
    with contextlib.suppress(OSError, KeyError):
        names[getpass.getuser()] = "<user>"
    if identity is not None:
        names |= {identity.node_id: "<node>", identity.owner_account_id: "<account>", identity.display_name: "<node>"}
        names |= {identity.connection.host or "": "<coordinator>", identity.connection.pool_id: "<pool>"}
    return names


async def _network(settings: Settings, identity: NodeIdentity, listening: tuple[str, ...] | None) -> Network:
    return await read_network(
        link_target=identity.connection.link_target,
        grpc_target=identity.connection.grpc_target,
        url=settings.url or identity.url,
        listening=listening,
    )


def _facts(examination: Examination) -> dict[str, Any]:
    facts = asdict(examination)
    facts["owner"]["engine_kinds"] = sorted(examination.owner.engine_kinds)
    return facts


def _without_process_names(card: Card) -> Card:
    if card.processes is None:
        return card
    return replace(card, processes=tuple(replace(process, name="") for process in card.processes))
