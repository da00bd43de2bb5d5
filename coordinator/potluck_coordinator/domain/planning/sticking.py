"""Replicas that are too many, and replicas that would be much better off elsewhere.

Decides that a satisfied wish is left alone for any gain below `GAIN_MIN`; that a replica which moves goes on answering until the one in its
place does; and that of too many, those leave first that do not answer yet, then the slowest. It must not place what is missing.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, nextafter
from typing import TYPE_CHECKING

from potluck_coordinator.domain.planning.giving_way import give_up_groups, outdoes_a_group
from potluck_coordinator.domain.planning.placing import Site, best_site, put, sites
from potluck_coordinator.domain.planning.settling import retire
from potluck_coordinator.domain.planning.state import draw
from potluck_coordinator.domain.planning.words import GAIN_MIN, HERE_TO_STAY, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_coordinator.domain.planning.words import PlannedReplica


def trim(draft: Draft, deployment: Deployment) -> None:
    """Ends moves that are over, and drops what the wish does not need. Where every node is to have one, only a refused one is too many."""
    if deployment.replica_count is None:
        for replica in draft.of_model(deployment.model_id):
            if replica.phase in HERE_TO_STAY and (trouble := draft.trouble(replica)) is not None and trouble.refused:
                retire(draft, replica)
        return
    model_id = deployment.model_id
    outdone = frozenset(one.replaces for one in draft.of_model(model_id) if one.replaces is not None and draft.is_ready(one))
    _end_moves(draft, deployment)
    counting = draft.counting(model_id)
    give_up_groups(draft, deployment, outdone)
    excess = draft.have_count(model_id) - deployment.replica_count
    for replica in sorted(counting, key=lambda replica: _dispensability(draft, replica))[: max(0, excess)]:
        retire(draft, replica)
    ready_count = draft.have_count(model_id) - sum(1 for replica in draft.counting(model_id) if not draft.is_ready(replica))
    for replica in draft.of_model(model_id):
        useless = replica.phase in HERE_TO_STAY and replica.replaces is None and not draft.counts(replica)
        if useless and ready_count >= deployment.replica_count:
            retire(draft, replica)


def move(draft: Draft, deployment: Deployment) -> None:
    """Begins at most one move: the slowest replica of a satisfied wish, to where it is worth `GAIN_MIN` times as much."""
    replicas = draft.of_model(deployment.model_id)
    at_rest = all(draft.is_ready(replica) and draft.counts(replica) for replica in replicas)
    if deployment.replica_count is None or not replicas or not at_rest or draft.is_short(deployment):
        return
    slowest = min(replicas, key=lambda replica: (draft.score(replica), draw(replica.model_id, replica.node_id)))
    best = best_site(deployment.model_id, _better_sites(draft, deployment, slowest))
    if best is not None:
        put(draft, deployment.model_id, best, replaces=slowest.replica_id)


def is_worth_moving(score: float, new_score: float) -> bool:
    """Whether a satisfied replica may be disturbed for so much."""
    return new_score >= GAIN_MIN * score


def _better_sites(draft: Draft, deployment: Deployment, slowest: PlannedReplica) -> Iterator[Site]:
    score = draft.score(slowest)
    better = (site for site in sites(draft, deployment, nextafter(score, inf)) if is_worth_moving(score, site.sizing.score))
    return (site for site in better if site.is_flawless)


def _end_moves(draft: Draft, deployment: Deployment) -> None:
    for replica in draft.of_model(deployment.model_id):
        if replica.replaces is None or replica.phase not in HERE_TO_STAY:
            continue
        old = draft.replicas.get(replica.replaces)
        if draft.trouble(replica) or draft.is_given_up(replica.node_id):
            retire(draft, replica)
        elif draft.takes_a_groups_place(replica) and not draft.is_ready(replica):
            continue
        elif draft.takes_a_groups_place(replica) and not outdoes_a_group(draft, replica):
            # The group came to answer meanwhile, and more at a time.
            retire(draft, replica)
        elif old is None or old.phase is not Phase.WISHED or not draft.counts(old) or draft.is_ready(replica):
            draft.put(replace(replica, replaces=None))
            if old is not None and old.phase in HERE_TO_STAY and draft.is_ready(replica):
                retire(draft, old)


def _dispensability(draft: Draft, replica: PlannedReplica) -> tuple[bool, float, float, bytes]:
    """Those that go first come first."""
    return draft.is_ready(replica), draft.score(replica), -replica.since_seconds, draw(replica.model_id, replica.node_id)
