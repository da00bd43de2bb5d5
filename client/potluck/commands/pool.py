"""`potluck nodes`: which nodes the pool has, and taking one out of it.

Decides the columns. It must not know how the pool chooses among nodes.
"""

from __future__ import annotations

from typing import Annotated

import typer

from potluck import calls
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import JsonOption, say, show_json, show_table
from potluck.results import NodeInfo
from potluck_protocol.values import EngineState, NodeId

nodes_app = typer.Typer(help="See the pool's nodes; as its operator, take one out.", invoke_without_command=True)


@nodes_app.callback()
def _nodes(context: typer.Context, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the pool's nodes, or with `revoke` take one out for good."""
    if context.invoked_subcommand is None:
        list_nodes(as_json, url, api_key_file)


@nodes_app.command("list")
def list_nodes(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the pool's nodes. STATE is what a connected node says of itself; UP is its share of the known minutes."""
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
            node.agent_version,
        )
        for node in found
    ]
    show_table(("NODE", "NAME", "OWNER", "LINK", "STATE", "ENGINES", "UP", "AGENT"), rows)


@nodes_app.command("revoke")
def revoke_node(
    node_id: Annotated[str, typer.Argument(help="The node's whole id, from `potluck nodes`.")],
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
