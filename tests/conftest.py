"""What every test starts from, however the tests were started."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from tests.support.postgresql import Cluster, cluster

# A shell without job control starts what runs in the background with Ctrl-C ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# And `nohup` with the terminal's end ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says something of the machine alone; benchmarks measure. CI's own profile has no deadline either.
settings.register_profile("patient", deadline=None)
if settings.get_current_profile_name() == "default":
    settings.load_profile("patient")
# `pytest --hypothesis-profile deep tests/unit tests/property` looks for what a hundred examples a test do not find.
settings.register_profile("deep", max_examples=3000, deadline=None, database=None)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command under test sets its process's logging up, to streams that are closed afterwards, and this process has other tests."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """One server for all tests of this process that need one; each makes databases of its own."""
    with cluster() as started:
        yield started


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of each kind, with the newest schema and nothing in it, or about to get it."""
    yield from _fresh_database(request, tmp_path, empty=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of each kind, without a schema."""
    yield from _fresh_database(request, tmp_path, empty=True)


def _fresh_database(request: pytest.FixtureRequest, tmp_path: Path, *, empty: bool) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'potluck.db'}"
        return
    server: Cluster = request.getfixturevalue("postgresql")
    name = server.new_database(empty=empty)
    yield server.url(name)
    server.drop(name)
