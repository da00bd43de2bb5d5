"""llama.cpp stays on the processors that it is planned for, whatever its build would find, and does not keep silent streams alive."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest
import xllamacpp

from potluck_node.engines import llamacpp_server


def test_cards_are_hidden_before_llama_cpp_looks_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for cards asks the driver once, when its devices are first listed."""
    for name in llamacpp_server.CARDS_BY:
        monkeypatch.setenv(name, "0,1")
    seen: dict[str, str] = {}

    def devices() -> list[object]:
        seen.update({name: os.environ[name] for name in llamacpp_server.CARDS_BY})
        raise RuntimeError("seen enough")

    monkeypatch.setattr(xllamacpp, "get_device_info", devices)
    with pytest.raises(RuntimeError, match="seen enough"):
        llamacpp_server.start_engine(Namespace(model=Path("m.gguf"), alias="m", context=64, slots=1))
    assert seen == {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}


def test_a_silent_stream_is_silent() -> None:
    """By default its HTTP thread writes a comment every 30 s, also while the model hangs."""
    assert xllamacpp.CommonParams().sse_ping_interval > 0
    options = Namespace(model=Path("m.gguf"), alias="m", context=64, slots=1)
    assert llamacpp_server.parameters(options, has_gpu=False).sse_ping_interval == -1


@pytest.mark.parametrize(("allowed", "of", "thread_count"), [({3}, 4, 1), ({0, 2}, 8, 2), ({0, 1}, 2, -1)])
def test_it_has_no_more_threads_than_processors_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], of: int, thread_count: int
) -> None:
    """By default it has as many as the machine has cores, and those that share one wait for each other; -1 leaves it to llama.cpp."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: of)
    params = llamacpp_server.parameters(Namespace(model=Path("m.gguf"), alias="m", context=64, slots=1), has_gpu=False)
    assert (params.cpuparams.n_threads, params.cpuparams_batch.n_threads) == (thread_count, thread_count)
