"""Why an engine failed: read from how its process ended, and from the last lines of its stderr.

Decides the `FailureKind` and which line tells it, by the words that vLLM, SGLang, llama.cpp, PyTorch, CUDA and Linux use for it. Where
several kinds of words are there, the one further up in `_WORDS` counts: a card that ran out of memory also says "CUDA error", and an engine
that could not load its model says so after whatever kept it from that. What is only a warning was survived: it counts where no other line
has such words and the process's end says nothing. It must not know processes, nor what is done about a failure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Final

from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_protocol.values import FailureKind


class Shortage(StrEnum):
    """What an engine that ran out of memory had too little of."""

    TAKEN = "taken"
    """It took more than there is: it must take less."""
    CACHE = "cache"
    """What it may take leaves nothing for the cache of keys and values: it must ask for less beside it, and taking less makes it worse."""
    OTHERS = "others"
    """Others hold so much of the card that less was free than it was told to take: the model is not to blame."""
    SEQUENCE = "sequence"
    """The whole cache does not hold one sequence of its context: fewer at a time make no difference."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an engine's end means."""

    kind: FailureKind
    words: str = ""
    """Of the list here: never the engine's own, so safe to tell even if the engine quotes requests."""
    line: str = ""
    """The engine's line that has these words; once it serves, it may quote requests."""
    shortage: Shortage | None = None
    """With OUT_OF_MEMORY."""
    free_percent: int | None = None
    """Of the fullest card, where others hold the rest and the engine says how much that is."""


_DYING_WORDS: Final = (b"EngineCore encountered an issue", b"EngineDeadError")
"""In what vLLM answers when the process that holds its model is gone, before the one that answers ends as well."""

_MAY_BE_A_REQUESTS_FAULT: Final = frozenset({FailureKind.OUT_OF_MEMORY, FailureKind.CUDA_ERROR, FailureKind.CRASHED, FailureKind.HUNG})

_SHORTAGE_OF_WORDS: Final = {
    "less than desired GPU memory utilization": Shortage.OTHERS,
    "larger than the available KV cache": Shortage.SEQUENCE,
    "Cannot auto-fit max_model_len": Shortage.SEQUENCE,
    "No available memory for the cache blocks": Shortage.CACHE,
    "try to increase --mem-fraction-static": Shortage.CACHE,
    "Not enough memory to allocate KV cache": Shortage.CACHE,
}

_WORDS: Final[tuple[tuple[FailureKind, tuple[str, ...]], ...]] = (
    (
        FailureKind.UNSUPPORTED_CUDA_VERSION,
        (
            "NVIDIA driver on your system is too old",
            "driver version is insufficient",
            "unsupported toolchain",
            "no kernel image is available",
            "device kernel image is invalid",
            "unsupported display driver / cuda driver combination",
            "forward compatibility was attempted",
            # Not the bare names: they stand in every backtrace.
            "libcudart.so … cannot open",
            "libcuda.so … cannot open",
            "libcuda.so cannot found",
        ),
    ),
    (
        FailureKind.OUT_OF_MEMORY,
        (
            *_SHORTAGE_OF_WORDS,
            "less than desired CPU memory utilization",
            "less than requested memory for kv",
            "out of memory",
            "OutOfMemoryError",
            "OutOfDeviceMemory",
            "OutOfHostMemory",
            "not enough GPU memory",
            "Not enough memory",
            "insufficient memory",
            "can't allocate memory",
            "Cannot allocate memory",
            "unable to allocate",
            "failed to allocate",
            "ALLOC_FAILED",
            "bad_alloc",
            "MemoryError",
        ),
    ),
    # `foreign_server`'s words, and gloo's where vLLM notices first; NCCL then speaks of errors of its own.
    (FailureKind.GROUP_BROKEN, ("the group is broken", "caused by a remote worker hanging")),
    (FailureKind.PORT_TAKEN, ("Address already in use", "EADDRINUSE", "couldn't bind HTTP server socket")),
    (
        FailureKind.UNSUPPORTED_ARCHITECTURE,
        (
            "unknown model architecture",
            "unknown pre-tokenizer type",
            "are not supported for now",
            "failed to be inspected",
            "does not recognize this architecture",
            "not supported for the current GPU",
            "Unknown quantization method",
        ),
    ),
    (
        FailureKind.CUDA_ERROR,
        (
            "CUDA error",
            "cudaError",
            "CUDA failure",
            "No CUDA GPUs are available",
            "CUBLAS_STATUS",
            "CUDNN_STATUS",
            "NCCL error",
            "device-side assert",
            "uncorrectable ECC",
            "GPU is lost",
            "fallen off the bus",
            "ROCm error",
        ),
    ),
    (
        FailureKind.BAD_MODEL,
        (
            "deserializing header",
            "SafetensorError",
            "invalid magic",
            "bad GGUF",
            "not within the file bounds",
            "corrupted or incomplete",
            "corrupted model",
            "wrong number of tensors",
            "missing tensor",
            "size mismatch for",
            "Cannot find any model weights",
            "failed to load GGUF",
            "error loading model",
            "failed to load model",
        ),
    ),
    (FailureKind.HUNG, ("says nothing any more",)),
    # Its owner ended it: no request is to blame.
    (FailureKind.KILLED, ("the attached server went away",)),
    (FailureKind.CRASHED, ("GGML_ASSERT", "Segmentation fault", "No space left")),
)

_FREE: Final = re.compile(r"\((?P<free>\d+(?:\.\d+)?)/(?P<total>\d+(?:\.\d+)?) GiB\) on startup is less than desired GPU memory")
_ROUNDING_GIB: Final = 0.005
_BETWEEN: Final = " … "
"""In words that stand apart from each other in the line, in this order."""
_LEVEL: Final = re.compile(
    r"(?:^|[\s)\]])(?:(?P<sound>DEBUG|INFO)|(?P<warning>WARNING|WARN|[Ww]arning:|[A-Za-z]*Warning(?=:))|ERROR|CRITICAL|FATAL)(?:[\s:]|$)"
)
"""A line's first. In the sound ones engines explain settings, in the words of failures. Tracebacks and llama.cpp's lines have none."""
_KILLS: Final = frozenset({"signal SIGKILL", "signal SIGTERM", "signal SIGINT", "signal SIGHUP"})
"""What others send."""
_CRASHES: Final = ("signal ", "exit status 134", "exit status 136", "exit status 139")
"""Signals of a process's own making, the last three as a shell tells them."""


def may_be_a_requests_fault(kind: FailureKind, engine_kind: str) -> bool:
    """Whether a request can have brought a serving engine to such an end.

    One that somebody killed, or whose group broke, is nobody's who asked. Of a server that its owner runs only the door is seen from here:
    what it had to do for him, and what became of it, nobody can tell.
    """
    return kind in _MAY_BE_A_REQUESTS_FAULT and engine_kind != ATTACHED_KIND


def says_that_it_dies(http_status: int, answer: bytes) -> bool:
    """Whether an engine answers, with an error's status or in an error's event, that it is about to end."""
    is_error = http_status >= HTTPStatus.INTERNAL_SERVER_ERROR or b'data: {"error"' in answer
    return is_error and any(words in answer for words in _DYING_WORDS)


def diagnose(ending: str, lines: Iterable[str], *, served: bool, memory_was_reclaimed: bool = False) -> Diagnosis:
    """What an engine's end means.

    Args:
        ending: how its process ended: "exit status 1", "signal SIGSEGV"; empty: it has not, or ended well.
        lines: the last of its stderr.
        served: it had answered its first request.
        memory_was_reclaimed: just before, the kernel killed a process for want of memory that may have been one of its own.
    """
    grave, warnings = _by_level(lines)
    told = _told(grave)
    if told is not None:
        return told
    if memory_was_reclaimed:
        return Diagnosis(FailureKind.OUT_OF_MEMORY, "the kernel killing for want of memory", shortage=Shortage.TAKEN)
    if ending in _KILLS:
        return Diagnosis(FailureKind.KILLED)
    if served or ending.startswith(_CRASHES):
        return Diagnosis(FailureKind.CRASHED)
    return _told(warnings) or Diagnosis(FailureKind.NOT_STARTED)


def _by_level(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of failures, and the warnings."""
    grave: list[str] = []
    warnings: list[str] = []
    for line in lines:
        level = _LEVEL.search(line)
        if level is None or not (level["sound"] or level["warning"]):
            grave.append(line)
        elif level["warning"]:
            warnings.append(line)
    return grave, warnings


def _told(lines: list[str]) -> Diagnosis | None:
    lowered = [line.lower() for line in lines]
    for kind, all_words in _WORDS:
        for words in all_words:
            # The last such line: what came first may have been mended.
            for line, low in zip(reversed(lines), reversed(lowered), strict=True):
                if _has(low, words):
                    if kind is not FailureKind.OUT_OF_MEMORY:
                        return Diagnosis(kind, words, line)
                    shortage = _SHORTAGE_OF_WORDS.get(words, Shortage.TAKEN)
                    return Diagnosis(kind, words, line, shortage, _free_percent(lines) if shortage is Shortage.OTHERS else None)
    return None


def _has(lowered_line: str, words: str) -> bool:
    at = 0
    for part in words.lower().split(_BETWEEN):
        at = lowered_line.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def _free_percent(lines: list[str]) -> int | None:
    """Rounded down, so that it is there. Several workers each tell of their own card."""
    told = [match for line in lines if (match := _FREE.search(line)) and float(match["total"]) > 0]
    return min((max(0, int(100 * (float(match["free"]) - _ROUNDING_GIB) / float(match["total"]))) for match in told), default=None)
