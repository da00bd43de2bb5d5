"""The engine kind `vllm`: vLLM out of an environment of its own, for folders of safetensors.

Decides which of vLLM's flags and variables a launch becomes; those of its shape are `vllm_words`'. It must not import vLLM;
`foreign_server`, the process that it names, runs the environment's interpreter with `vllm_inside`. Names are those of vLLM 0.32, which the
tests run on processors; with cards it has not been run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from potluck_node.engines.base import EngineLaunch, EngineProbe, one_token_probe
from potluck_node.engines.environments import installed_version, not_installed
from potluck_protocol.values import Endpoint, GroupPlace
from potluck_protocol.vllm_words import shape_arguments, shape_variables

STOPPING_SECONDS: Final = 1
"""For vLLM's own workers; what is left after it is killed. Its five would use up all the time that an engine has to stop."""

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

    @property
    def variables(self) -> dict[str, str]:
        return {}

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        return one_token_probe(launch)


def environment_of(python: Path) -> VllmEngine:
    """The engine of an environment; raises PotluckError(INVALID_REQUEST) where there is no vLLM in it."""
    if installed_version(python, _PACKAGE):
        return VllmEngine(python)
    raise not_installed(python, "vllm", "vLLM")


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
        *shape_arguments(
            launch.shape,
            context_length_tokens=launch.context_length_tokens,
            slot_count=launch.slot_count,
            memory_utilization_percent=launch.memory_utilization_percent,
            group_layer_counts=_group_layer_counts(launch),
        ),
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
    if group and not group.rank:
        told["POTLUCK_GROUP_STORE"] = f"{group.leader_address}:{group.leader_port}"
    return told | shape_variables(launch.shape, _group_layer_counts(launch))


def _group_layer_counts(launch: EngineLaunch) -> tuple[int, ...]:
    return launch.group.layer_counts if launch.group else ()


def _group_flags(group: GroupPlace) -> tuple[str, ...]:
    return (
        *("--nnodes", str(len(group.layer_counts)), "--node-rank", str(group.rank)),
        *("--master-addr", group.leader_address, "--master-port", str(group.leader_port)),
        *("--worker-extension-cls", "stage_weights.Nothing"),
    )


def _front_flags() -> tuple[str, ...]:
    # Its own key guards some paths only; the door guards all.
    return (
        *("--host", "127.0.0.1", "--port", "{port}", "--middleware", "vllm_inside.Door"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-fastapi-docs"),
        # Without it nobody can tell how much of a prompt was read, and how much was remembered.
        "--enable-prompt-tokens-details",
    )
