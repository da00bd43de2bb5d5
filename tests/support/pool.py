"""A whole pool on this machine, of processes, whose built-in model is a tiny one: real engine, no download."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.tiny_gguf import write_tiny_gguf

MODEL = "smollm2-135m-instruct"
"""The built-in model's name; the entry below wins over the built-in one."""


def write_tiny_catalogue(folder: Path) -> Path:
    """A catalogue file that gives the built-in model's name to a model of half a megabyte, which talks nonsense."""
    model = write_tiny_gguf(folder / "tiny.gguf")
    catalogue = folder / "catalogue.toml"
    catalogue.write_text(f"""
[[model]]
model_id = "{MODEL}"
source = "path:{folder}"
file_name = "{model.name}"
sha256 = "{hashlib.sha256(model.read_bytes()).hexdigest()}"
size_bytes = {model.stat().st_size}
engine_kind = "llamacpp"
context_length_tokens = 512
slot_count = 2
prompt_price_micro_credits = 1
completion_price_micro_credits = 4
licence = "Apache-2.0"
endpoints = ["/v1/chat/completions", "/v1/completions"]
created_at_unix_seconds = 1
""")
    return catalogue


def until(condition: Callable[[], bool], seconds_max: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def marked_processes(mark: str) -> list[psutil.Process]:
    """The live processes that inherited the environment variable POTLUCK_TEST_MARK with this value."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("POTLUCK_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
