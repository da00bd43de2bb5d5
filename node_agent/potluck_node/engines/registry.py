"""Kinds of engines by name. An engine's own libraries are imported by its process, so knowing them all costs nothing.

Decides which kinds this node offers: those whose software is installed, and `scripted`, the engine of tests and benchmarks, where its owner
says so. It must not know which of them the pool will ask for.
"""

from __future__ import annotations

from importlib.util import find_spec

from potluck_node.engines.base import Engine
from potluck_node.engines.llamacpp import LlamaCppEngine
from potluck_node.engines.scripted import ScriptedEngine


def available_engines(*, scripted: bool) -> dict[str, Engine]:
    """The engines that may run here, by kind."""
    engines: dict[str, Engine] = {"scripted": ScriptedEngine()} if scripted else {}
    if find_spec("xllamacpp") is not None:
        engines["llamacpp"] = LlamaCppEngine()
    return engines
