"""What people are told when something fails: the cause, and a command that shows more of it or mends it."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
import pytest

from potluck.address import API_KEY_VARIABLE
from potluck.commands import session
from potluck_node.enrolment import rpc_failure
from potluck_node.farewell import REPLACED_COUNT_MAX, Farewells, Outcome
from potluck_node.group_offer import own_private_address
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import GoodbyeReason

TARGET = "pool.example:8601"


@pytest.mark.parametrize(
    ("status", "code", "commands"),
    [
        (grpc.StatusCode.UNAVAILABLE, ErrorCode.COORDINATOR_UNAVAILABLE, ("`potluck coordinator serve`",)),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ErrorCode.COORDINATOR_UNAVAILABLE, ("`potluck coordinator serve`",)),
        (grpc.StatusCode.UNAUTHENTICATED, ErrorCode.INVALID_CERTIFICATE, ("`potluck node leave`", "`potluck node join`")),
    ],
)
def test_a_call_that_fails_names_the_coordinator_and_what_to_type(
    status: grpc.StatusCode, code: ErrorCode, commands: tuple[str, ...]
) -> None:
    failure = rpc_failure(grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), "connection refused"), TARGET)
    assert failure.code is code
    assert TARGET in failure.message
    assert all(command in failure.message for command in commands)


def test_a_node_whose_key_another_machine_has_is_told_what_to_do_there() -> None:
    farewells, failure = Farewells(), None
    for _ in range(REPLACED_COUNT_MAX):
        failure = farewells.failure_of(Outcome(goodbye=GoodbyeReason.REPLACED), 0.0)
    assert failure is not None
    assert "`potluck node join`" in failure.message


@pytest.mark.parametrize("named", ["lan", "203.0.113.9", "10.0.0.77"])
def test_a_group_address_that_will_not_do_names_the_command_that_shows_others(named: str) -> None:
    with pytest.raises(PotluckError, match="see `ip address`"):
        own_private_address(named, {"lan": ["203.0.113.9"]})


def test_who_has_no_key_is_told_who_makes_one_and_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(session.DATA_DIR_VARIABLE, str(tmp_path))
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    with pytest.raises(PotluckError, match="`potluck keys create`"):
        session.address("http://pool.example:8600", None)
