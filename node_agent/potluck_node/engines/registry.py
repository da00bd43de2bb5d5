"""Kinds of engines by name. An engine's own libraries are imported by its process, so knowing them all costs nothing.

Decides which kinds this node offers: those whose software is installed, those of environments that the owner names, `attach` where he
attached a server, and `scripted`, the engine of tests and benchmarks, where he says so. It must not know which of them the pool asks for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from potluck_node.engines import sglang, vllm
from potluck_node.engines.attach import AttachEngine
from potluck_node.engines.base import Engine
from potluck_node.engines.llamacpp import LlamaCppEngine
from potluck_node.engines.scripted import ScriptedEngine

if TYPE_CHECKING:
    from potluck_node.attached_servers import AttachedServers
    from potluck_node.settings import Settings


def available_engines(settings: Settings, attached: AttachedServers | None = None) -> dict[str, Engine]:
    """The engines that may run here, by kind; `attached`: the owner's own, if there are any.

    Raises:
        PotluckError: INVALID_REQUEST for an environment that the owner names and that has no such engine in it.
    """
    engines: dict[str, Engine] = {"scripted": ScriptedEngine()} if settings.scripted_engine else {}
    if find_spec("xllamacpp") is not None:
        engines["llamacpp"] = LlamaCppEngine()
    if settings.vllm_python is not None:
        engines["vllm"] = vllm.environment_of(settings.vllm_python)
    if settings.sglang_python is not None:
        engines["sglang"] = sglang.environment_of(settings.sglang_python)
    if attached is not None and attached.servers:
        engines["attach"] = AttachEngine(attached)
    return engines
