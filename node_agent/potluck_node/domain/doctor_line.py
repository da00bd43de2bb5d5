"""Checks of what the line to the coordinator carries, either way.

Decides which rates are too slow, and says a rate by what it means: answers that are sent at once, and how long a model takes to arrive.
"""

from __future__ import annotations

from typing import Final

from potluck_node.domain.findings import Examination, Finding, Level
from potluck_node.domain.hardware import Network

TOKEN_BYTES: Final = 250
"""Of a streamed answer, which travels as the engine wrote it: llama.cpp's events of a chat, of one token each, had 252 on average."""
STREAM_TOKENS_PER_SECOND: Final = 50
"""Of one answer, in round numbers: several times as fast as people read."""
STREAM_BYTES_PER_SECOND: Final = TOKEN_BYTES * STREAM_TOKENS_PER_SECOND
STREAMS_WARN: Final = 8
"""The most slots that an entry of the shipped catalogue has: with fewer answers than that on the line, its card waits for it."""
MODEL_BYTES: Final = 20 * 10**9
"""A 32B model at four bits."""
FETCH_WARN_SECONDS: Final = 12 * 3600
"""A night, and some."""


def check_line(examination: Examination) -> tuple[Finding, ...]:
    """A line for each way, or one for both where neither was measured; nothing before the node has joined."""
    network = examination.network
    if network is None:
        return ()
    upload, download = network.upload_bytes_per_second, network.download_bytes_per_second
    why = network.rate_failure.rstrip(".") or "nothing was said of it"
    if upload is None and download is None:
        return (Finding(Level.OK, "line", f"its rates were not measured: {why}"),)
    return (
        Finding(Level.OK, "upload", f"not measured: {why}") if upload is None else _upload(upload, _age(network)),
        Finding(Level.OK, "download", f"not measured: {why}") if download is None else _download(download, _age(network)),
    )


def _upload(bytes_per_second: int, age: str) -> Finding:
    count = bytes_per_second // STREAM_BYTES_PER_SECOND
    answers = "not even 1 answer" if count == 0 else "1 answer" if count == 1 else f"{count} answers"
    what = f"{_mbit(bytes_per_second)}{age}: carries {answers} of {STREAM_TOKENS_PER_SECOND} tokens a second at once"
    if count >= STREAMS_WARN:
        return Finding(Level.OK, "upload", what)
    fix = f"set slot_count_max = {max(1, count)} in node.toml, or look for what else sends on this line"
    return Finding(Level.WARN, "upload", what, fix)


def _download(bytes_per_second: int, age: str) -> Finding:
    seconds = MODEL_BYTES / bytes_per_second
    what = f"{_mbit(bytes_per_second)}{age}: a model of {MODEL_BYTES // 10**9} GB would take {_time(seconds)}"
    if seconds <= FETCH_WARN_SECONDS:
        return Finding(Level.OK, "download", what)
    fix = "name small models in models_allowed in node.toml; if other downloads are quick here, the coordinator's own line is the slow one"
    return Finding(Level.WARN, "download", what, fix)


def _age(network: Network) -> str:
    """Said only of rates that could not be measured anew."""
    age_seconds = network.rate_age_seconds
    return f" {_time(age_seconds)} ago" if network.rate_failure and age_seconds is not None else ""


def _mbit(bytes_per_second: int) -> str:
    mbit_per_second = bytes_per_second * 8 / 1e6
    return f"{mbit_per_second:.1f} Mbit/s" if mbit_per_second < 100 else f"{mbit_per_second:.0f} Mbit/s"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.0f} h"
