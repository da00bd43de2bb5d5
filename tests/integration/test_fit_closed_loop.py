"""What the fit predicts of a cache, against what real llama.cpp says that it made: started as the node starts it, with the fit's flags."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.engines import LLAMACPP, traits_of
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.gguf_metadata import architecture_of_gguf
from potluck_coordinator.domain.fit.hardware import NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.report import ShapeFit
from tests.support.safetensors_model import built_in_gguf
from tests.support.tiny_gguf import write_tiny_gguf

TOLERANCE = 0.1
MIB = 1024**2
LOAD = """
import signal
import sys
from argparse import Namespace
from pathlib import Path
import xllamacpp
from potluck_node.engines.llamacpp_server import parameters
from potluck_node.lifeline import exit_with_parent

exit_with_parent()
model, context, slots = sys.argv[1:]
params = parameters(Namespace(model=Path(model), alias="closed-loop", context=int(context), slots=int(slots)), has_gpu=False)
params.verbosity = 4  # from here on llama.cpp says what it allocates, and no prompts
server = xllamacpp.Server(params)
signal.pause()
"""
LOADED = "model loaded"


def architecture_of_file(path: Path) -> ModelArchitecture:
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    return architecture_of_gguf(
        {key: field.contents() for key, field in reader.fields.items()},
        weight_bytes=sum(int(tensor.n_bytes) for tensor in reader.tensors),
        has_output_table="output.weight" in names,
        model_id=path.stem,
    )


def predicted(architecture: ModelArchitecture, context: int, slots: int) -> ShapeFit:
    node = NodeHardware(processor=NodeProcessor(8 * GIB, 40, 2))
    report = fit(architecture, [node], engine_kind=LLAMACPP, context_length_tokens=context, sequence_count_wanted=slots)
    assert report.best is not None
    return report.best


def told_by_llamacpp(path: Path, found: ShapeFit) -> str:
    said = dict(zip(found.flags.arguments, found.flags.arguments[1:], strict=False))
    words = [sys.executable, "-P", "-c", LOAD, str(path), said["--context"], said["--slots"]]
    lines: list[str] = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                if LOADED in line:
                    break
        finally:
            process.kill()
    return "".join(lines)


def figures(log: str, pattern: str) -> list[float]:
    found = [float(figure) for figure in re.findall(pattern, log)]
    assert found, f"no line like {pattern} in what llama.cpp said:\n{log[-4000:]}"
    return found


@pytest.fixture(scope="module", params=["tiny", "built-in"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "built-in":
        return built_in_gguf()
    return write_tiny_gguf(tmp_path_factory.mktemp("fit") / "tiny.gguf")


@pytest.mark.parametrize(("context", "slots"), [(2048, 1), (1024, 4), (512, 3)])
def test_llamacpp_makes_the_cache_that_was_predicted_and_takes_the_memory_beside_it(model_file: Path, context: int, slots: int) -> None:
    architecture = architecture_of_file(model_file)
    found = predicted(architecture, context, slots)
    (memory,) = found.memory
    log = told_by_llamacpp(model_file, found)
    cache_bytes = MIB * sum(figures(log, r"KV buffer size = +([\d.]+) MiB"))
    (token_count,) = figures(log, r"llama_context: n_ctx += (\d+)")
    assert token_count == context * slots
    assert cache_bytes / found.kv_bytes_per_token == pytest.approx(token_count, rel=TOLERANCE)
    assert memory.kv_wanted_bytes == pytest.approx(cache_bytes, rel=TOLERANCE)
    weights_bytes = MIB * sum(figures(log, r"model buffer size = +([\d.]+) MiB"))
    assert memory.weight_bytes == pytest.approx(weights_bytes, rel=TOLERANCE)
    step_bytes = MIB * sum(figures(log, r"(?:compute|output) buffer size = +([\d.]+) MiB"))
    assert memory.overhead_bytes - traits_of(LLAMACPP).host_process_bytes == pytest.approx(step_bytes, rel=TOLERANCE, abs=MIB)
