"""The engine kind `vllm`: vLLM out of an environment of its own, for folders of safetensors.

Decides which of vLLM's flags and variables a launch becomes. It must not import vLLM; `foreign_server`, the process that it names, runs the
environment's interpreter with `vllm_inside`. Names are those of vLLM 0.32, which the tests run on processors; with cards it has not been
run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from potluck_node.engines.base import EngineLaunch, EngineProbe, one_token_probe
from potluck_node.engines.environments import installed_version, not_installed
from potluck_protocol.values import Endpoint, GroupPlace

FIRST_UTILIZATION_PERCENT: Final = 95
"""What a launch starts from. Without cards, steps below it take their share from the cache."""
PROCESSOR_CACHE_BYTES: Final = 1024**3
"""For keys and values without cards, where the launch does not say: vLLM's own choice is nearly all of the machine's memory."""
STOPPING_SECONDS: Final = 1
"""For vLLM's own workers; what is left after it is killed. Its five would use up all the time that an engine has to stop."""
MADE_WHILE_LOADING: Final = frozenset({"fp8", "fp8_per_tensor", "fp8_per_block", "int8_per_channel_weight_only", "mxfp8"})
"""Quantisations that vLLM makes of unquantised files. Those of quantised files (AWQ, GPTQ, …) it reads from them, and picks the fastest
kernel by itself; named, it would keep to that kernel."""

_INSIDE: Final = Path(__file__).with_name("vllm_inside.py")
_PACKAGE: Final = r"vllm(?:_cpu)?"


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """See the module.

    Args:
        python: the interpreter of the environment that has vLLM; `environment_of` checks it.
    """

    python: Path
    kind: str = "vllm"
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS)

    @property
    def version(self) -> str:
        return f"vllm {installed_version(self.python, _PACKAGE) or 'of an unknown version'}"

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        group = launch.group
        place = ("--group-address", group.address, "--group-port", str(group.leader_port)) if group else ()
        role = ("--follows",) if group and group.rank else ()
        settings = (f"{name}={value}" for name, value in variables(launch).items())
        return (
            *("-m", "potluck_node.engines.foreign_server", "--lifeline", "--key-variable", "VLLM_API_KEY", *place, *role),
            *(word for setting in settings for word in ("--set", setting)),
            *("--", str(self.python), "-P", str(_INSIDE), *flags(launch)),
        )

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        return one_token_probe(launch)


def environment_of(python: Path) -> VllmEngine:
    """The engine of an environment; raises PotluckError(INVALID_REQUEST) where there is no vLLM in it."""
    if installed_version(python, _PACKAGE):
        return VllmEngine(python)
    raise not_installed(python, "vLLM", "'vllm>=0.30'", "vllm_python")


def flags(launch: EngineLaunch) -> tuple[str, ...]:
    """What `vllm` is started with; "{port}" stands for the port of this start."""
    return (
        *(
            "serve",
            str(launch.model_path),
            "--served-model-name",
            launch.model_id,
            "--load-format",
            "safetensors",
            "--no-trust-remote-code",
        ),
        *("--max-model-len", str(launch.context_length_tokens), "--max-num-seqs", str(launch.slot_count)),
        *_shape_flags(launch),
        *(_group_flags(launch.group) if launch.group else ()),
        *(("--headless",) if launch.group and launch.group.rank else _front_flags()),
    )


def variables(launch: EngineLaunch) -> dict[str, str]:
    """What vLLM finds in its environment; "{interface}" stands for the network interface of the group's address."""
    group = launch.group
    interface = "{interface}" if group else "lo"
    told = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_DISABLE_LOG_LOGO": "1",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(STOPPING_SECONDS),
        # Everything that listens does so here; left alone, vLLM takes the address that the machine's name or default route has.
        "VLLM_HOST_IP": group.address if group else "127.0.0.1",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    if launch.shape.card_uuids:
        told["CUDA_VISIBLE_DEVICES"] = ",".join(launch.shape.card_uuids)
    if group:
        told["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, group.layer_counts))
        if not group.rank:
            told["POTLUCK_GROUP_STORE"] = f"{group.leader_address}:{group.leader_port}"
    return told


def processor_cache_bytes(launch: EngineLaunch) -> int:
    """Memory for keys and values without cards: as planned, and less by the same share as `memory_utilization_percent`."""
    planned_bytes = launch.shape.kv_cache_bytes or PROCESSOR_CACHE_BYTES
    return planned_bytes * min(launch.memory_utilization_percent, FIRST_UTILIZATION_PERCENT) // FIRST_UTILIZATION_PERCENT


def _shape_flags(launch: EngineLaunch) -> tuple[str, ...]:
    shape = launch.shape
    parallel = ("--tensor-parallel-size", str(shape.tensor_parallel_size)) if shape.tensor_parallel_size > 1 else ()
    quantization = ("--quantization", shape.quantization) if shape.quantization in MADE_WHILE_LOADING else ()
    if shape.card_uuids:
        return (*parallel, *quantization, "--gpu-memory-utilization", f"{launch.memory_utilization_percent / 100:.2f}")
    # Without cards nothing is compiled: it takes a minute, wants a C++ compiler, and words its answers differently. A stage's buffers are
    # made by the warm-up, which vLLM leaves out when it is eager; traced and not compiled it warms up, and answers the same as eager.
    eager = ("--compilation-config", json.dumps({"mode": 2, "backend": "eager"})) if launch.group else ("--enforce-eager",)
    return (*parallel, *quantization, "--kv-cache-memory-bytes", str(processor_cache_bytes(launch)), *eager)


def _group_flags(group: GroupPlace) -> tuple[str, ...]:
    stage_count = str(len(group.layer_counts))
    return (
        *("--pipeline-parallel-size", stage_count, "--nnodes", stage_count, "--node-rank", str(group.rank)),
        *("--master-addr", group.leader_address, "--master-port", str(group.leader_port)),
    )


def _front_flags() -> tuple[str, ...]:
    # Its own key guards some paths only; the door guards all.
    return (
        *("--host", "127.0.0.1", "--port", "{port}", "--middleware", "vllm_inside.Door"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-fastapi-docs"),
    )
