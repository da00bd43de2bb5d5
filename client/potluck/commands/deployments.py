"""`potluck deploy`, `undeploy`, `deployments`: which models should be served, and what became of that.

Decides how a wish is written. It must not know how nodes are chosen; `explaining` shows what the coordinator says of that.
"""

from __future__ import annotations

from typing import Annotated

import typer

from potluck import catalogue_calls
from potluck.commands.models import ModelArgument, wish_words
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import JsonOption, say, show_json, show_table
from potluck.results import Deployment, Tier
from potluck_protocol.bounds import REPLICAS_MAX
from potluck_protocol.values import ModelId


def deploy(
    model: ModelArgument,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, max=REPLICAS_MAX, metavar="N", help="How many. Else one on every node that can serve it.", show_default=False),
    ] = None,
    tier: Annotated[Tier, typer.Option(help="Where there is not enough for both, flex makes room for default.")] = "default",
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Have a model served. Operators only.

    The coordinator chooses the nodes, by what fits them. This command does not wait for them: `potluck deployments` shows how far they
    are, `potluck explain MODEL` why. To wish for more or fewer replicas, or another tier, deploy again.

    For example: potluck deploy my-model --replicas 2

    Or, where it may make room for other models: potluck deploy my-model --tier flex
    """
    deployment = Deployment(ModelId(model), replicas, tier)
    with connected(url, api_key_file) as transport:
        transport.unary(catalogue_calls.deploy(deployment))
    if as_json:
        show_json(deployment)
    say(f"Wished of {model}: {wish_words(deployment)}. How far it is: potluck deployments. Why: potluck explain {model}")


def undeploy(model: ModelArgument, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """No longer have a model served. Operators only.

    Its replicas finish what they are answering, and stop. The model stays in the catalogue.

    For example: potluck undeploy my-model
    """
    with connected(url, api_key_file) as transport:
        transport.unary(catalogue_calls.undeploy(ModelId(model)))
    if as_json:
        show_json({"model_id": model})
    say(f"{model} is no longer deployed.")


def list_deployments(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the models that should be served, how many replicas are ready, and what keeps further ones away.

    STARTING are on their way; WAITING are requests that wait for a slot. To add a line: potluck deploy MODEL. To take one away: potluck
    undeploy MODEL.

    For example: potluck deployments
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(catalogue_calls.list_deployments())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            each.deployment.model_id,
            each.deployment.tier,
            "every node" if each.deployment.replica_count is None else each.deployment.replica_count,
            each.ready_replica_count,
            each.starting_replica_count,
            each.waiting_request_count,
            each.shortfall or "-",
        )
        for each in found
    ]
    show_table(("MODEL", "TIER", "WISHED", "READY", "STARTING", "WAITING", "WHY NOT MORE"), rows)
