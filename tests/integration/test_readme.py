"""Every command and snippet of the README, run in the order a reader meets them, on a pool that they themselves start."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck import Client, PoolError
from potluck.commands.session import read_operator
from potluck_node.control import read_status
from potluck_protocol.errors import CATALOGUE
from potluck_protocol.values import EngineState, NodeState
from tests.support.pool import marked_processes, until, write_tiny_catalogue
from tests.support.readme import Block, blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DEFAULT_URL = "http://127.0.0.1:8600"
READY_SECONDS_MAX = 90.0
CONTROL_READ_SECONDS = 0.1
"""The agent reads what its owner wants and writes what there is to see at one go, in less than this."""
BLOCK_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0


class Reader:
    """Someone who types the README into a shell."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.mark = secrets.token_hex(8)
        self._background: list[subprocess.Popen[bytes]] = []
        self._data_folder = folder / "state" / "potluck" / "coordinator"
        self._node_folder = folder / "state" / "potluck" / "node"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("POTLUCK_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "POTLUCK_TEST_MARK": self.mark,
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "POTLUCK_COORDINATOR_CATALOGUE_FILE": str(write_tiny_catalogue(folder)),
            **{f"POTLUCK_COORDINATOR_{port}_PORT": "0" for port in ("HTTP", "GRPC", "LINK")},
        }

    def follow(self, block: Block) -> None:
        """Does what the block's mark asks for."""
        if block.mark.startswith("run in the background: "):
            self._start(block)
            return
        if block.mark == "run when a model is ready":
            assert until(lambda: self._node_has_obeyed() and self._ready(), READY_SECONDS_MAX), self._logs()
        script = self._folder / f"block.{block.language}"
        text = block.text.replace(DEFAULT_URL, self._operator_url())
        # Warnings, such as of a disk that is half full, are about the machine that the test runs on.
        text = text.replace("potluck node doctor\n", "potluck node doctor || [ $? = 1 ]\n")
        if block.language == "sh":
            # What the block exported counts for the next ones.
            text += f"\nenv -0 > {self._folder}/environment\n"
        script.write_text(text)
        program = ["bash", "-euo", "pipefail"] if block.language == "sh" else [sys.executable]
        done = subprocess.run(
            [*program, str(script)],
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=BLOCK_SECONDS_MAX,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}\n{self._logs()}"
        assert done.stdout.strip() or ">" in block.text or "export" in block.text, f"it printed nothing:\n{block.text}"
        if block.language == "sh":
            pairs = (self._folder / "environment").read_text().rstrip("\0").split("\0")
            self._environment = dict(pair.split("=", 1) for pair in pairs)

    def stop(self) -> None:
        for process in reversed(self._background):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(STOP_SECONDS_MAX)

    def _start(self, block: Block) -> None:
        name = block.mark.rpartition(" ")[2]
        with (self._folder / f"{name}.log").open("wb") as log:
            command = ["bash", "-c", f"exec {block.text.strip()}"]
            process = subprocess.Popen(command, env=self._environment, cwd=self._folder, stdout=log, stderr=log, start_new_session=True)
        self._background.append(process)
        if name == "coordinator":
            assert until((self._data_folder / "endpoints.json").is_file, READY_SECONDS_MAX), self._logs()

    def _operator_url(self) -> str:
        return read_operator(self._data_folder).url

    def _node_has_obeyed(self) -> bool:
        """A node that was just told to pause, and to go on, looks ready until it has read that."""
        told = self._node_folder / "control.json"
        told_at_seconds = told.stat().st_mtime if told.exists() else 0.0
        status = read_status(self._node_folder)
        return (
            status is not None
            and status.updated_at_unix_ms / 1000 > told_at_seconds + CONTROL_READ_SECONDS
            and status.state == NodeState.SERVING
            and [engine.state for engine in status.engines] == [EngineState.READY]
        )

    def _ready(self) -> bool:
        operator = read_operator(self._data_folder)
        with Client(operator.url, operator.api_key) as client:
            try:
                return any(model.ready_replica_count for model in client.models())
            except PoolError:
                return False

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self._folder.glob("*.log"))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path)
    try:
        yield made
        made.stop()
        assert until(lambda: not marked_processes(made.mark), STOP_SECONDS_MAX), marked_processes(made.mark)
    finally:
        for process in marked_processes(made.mark):
            process.kill()


@pytest.mark.timeout(300)
def test_every_block_of_the_readme_runs(reader: Reader):
    run = [block for block in blocks(README) if block.mark.startswith("run")]
    assert len(run) >= 9
    for block in run:
        reader.follow(block)


def test_every_block_of_the_readme_is_run_by_some_test():
    for block in blocks(README):
        if block.language == "text":
            continue
        if block.mark.startswith("tested by "):
            test = ROOT / block.mark.removeprefix("tested by ")
            assert test.is_file()
        else:
            assert re.fullmatch(r"run( when a model is ready| in the background: (coordinator|node))?", block.mark), block


def test_every_command_in_the_readmes_prose_exists():
    prose = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = {tuple(words.split()) for words in re.findall(r"`potluck ([a-z]+(?:[ -][a-z]+)*)[^`]*`", prose)}
    assert len(commands) >= 5
    for words in sorted(commands):
        command = [sys.executable, "-m", "potluck", *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout.startswith(f"Usage: python -m potluck {' '.join(words)} "), done.stdout[:200]


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


def test_the_sdks_page_lists_every_error_as_it_is():
    from potluck.errors import CLASS_OF_CODE

    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes)? ?\|$", (ROOT / "docs" / "sdk.md").read_text(), re.MULTILINE)
    expected = [(CLASS_OF_CODE[code].__name__, str(code), "yes" if spec.retry_is_safe else "") for code, spec in CATALOGUE.items()]
    assert rows == expected
