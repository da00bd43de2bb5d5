"""Why an engine failed: read from how its process ended, and from the last lines of its stderr.

Decides the `FailureKind` and which line tells it, by the words that vLLM, SGLang, llama.cpp, PyTorch, CUDA and Linux use for it. Where
several kinds of words are there, the one further up in `_WORDS` counts: a card that ran out of memory also says "CUDA error", and an engine
that could not load its model says so after whatever kept it from that. It must not know processes, nor what is done about a failure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_protocol.values import FailureKind


class Shortage(StrEnum):
    """What an engine that ran out of memory had too little of."""

    TAKEN = "taken"
    """It took more than there is: it must take less."""
    CACHE = "cache"
    """What it may take leaves nothing for the cache of keys and values: it must ask for less beside it, and taking less makes it worse."""
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


MAY_BE_A_REQUESTS_FAULT: Final = frozenset({FailureKind.OUT_OF_MEMORY, FailureKind.CUDA_ERROR, FailureKind.CRASHED, FailureKind.HUNG})
"""Ends of a serving engine that a request can bring about. One that somebody killed, or whose group broke, is nobody's who asked."""

_SHORTAGE_OF_WORDS: Final = {
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
            "libcudart.so",
            "libcuda.so",
        ),
    ),
    (
        FailureKind.OUT_OF_MEMORY,
        (
            *_SHORTAGE_OF_WORDS,
            "less than desired GPU memory utilization",
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

_SOUND_LINE: Final = re.compile(r"(?:^|[\s)\]])(?:DEBUG|INFO)[\s:]")
"""Engines explain settings in such lines, in the words of failures."""
_KILLS: Final = frozenset({"signal SIGKILL", "signal SIGTERM", "signal SIGINT", "signal SIGHUP"})
"""What others send."""
_CRASHES: Final = ("signal ", "exit status 134", "exit status 136", "exit status 139")
"""Signals of a process's own making, the last three as a shell tells them."""


def diagnose(ending: str, lines: Iterable[str], *, served: bool, memory_was_reclaimed: bool = False) -> Diagnosis:
    """What an engine's end means.

    Args:
        ending: how its process ended: "exit status 1", "signal SIGSEGV"; empty: it has not, or ended well.
        lines: the last of its stderr.
        served: it had answered its first request.
        memory_was_reclaimed: while it ran, the kernel killed a process for want of memory.
    """
    told = _told([line for line in lines if not _SOUND_LINE.search(line)])
    if told is not None:
        return told
    if memory_was_reclaimed:
        return Diagnosis(FailureKind.OUT_OF_MEMORY, "the kernel killing for want of memory", shortage=Shortage.TAKEN)
    if ending in _KILLS:
        return Diagnosis(FailureKind.KILLED)
    return Diagnosis(FailureKind.CRASHED if served or ending.startswith(_CRASHES) else FailureKind.NOT_STARTED)


def _told(lines: list[str]) -> Diagnosis | None:
    lowered = [line.lower() for line in lines]
    for kind, all_words in _WORDS:
        for words in all_words:
            # The last such line: what came first may have been mended.
            for line, low in zip(reversed(lines), reversed(lowered), strict=True):
                if words.lower() in low:
                    out_of_memory = kind is FailureKind.OUT_OF_MEMORY
                    return Diagnosis(kind, words, line, _SHORTAGE_OF_WORDS.get(words, Shortage.TAKEN) if out_of_memory else None)
    return None
