"""The engine kind `llamacpp`: llama.cpp by the xllamacpp wheel, for GGUF files.

Decides what this kind can be asked: chats and completions. Embeddings are left out: switching them on makes llama.cpp compute them for
every generated token too. It must not import llama.cpp; `llamacpp_server`, the process that it names, does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from potluck_node.engines.base import EngineLaunch, EngineProbe, one_token_probe
from potluck_protocol.values import Endpoint


@dataclass(frozen=True, slots=True)
class LlamaCppEngine:
    """See the module."""

    kind: str = "llamacpp"
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS)

    @property
    def version(self) -> str:
        return f"xllamacpp {_installed_version()}"

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        return (
            *("-m", "potluck_node.engines.llamacpp_server", "--lifeline"),
            *("--model", str(launch.model_path), "--alias", launch.model_id),
            *("--context", str(launch.context_length_tokens), "--slots", str(launch.slot_count)),
        )

    @property
    def variables(self) -> dict[str, str]:
        return {}

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        return one_token_probe(launch)


@cache  # reading the metadata takes a millisecond, and every status names the version
def _installed_version() -> str:
    return version("xllamacpp")
