"""`potluck nodes`: which nodes the pool has, which of them its operator trusts, and taking one out of it.

Decides the columns. It must not know how the pool chooses among nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potluck import calls
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import JsonOption, say, show_json, show_table
from potluck.results import NodeInfo
from potluck_protocol.values import EngineState, NodeId

nodes_app = typer.Typer(help="See the pool's nodes; as its operator, trust one, or take one out.", invoke_without_command=True)

NodeArgument = Annotated[str, typer.Argument(metavar="NODE_ID", help="The node's whole id, from `potluck nodes`.")]


@nodes_app.callback()
def _nodes(context: typer.Context, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the pool's nodes; with `trust`, `distrust` or `revoke`, say what you as the operator think of one."""
    if context.invoked_subcommand is None:
        list_nodes(as_json, url, api_key_file)


@nodes_app.command("list")
def list_nodes(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the pool's nodes.

    STATE is what a connected node says of itself; UP is its share of the known minutes; TRUST is the operator's word, on which requests may
    insist (`potluck chat --trusted-only`).
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(calls.list_nodes())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            node.node_id,
            node.display_name,
            node.owner_account_id or "-",
            node.connection,
            _state(node),
            _engines(node),
            _uptime(node),
            "trusted" if node.trusted else "-",
            node.agent_version,
        )
        for node in found
    ]
    show_table(("NODE", "NAME", "OWNER", "LINK", "STATE", "ENGINES", "UP", "TRUST", "AGENT"), rows)


@nodes_app.command("trust")
def trust_node(node_id: NodeArgument, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Let a node have the requests of those who demand trusted nodes. Operators only.

    Whoever owns the machine can read what it is asked. Trust those whose owners you would give the prompts yourself; whose a node is counts
    for nothing without this word, your own account's included. A node that leaves the pool and comes back is not trusted any more.

    For example: potluck nodes trust abcdefghijklmnopqrstuvwxyz
    """
    _set_trust(node_id, as_json, url, api_key_file, trusted=True)


@nodes_app.command("distrust")
def distrust_node(node_id: NodeArgument, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Take that word back. Operators only.

    From then on no request that demands trusted nodes goes there; those that it is answering are answered to their end.

    For example: potluck nodes distrust abcdefghijklmnopqrstuvwxyz
    """
    _set_trust(node_id, as_json, url, api_key_file, trusted=False)


@nodes_app.command("revoke")
def revoke_node(
    node_id: NodeArgument,
    reason: Annotated[str, typer.Option(help="Why, for the node's owner to read.")] = "",
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Take a node out of the pool for good. Operators only.

    Its link ends at once and its certificate counts for nothing from then on. To bring the machine back, its owner runs
    `potluck node leave` and joins with a new invite.
    """
    with connected(url, api_key_file) as transport:
        transport.unary(calls.revoke_node(NodeId(node_id), reason))
    if as_json:
        show_json({"node_id": node_id})
    say(f"Node {node_id} is revoked.")


def _set_trust(node_id: str, as_json: bool, url: str | None, api_key_file: Path | None, *, trusted: bool) -> None:
    with connected(url, api_key_file) as transport:
        transport.unary(calls.set_node_trust(NodeId(node_id), trusted=trusted))
    if as_json:
        show_json({"node_id": node_id, "trusted": trusted})
    say(f"Node {node_id} is {'trusted' if trusted else 'not trusted any more'}.")


def _state(node: NodeInfo) -> str:
    if node.connection != "connected":
        return "-"
    causes = ", ".join(cause.replace("_", " ") for cause in node.rest_causes)
    return f"{node.state} ({causes})" if causes else str(node.state)


def _engines(node: NodeInfo) -> str:
    return (
        ", ".join(
            engine.model_id if engine.state is EngineState.READY else f"{engine.model_id} ({engine.state})" for engine in node.engines
        )
        or "-"
    )


def _uptime(node: NodeInfo) -> str:
    known_minutes = node.up_minutes + node.down_minutes
    return f"{100 * node.up_minutes / known_minutes:.2f}%" if known_minutes else "-"
