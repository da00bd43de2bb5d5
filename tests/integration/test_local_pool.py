"""`potluck up` and `potluck demo` as processes: what they say, that it works, and that nothing outlives them."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pool import marked_processes, until, write_tiny_catalogue

START_SECONDS_MAX = 90.0
STOP_SECONDS_MAX = 30.0
FREE_PORTS = ("--http-port", "0", "--grpc-port", "0", "--link-port", "0")


class Home:
    """A person's machine: folders of its own, and a mark on every process started from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalogue = write_tiny_catalogue(folder)
        self.mark = secrets.token_hex(8)
        bin_folder = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("POTLUCK_")},
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "POTLUCK_TEST_MARK": self.mark,
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }

    def start(self, *arguments: str) -> Running:
        return Running(self, arguments)

    def shell(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def nothing_runs(self) -> bool:
        return until(lambda: not marked_processes(self.mark), STOP_SECONDS_MAX)


class Running:
    """A `potluck` in front."""

    def __init__(self, home: Home, arguments: tuple[str, ...]) -> None:
        self._log = home.folder / f"{secrets.token_hex(4)}.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "potluck", *arguments, "--catalogue", str(home.catalogue)]
            self.process = subprocess.Popen(command, env=home.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> str:
        until(lambda: words in self.said() or self.process.poll() is not None, START_SECONDS_MAX)
        assert words in self.said(), self.said()
        return self.said()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    yield made
    for process in marked_processes(made.mark):
        process.kill()


@pytest.mark.timeout(300)
def test_up_gives_three_things_that_work_and_keeps_its_key_over_a_restart(home: Home):
    up = home.start("up", *FREE_PORTS)
    said = up.wait_for("With the openai package")
    key_file = home.folder / "state" / "potluck" / "up" / "api_key"
    api_key = key_file.read_text().strip()
    assert api_key in said
    assert key_file.stat().st_mode & 0o777 == 0o600
    things = said.partition("Three things to try, in another terminal:")[2]
    export, chat, curl, openai = (part.strip() for part in re.split(r"\d\. With .*:\n", things))
    assert home.shell(f"{export}\n{chat} --max-tokens 8").strip()
    assert json.loads(home.shell(f"{export}\n{curl}"))["usage"]["completion_tokens"] > 0
    assert home.shell(f"{export}\n{openai}").strip()
    assert home.shell(f"{export}\n{chat} --max-tokens 8 --trusted-only").strip(), "its own node is trusted"
    node_id = json.loads(home.shell("potluck nodes --json"))[0]["node_id"]
    home.shell(f"potluck nodes distrust {node_id}")
    home.shell("potluck audit")
    shown = json.loads(home.shell("potluck node status --json"))
    assert (shown["node_id"], shown["running"]) == (node_id, True)
    # The key that is printed is of whoever the node earns for.
    assert home.shell(f"{export}\npotluck why-not-my-node {node_id}").count("takes requests") == 1
    assert json.loads(home.shell(f"{export}\npotluck credits --json"))["account_id"] == shown["owner_account_id"]
    assert "Paused, memory free." in home.shell("potluck node pause 2>&1")

    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_SECONDS_MAX) == 0
    assert "nothing is left running" in up.said()
    assert home.nothing_runs()

    again = home.start("up", *FREE_PORTS)
    again.wait_for("The node is paused: `potluck node resume`")
    assert "of `potluck up`" in home.shell("potluck node resume 2>&1")
    assert api_key in again.wait_for("With the openai package")
    kept = [(node["node_id"], node["trusted"]) for node in json.loads(home.shell("potluck nodes --json"))]
    assert kept == [(node_id, False)], "and what its operator said since stands"
    again.process.send_signal(signal.SIGKILL)
    assert home.nothing_runs(), marked_processes(home.mark)


@pytest.mark.timeout(300)
def test_up_stops_all_of_it_when_a_part_dies(home: Home):
    up = home.start("up", *FREE_PORTS)
    up.wait_for("With the openai package")
    coordinator = json.loads((home.folder / "state" / "potluck" / "up" / "coordinator" / "endpoints.json").read_text())["pid"]
    os.kill(coordinator, signal.SIGKILL)
    assert up.process.wait(STOP_SECONDS_MAX) == 1
    assert "The coordinator ended by itself" in up.said()
    assert home.nothing_runs(), marked_processes(home.mark)


def test_up_names_a_port_that_is_taken(home: Home):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        up = home.start("up", "--http-port", str(taken.getsockname()[1]), "--grpc-port", "0", "--link-port", "0")
        assert up.process.wait(START_SECONDS_MAX) == 1
    assert "--http-port" in up.said()
    assert home.nothing_runs()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("phase", "ending"), [("Starting the coordinator", signal.SIGTERM), ("Starting the node", signal.SIGINT)])
def test_a_demo_that_is_broken_off_early_leaves_nothing(home: Home, phase: str, ending: signal.Signals):
    home.environment["TMPDIR"] = str(home.folder / "tmp")
    (home.folder / "tmp").mkdir()
    demo = home.start("demo")
    demo.wait_for(phase)
    demo.process.send_signal(ending)
    assert demo.process.wait(STOP_SECONDS_MAX) == 130
    assert "nothing is left running" in demo.said()
    assert "Traceback" not in demo.said()
    assert home.nothing_runs(), marked_processes(home.mark)
    assert list((home.folder / "tmp").glob("potluck*")) == []


@pytest.mark.timeout(480)
def test_make_demo_asks_the_built_in_model_pays_audits_and_leaves_nothing(home: Home):
    """With the real catalogue, source, hash and model, which is fetched if this machine does not keep it yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(__file__).parents[2]
    environment = home.environment | {"XDG_CACHE_HOME": cache}
    done = subprocess.run(["make", "--silent", "demo"], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    question, answer = re.search(r"^> (.+)\n(.+?)\n\nnode ", done.stdout, re.MULTILINE | re.DOTALL).groups()
    assert question.endswith("Answer in two sentences.")
    # What a random model of the same form says is no English.
    assert len({"food", "people", "share", "sharing", "and", "to", "a"} & set(re.findall(r"[a-z]+", answer.lower()))) >= 3
    assert re.search(r"node    local \([a-z2-7]{26}\), smollm2-135m-instruct", done.stdout)
    assert re.search(r"speed   [\d.]+ tokens/s", done.stdout)
    cost, earned = (float(re.search(rf"{word}\s+([\d.]+) credits", done.stdout)[1]) for word in ("cost", "earned"))
    assert 0 < earned <= cost
    assert "by operator, the node's owner" in done.stdout
    assert "audit   the books balance" in done.stdout
    assert home.nothing_runs()
    assert not (home.folder / "state").exists()


def test_make_test_is_these_tests():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    side_by_side = "--numprocesses 4 --dist loadfile --no-loadscope-reorder"
    assert recipe.splitlines() == [f"\t$(BIN)/pytest -m 'not timed' {side_by_side}", "\t$(BIN)/pytest -m timed"]
