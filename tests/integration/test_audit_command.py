"""`potluck audit`: it waits for the whole of it, and its exit code says whether the books balance."""

from __future__ import annotations

import json

from tests.support.scripted_pool import API_KEY, scripted_pool
from tests.support.terminal import lonely_terminal


def test_an_audit_is_waited_for_and_fails_with_findings(monkeypatch, capsys, tmp_path):
    terminal = lonely_terminal(monkeypatch, capsys, tmp_path)
    with scripted_pool(tmp_path) as pool:
        monkeypatch.setenv("POTLUCK_URL", pool.url)
        monkeypatch.setenv("POTLUCK_API_KEY", API_KEY)
        assert terminal.run("audit") == 1
        assert "FINDING  acct_a: balance 3, postings 2" in terminal.out
        pool.unary_calls.clear()
        pool.audit_pauses = 3
        assert terminal.run("audit", "--json") == 1
        assert json.loads(terminal.out)["findings"] == ["acct_a: balance 3, postings 2"]
        assert pool.unary_calls == ["AuditLedger"] * 4
