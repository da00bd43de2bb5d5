"""The engine kind `sglang`: SGLang out of an environment of its own, for folders of safetensors on cards.

Decides which of SGLang's flags a launch becomes. It must not import SGLang; `foreign_server`, the process that it names, runs the
environment's interpreter. The flags are taken from the documentation of SGLang 0.5 and have not been run: SGLang wants an NVIDIA card and
its own compiled kernels. It forms no groups here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from potluck_node import lifeline
from potluck_node.engines.base import EngineLaunch, EngineProbe, one_token_probe
from potluck_node.engines.environments import installed_version, not_installed
from potluck_protocol.values import Endpoint
from potluck_protocol.vllm_words import shape_variables

BESIDE_STATIC_PERCENT: Final = 10
"""Of a card, for what SGLang does not count as static (activations, CUDA graphs); its own default leaves as much."""
MADE_WHILE_LOADING: Final = frozenset({"fp8"})
"""Quantisations that SGLang makes of unquantised files; those of quantised files it reads from them."""

_PACKAGE: Final = "sglang"


@dataclass(frozen=True, slots=True)
class SglangEngine:
    """See the module.

    Args:
        python: the interpreter of the environment that has SGLang; `environment_of` checks it.
    """

    python: Path
    kind: str = "sglang"
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS)

    @property
    def version(self) -> str:
        return f"sglang {installed_version(self.python, _PACKAGE) or 'of an unknown version'}"

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        told = {name: value for name, value in shape_variables(launch.shape).items() if not name.startswith("VLLM_")}
        cards = (word for name, value in told.items() for word in ("--set", f"{name}={value}"))
        return (
            *("-m", "potluck_node.engines.foreign_server", "--lifeline", "--key-file-word", "api-key", *cards),
            *("--", str(self.python), "-P", lifeline.__file__, "sglang.launch_server", *flags(launch)),
        )

    @property
    def variables(self) -> dict[str, str]:
        return {}

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        return one_token_probe(launch)


def environment_of(python: Path) -> SglangEngine:
    """The engine of an environment; raises PotluckError(INVALID_REQUEST) where there is no SGLang in it."""
    if installed_version(python, _PACKAGE):
        return SglangEngine(python)
    raise not_installed(python, "sglang", "SGLang")


def flags(launch: EngineLaunch) -> tuple[str, ...]:
    """What SGLang is started with; "{port}" and "{key_file}" stand for those of this start.

    Raises:
        ValueError: the launch is one of a group.
    """
    if launch.group is not None or launch.shape.stage_layer_counts:
        raise ValueError("SGLang forms no groups here")
    shape = launch.shape
    static_percent = launch.memory_utilization_percent - BESIDE_STATIC_PERCENT
    return (
        *("--config", "{key_file}", "--model-path", str(launch.model_path), "--served-model-name", launch.model_id),
        *("--host", "127.0.0.1", "--port", "{port}", "--enable-metrics", "--enable-cache-report", "--load-format", "safetensors"),
        *("--context-length", str(launch.context_length_tokens), "--max-running-requests", str(launch.slot_count)),
        *("--mem-fraction-static", f"{static_percent / 100:.2f}"),
        *(("--tp-size", str(shape.tensor_parallel_size)) if shape.tensor_parallel_size > 1 else ()),
        *(("--dtype", "half") if shape.card_facts.half_precision else ()),
        *(("--disable-custom-all-reduce",) if shape.card_facts.without_custom_all_reduce else ()),
        *(("--quantization", shape.quantization) if shape.quantization in MADE_WHILE_LOADING else ()),
    )
