"""`potluck node doctor`: looks at this machine once, and says what to mend.

Decides what is looked at before and after joining, how findings are shown, and what of them may be pasted in public. It must not know what
is wrong with what: `domain.doctor` judges, the probes look, `domain.redaction` takes names out.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import shlex
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from potluck_node.attached_servers import AttachedServers
from potluck_node.cap_right import cap_right, right_giving_command
from potluck_node.control import read_status
from potluck_node.credentials import Credentials
from potluck_node.domain.attached import parse_attached
from potluck_node.domain.doctor import diagnose
from potluck_node.domain.findings import AgentSeen, Examination, Finding, Level, OwnerWord, exit_code
from potluck_node.domain.hardware import Card, Network
from potluck_node.domain.line import LineReading
from potluck_node.domain.redaction import redacted, redacted_facts
from potluck_node.engines.environments import python_of
from potluck_node.engines.registry import available_engines
from potluck_node.group_offer import group_offer, own_addresses
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.line_watch import measure_and_keep
from potluck_node.node_meant import settings_of_node_meant
from potluck_node.probe.engine_cuda import cuda_of
from potluck_node.probe.host import process_tree
from potluck_node.probe.inventory import examine
from potluck_node.probe.network import listening_beyond_loopback, read_network
from potluck_node.settings import Settings
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.errors import PotluckError
from potluck_protocol.observe import configure_logging
from potluck_protocol.version import package_version

DOCUMENT_FORMAT: Final = 1
"""Of `--json`: rises when a key that is there changes its meaning or goes. New ones may come without."""
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
    try:
        settings = settings_of_node_meant(state_dir, only_joined=False)
    except PotluckError as error:
        # 1 would say that all works.
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(2) from None
    folder = StateFolder(settings.state_dir)
    identity, agent = seen_agent(folder)
    examination = look(settings, folder, identity, agent)
    if report:
        examination = without_process_names(examination)
    findings = diagnose(examination)
    if as_json:
        typer.echo(as_document(examination, findings))
    elif report:
        typer.echo(as_report(examination, findings, private_names(settings, identity)))
    else:
        typer.echo(as_lines(findings))
        typer.echo(summary(findings))
    raise typer.Exit(exit_code(findings))


def seen_agent(folder: StateFolder) -> tuple[NodeIdentity | None, AgentSeen]:
    """Who this node is, and what of its agent is seen from here. What is damaged there is a finding, and ends nothing."""
    identity, running, damage, fix = None, False, "", ""
    try:
        running = folder.locked
        identity = folder.identity() if folder.joined else None
        if identity is not None:
            Credentials(folder, SystemClock(), lambda: 0.0)
    except OSError as error:
        damage, fix = f"{folder.path} cannot be read ({error.strerror})", "run this as the user that runs the agent"
    except PotluckError as error:
        damage, _, way_back = error.message.partition("; ")
        fix = f"end the agent if it runs, {way_back}"
    return identity, AgentSeen(running, damage, fix)


def look(settings: Settings, folder: StateFolder, identity: NodeIdentity | None, agent: AgentSeen) -> Examination:
    """Everything that the checks need. Blocks for some seconds."""
    status = read_status(folder.path) if agent.running else None
    agent_process_ids = frozenset[int]() if status is None else process_tree(status.pid)
    given_uuids, serving_uuids = ((), ()) if status is None else (status.card_uuids, status.serving_card_uuids)
    hardware = examine(settings.cache_dir, own_process_ids=agent_process_ids, own_card_uuids=given_uuids)
    cards = tuple(replace(card, engine_serves=card.identity.uuid in serving_uuids) for card in hardware.cards)
    listening = listening_beyond_loopback(agent_process_ids) if agent_process_ids else None
    network = None if identity is None else asyncio.run(_network(settings, folder, identity, listening))
    return Examination(replace(hardware, cards=cards), network, owner_word(settings), agent)


def owner_word(settings: Settings) -> OwnerWord:
    """What the settings say, and what they would keep an agent from starting by."""
    kinds, built_for, engine_failure = frozenset[str](), dict[str, str | None](), ""
    address, group_failure = "", ""
    named = {"vllm": settings.vllm_python, "sglang": settings.sglang_python}
    try:
        kinds = frozenset(available_engines(settings, AttachedServers([parse_attached(url) for url in settings.attach_urls])))
        pythons = {kind: python_of(kind, path, settings.cache_dir) for kind, path in named.items() if kind in kinds}
        built_for = {kind: cuda_of(python) for kind, python in pythons.items() if python is not None}
    except PotluckError as error:
        # The agent would not start; that is one line of many here.
        engine_failure = error.message
    try:
        offer = group_offer(settings)
        address = offer.address if offer is not None else ""
    except PotluckError as error:
        group_failure = error.message
    return OwnerWord(
        settings.power_supply_watts,
        kinds,
        frozenset(kind for kind, python in named.items() if python is not None),
        engine_failure,
        built_for,
        group_allowed=bool(settings.group_site),
        group_address=address,
        group_ports=(settings.group_port, settings.group_port + 1) if address else (),
        group_failure=group_failure,
        power_limit_watts=settings.power_limit_watts,
        cap_right=cap_right(),
        cap_right_command=right_giving_command(),
    )


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
    """For programs, in the form of docs/node-doctor.md. A fact that could not be got is null."""
    document = {
        "format": DOCUMENT_FORMAT,
        "agent_version": package_version(),
        "exit_code": exit_code(findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": _facts(examination),
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def as_report(examination: Examination, findings: tuple[Finding, ...], names: Mapping[str, str]) -> str:
    """Markdown that may be pasted in public; `names` as of `redacted`."""
    shown = [replace(finding, what=redacted(finding.what, names), fix=redacted(finding.fix, names)) for finding in findings]
    return "\n".join(
        (
            "### potluck node doctor",
            "",
            f"potluck {package_version()} · {summary(findings)} Names, places and keys are taken out.",
            "",
            "```",
            as_lines(shown),
            "```",
            "",
            "<details><summary>Facts</summary>",
            "",
            "```json",
            json.dumps(redacted_facts(_facts(examination), names), indent=1, ensure_ascii=False),
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
    for folder, word in ((settings.state_dir, "<state>"), (settings.cache_dir, "<cache>")):
        # Also as a fix has it, quoted for a shell.
        names |= {str(folder): word, shlex.quote(str(folder)): word}
    names |= {str(python): "<path>" for python in (settings.vllm_python, settings.sglang_python) if python is not None}
    names |= dict.fromkeys(own_addresses(), "<interface>") | {settings.group_site: "<site>", settings.group_address: "<address>"}
    names |= {_host(url): "<coordinator>" for url in (settings.url, identity.url if identity else None) if url}
    # A user for whom the system has no name is not told by name either.
    with contextlib.suppress(OSError, KeyError):
        names[getpass.getuser()] = "<user>"
    if identity is not None:
        names |= {identity.node_id: "<node>", identity.owner_account_id: "<account>", identity.display_name: "<node>"}
        names |= {identity.connection.host or "": "<coordinator>", identity.connection.pool_id: "<pool>"}
    return names


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url


async def _network(settings: Settings, folder: StateFolder, identity: NodeIdentity, listening: tuple[str, ...] | None) -> Network:
    seen = await read_network(
        link_target=identity.connection.link_target,
        grpc_target=identity.connection.grpc_target,
        url=settings.url or identity.url,
        listening=listening,
    )
    # After the round trips, which bulk on the line would lengthen.
    clock = SystemClock()
    return with_rates(seen, await _line(folder, clock), clock.unix_ms())


def with_rates(network: Network, line: LineReading, now_unix_ms: int) -> Network:
    """The way to the coordinator, and what was found of how much it carries."""
    found = line.found
    if found is None or (found.upload_bytes_per_second is None and found.download_bytes_per_second is None):
        return replace(network, rate_failure=line.failure)
    return replace(
        network,
        upload_bytes_per_second=found.upload_bytes_per_second,
        download_bytes_per_second=found.download_bytes_per_second,
        rate_age_seconds=max(0.0, (now_unix_ms - found.measured_at_unix_ms) / 1000),
        rate_failure=line.failure,
    )


async def _line(folder: StateFolder, clock: Clock) -> LineReading:
    try:
        credentials = Credentials(folder, clock, lambda: 0.0)
    except PotluckError as error:
        # How to mend it is the finding's own.
        return LineReading(failure=error.message.partition("; ")[0])
    return await measure_and_keep(credentials, folder.path, clock)


def _facts(examination: Examination) -> dict[str, Any]:
    facts = asdict(examination)
    facts["owner"]["engine_kinds"] = sorted(examination.owner.engine_kinds)
    facts["owner"]["engine_kinds_named"] = sorted(examination.owner.engine_kinds_named)
    return facts


def _without_process_names(card: Card) -> Card:
    if card.processes is None:
        return card
    return replace(card, processes=tuple(replace(process, name="") for process in card.processes))
