"""What `docs/database.md` tells an operator to type, typed, with a server of the test's own in the place of db.example."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.books import open_books
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.postgresql import Cluster, cluster, program
from tests.support.readme import blocks

PAGE = Path(__file__).parents[2] / "docs" / "database.md"
PASSWORD = "f00d:with a colon"
"""Which has to be escaped in the file of passwords."""


class Operator:
    def __init__(self, folder: Path, server: Cluster) -> None:
        self.server = server
        self.folder = folder
        self.texts = [block.text for block in blocks(PAGE) if block.mark == "tested by tests/integration/test_database_documentation.py"]
        self.environment = {
            **os.environ,
            "PATH": f"{Path(program('psql')).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PGPASSFILE": str(folder / ".pgpass"),
        }

    def words(self, text: str) -> str:
        escaped = PASSWORD.replace(":", "\\:")
        here = text.replace("db.example:5432", f"127.0.0.1:{self.server.port}").replace("host=db.example port=5432", self._address)
        return here.replace("THE-PASSWORD", escaped)

    @property
    def _address(self) -> str:
        return f"host=127.0.0.1 port={self.server.port}"

    def type(self, text: str, *, typed: str = "", as_administrator: bool = False) -> None:
        administrator = {
            "PGHOST": str(self.server.folder),
            "PGPORT": str(self.server.port),
            "PGUSER": self.server.user,
            "PGDATABASE": "postgres",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.words(text)],
            input=typed,
            text=True,
            capture_output=True,
            cwd=self.folder,
            env={**self.environment, **(administrator if as_administrator else {})},
            # Without a terminal, passwords are read from standard input.
            start_new_session=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(240)
def test_a_pool_on_postgresql_by_the_page(tmp_path, monkeypatch):
    with cluster() as server:
        operator = Operator(tmp_path, server)
        make, password_file, serve, dump, restore = operator.texts
        operator.type(make, typed=f"{PASSWORD}\n{PASSWORD}\n", as_administrator=True)
        operator.type(password_file)
        monkeypatch.setenv("PGPASSFILE", str(tmp_path / ".pgpass"))
        command, _, url = operator.words(serve).strip().rpartition(" ")
        assert command == "potluck coordinator serve --database-url"
        with CoordinatorProcess(tmp_path / "first", "--database-url", url) as first:
            first.wait_ready()
            with CoordinatorProcess(tmp_path / "second", "--database-url", url) as second:
                assert second.process.wait(60) == 1
            said = " ".join(second.log().split())
            assert f"error: Another coordinator (potluck coordinator, process {directory_of(first)} on " in said
            assert "has the database potluck; stop it first" in said
            operator.type(dump)
            written = first.log() + second.log()
        with open_books(url) as books:
            kept = books.audit_now()
            assert (kept.findings, kept.account_count) == ((), 4)
        operator.type("createdb --owner potluck --encoding UTF8 --template template0 restored", as_administrator=True)
        # The whole cluster has one file of passwords; the restored database has the same role.
        operator.type("sed -i 's/:potluck:potluck:/:*:potluck:/' ~/.pgpass")
        operator.type(restore)
        with open_books(f"{url.rpartition('/')[0]}/restored") as books:
            assert books.audit_now() == kept
        assert PASSWORD not in written


def directory_of(coordinator: CoordinatorProcess) -> int:
    return coordinator.actor("DirectoryActor").pid


def test_a_password_on_the_command_line_is_refused_before_anything_is_made(tmp_path):
    with CoordinatorProcess(tmp_path / "data", "--database-url", "postgresql+psycopg://potluck:s3cret@127.0.0.1:1/potluck") as refused:
        assert refused.process.wait(60) == 2
    assert "pgpass" in refused.log()
    assert "s3cret" not in refused.log()
    assert not (tmp_path / "data").exists()
