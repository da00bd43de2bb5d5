"""`potluck explain`, `why-queued`, `why-not-my-node`: the reasons behind what the pool did.

Decides how a request's story, a waiting request and a node's share are laid out. It must not know how anything was decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from potluck import catalogue_calls, explain_calls
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import JsonOption, moment, say, show, show_json, show_table
from potluck.errors import NotFoundError, NotPermittedError, pool_error
from potluck.explain_calls import CandidateInfo, NodeShare, RequestStory
from potluck.results import NodeVerdict
from potluck_protocol.values import ModelId, NodeId, RequestId

SERVES: Final = "serves"
REQUEST_PREFIX: Final = "req_"
"""Of the names that the pool gives to requests; those that a client chose are asked for with `--request`."""

RequestArgument = Annotated[
    str, typer.Argument(metavar="REQUEST_ID", help="From the answer's x-request-id header, an error, or the SDK's result.request_id.")
]


def explain(
    subject: Annotated[str, typer.Argument(metavar="MODEL|REQUEST_ID", help="A deployed model, or a request of the last 15 minutes.")],
    is_request: Annotated[bool, typer.Option("--request", help="It is a request, though its id does not begin with req_.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Say why a model is where it is, or why a request ran where it did.

    Of a model (operators only) each node has a line: what it has to do with it, and why; what rules it out, or why another node is better.
    Of a request, each step: how long it waited, what each candidate would have cost in seconds and why it lost, and what became of it.

    For example: potluck explain my-model

    Or: potluck explain req_0123456789abcdef01234567
    """
    with connected(url, api_key_file) as transport:
        if is_request or subject.startswith(REQUEST_PREFIX):
            story = transport.unary(explain_calls.explain_request(RequestId(subject)))
            show_json(story) if as_json else _show_story(story)
            return
        try:
            verdicts = transport.unary(catalogue_calls.explain_deployment(ModelId(subject)))
        except (NotPermittedError, NotFoundError) as error:
            # Whoever named a request himself has to say that it is one: the name alone could be a model's.
            hint = f"{error.message} {subject!r} was taken for a model; of a request: `potluck explain {subject} --request`."
            raise pool_error(error.code, hint, param=error.param) from error
    show_json(verdicts) if as_json else _show_verdicts(subject, verdicts)


def why_queued(request_id: RequestArgument, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Say what a request that waits is waiting for, and for how long it will.

    For example: potluck why-queued req_0123456789abcdef01234567
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(explain_calls.explain_waiting(RequestId(request_id)))
    if as_json:
        show_json(found)
        return
    show(found.words)
    if found.waiting:
        predicted = "not known" if found.predicted_wait_ms is None else f"{found.predicted_wait_ms / 1000:.1f} s"
        show(f"Position {found.position} of {found.waiting_count}; waited {found.waited_ms / 1000:.1f} s, still to wait: {predicted}.")
        show(f"Refused if it has no turn within {found.deadline_ms / 1000:.0f} s of its arrival.")
        _show_candidates(found.candidates)


def why_not_my_node(
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID", help="From `potluck node status` or `potluck nodes`.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Say why a node gets the requests it gets, and not more. For its owner, and for operators.

    CONSIDERED are placements of the last minutes for which the replica was one of the candidates; what it lost them by stands beside.

    For example: potluck why-not-my-node abcdefghijklmnopqrstuvwxyz
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(explain_calls.explain_node(NodeId(node_id)))
    if as_json:
        show_json(found)
        return
    _show_share(found)


def _show_share(share: NodeShare) -> None:
    if not share.replicas:
        show("The node has no replica: `potluck explain MODEL` says why a model was not put there.")
        return
    show(f"{share.placement_count} requests for its models were placed in the last {share.watched_seconds} s.")
    rows = [
        (
            each.replica_id,
            each.hurdle or "takes requests",
            f"{each.running_count}/{each.slot_count}",
            each.considered_count,
            each.chosen_count,
            "; ".join(f"{count} {reason}" for reason, count in each.losses.items()) or "-",
        )
        for each in share.replicas
    ]
    show_table(("REPLICA", "NOW", "SLOTS", "CONSIDERED", "CHOSEN", "LOST BY"), rows)


def _show_story(story: RequestStory) -> None:
    show(f"{story.request_id}: {story.model_id}, arrived {moment(story.arrived_at_unix_ms)} UTC")
    for step in story.steps:
        place = f" {step.node_id}" if step.node_id else ""
        show(f"{step.elapsed_ms / 1000:9.3f} s  {step.kind}{place}{f': {step.words}' if step.words else ''}")
        _show_candidates(step.candidates)
    if not story.steps:
        say("Nothing has been decided over it yet.")


def _show_candidates(candidates: Sequence[CandidateInfo]) -> None:
    if not candidates:
        return
    rows = [
        (
            f"  {'*' if each.chosen else ' '} {each.node_id or f'{each.replica_count} replicas'}",
            "-" if each.cost_seconds is None else f"{each.cost_seconds:.3f} s",
            ", ".join(f"{name} {seconds:.3f}" for name, seconds in each.terms_seconds.items()) or "-",
            each.reason,
        )
        for each in candidates
    ]
    show_table(("    CANDIDATE", "COST", "MADE OF", "WHY"), rows)


def _show_verdicts(model: str, found: Sequence[NodeVerdict]) -> None:
    of_nodes = [verdict for verdict in found if verdict.node_id]
    show(_summary(model, of_nodes))
    for verdict in found:
        if not verdict.node_id:
            show(f"{verdict.verdict}: {verdict.reason}")
    if of_nodes:
        show("")
        rows = [(verdict.node_id, verdict.display_name, verdict.verdict, verdict.reason) for verdict in of_nodes]
        show_table(("NODE", "NAME", "VERDICT", "REASON"), rows)


def _summary(model: str, verdicts: Sequence[NodeVerdict]) -> str:
    """In one line: how many nodes serve it, and what the others are."""
    if not verdicts:
        return f"{model}: the pool has no node."
    counts = Counter(verdict.verdict for verdict in verdicts)
    serving = counts.pop(SERVES, 0)
    others = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{model}: {serving} of {len(verdicts)} nodes {'serves' if serving == 1 else 'serve'} it{f'; {others}' if others else ''}."
