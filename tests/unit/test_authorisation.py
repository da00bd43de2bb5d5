from __future__ import annotations

import pytest

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.gateway import authorisation
from potluck_coordinator.gateway.authorisation import (
    RPC_AUDIENCE,
    Audience,
    account_for,
    check_table,
    contract_methods,
    require,
    require_node,
)
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, KeyPrefix

USER = KeyIdentity(KeyPrefix("userpref"), AccountId("acct_user"), operator=False, expires_at_unix_ms=0)
OPERATOR = KeyIdentity(KeyPrefix("operpref"), AccountId("acct_operator"), operator=True, expires_at_unix_ms=0)


def test_every_method_of_the_contract_has_exactly_one_row() -> None:
    check_table()
    assert len(contract_methods()) == len(RPC_AUDIENCE) > 10


def test_a_new_method_without_a_row_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dict(RPC_AUDIENCE)
    del rows["/potluck_protocol.v1.PoolService/RevokeNode"]
    monkeypatch.setattr(authorisation, "RPC_AUDIENCE", rows)
    with pytest.raises(RuntimeError, match="RevokeNode"):
        check_table()


def test_a_row_without_a_method_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authorisation, "RPC_AUDIENCE", RPC_AUDIENCE | {"/potluck_protocol.v1.PoolService/Gone": Audience.USER})
    with pytest.raises(RuntimeError, match="Gone"):
        check_table()


@pytest.mark.parametrize(
    ("identity", "audience", "passes"),
    [
        (USER, Audience.ANYONE, True),
        (USER, Audience.USER, True),
        (USER, Audience.OPERATOR, False),
        (USER, Audience.NODE, False),
        (OPERATOR, Audience.USER, True),
        (OPERATOR, Audience.OPERATOR, True),
        (OPERATOR, Audience.NODE, False),
    ],
)
def test_who_passes(identity: KeyIdentity, audience: Audience, *, passes: bool) -> None:
    if passes:
        require(identity, audience)
        return
    with pytest.raises(PotluckError) as caught:
        require(identity, audience)
    assert caught.value.code is ErrorCode.PERMISSION_DENIED


def test_whose_account() -> None:
    assert account_for(USER, "") == account_for(USER, "acct_user") == "acct_user"
    assert account_for(OPERATOR, "") == "acct_operator"
    assert account_for(OPERATOR, "acct_user") == "acct_user"
    with pytest.raises(PotluckError) as caught:
        account_for(USER, "acct_operator")
    assert caught.value.code is ErrorCode.PERMISSION_DENIED


def test_a_node_passes_while_the_books_have_it_and_nobody_put_it_out() -> None:
    require_node(None, is_enrolled=True)
    for reason, is_enrolled in ((None, False), ("", False), ("", True), ("wrong answers", True)):
        with pytest.raises(PotluckError, match=reason or "no longer part") as caught:
            require_node(reason, is_enrolled=is_enrolled)
        assert caught.value.code is ErrorCode.INVALID_CERTIFICATE
