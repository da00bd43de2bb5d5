"""The engines that stand behind bare routers in the overload benchmark: each death is counted, and each is started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request

from tests.benchmarks.contenders import wait_until_answers, write_script
from tests.benchmarks.overload_contenders import SCRIPT, DeathWatch, is_engine, start_engine
from tests.benchmarks.processes import descendants, title


def engine_of(contender) -> int:
    (root,) = (child.process_id for child in contender.children)
    (engine,) = (process_id for process_id in descendants(root) if is_engine(title(process_id)))
    return engine


def test_deaths_are_counted_and_the_engine_comes_back(tmp_path):
    contender = start_engine(tmp_path, write_script(tmp_path, {**SCRIPT, "load_ms": 100}), 0)
    try:
        wait_until_answers(contender)
        watch = DeathWatch(contender)
        with watch.watching():
            pass
        assert watch.count == 0
        with watch.watching():
            first = engine_of(contender)
            os.kill(first, signal.SIGKILL)
            time.sleep(1)
            wait_until_answers(contender)
            assert engine_of(contender) != first
        assert watch.count == 1
    finally:
        contender.stop()
    assert not title(first)


def test_an_engine_that_is_given_too_much_dies_and_is_counted(tmp_path):
    cost = {**SCRIPT["cost"], "waiting_tokens_max": 100}
    contender = start_engine(tmp_path, write_script(tmp_path, {**SCRIPT, "load_ms": 100, "cost": cost}), 0)
    try:
        wait_until_answers(contender)
        watch = DeathWatch(contender)
        body = json.dumps({"messages": [{"role": "user", "content": "word " * 200}]}).encode()
        with watch.watching():
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(urllib.request.Request(f"{contender.url}/v1/chat/completions", body), timeout=5).close()
            time.sleep(1)
        assert watch.count == 1
        assert "the machine's memory is full" in contender.children[0].log_tail()
        wait_until_answers(contender)
    finally:
        contender.stop()
