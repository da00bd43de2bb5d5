"""A grammar or schema that would keep llama.cpp busy for ever never comes to it, and others are answered meanwhile."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tests.support.pool_processes import LLAMACPP_MODEL, running_pool

ANSWER_SECONDS_MAX = 15.0
"""Half of what an engine may be silent before it is ended."""
LEVELS = "\n".join(f"r{level} ::= r{level + 1} r{level + 1} | r{level + 1}" for level in range(22))
NODE = {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}
ALIKE = {"$defs": {"n": {"anyOf": [NODE, {**NODE, "description": "as the other"}]}}, "$ref": "#/$defs/n"}
BOMBS = [
    {"grammar": f'root ::= r0\n{LEVELS}\nr22 ::= "a" | ""'},
    {"grammar": 'root ::= "a" root "b" | "a" root "c"'},
    {"grammar": 'root ::= "a"{5,2}'},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "tree", "schema": ALIKE}}},
]
LARGEST = [
    {"grammar": "root ::= " + '"a"? ' * 11 + '"!"'},
    {"grammar": "root ::= [a-z]{0,150} [a-z]{0,150}"},
]
"""Near the bounds, and let through."""


def ask(pool, **fields):
    """The status, and how long it took."""
    body = {"model": LLAMACPP_MODEL, "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8, **fields}
    request = urllib.request.Request(
        f"{pool.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {pool.api_key}", "content-type": "application/json"},
    )
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return response.status, time.monotonic() - began
    except urllib.error.HTTPError as error:
        return error.code, time.monotonic() - began


def test_bombs_are_refused_and_the_engine_answers_on(tmp_path):
    with running_pool(tmp_path, 1, with_llamacpp=True) as pool, ThreadPoolExecutor(8) as threads:
        bombs = [threads.submit(ask, pool, **bomb) for bomb in BOMBS * 3]
        others = [threads.submit(ask, pool, **fields) for fields in [{}, *LARGEST]]
        assert {bomb.result()[0] for bomb in bombs} == {400}
        for other in others:
            status, seconds = other.result()
            assert (status, seconds < ANSWER_SECONDS_MAX) == (200, True)
