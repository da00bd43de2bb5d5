"""Kinds of engines by name. An engine's own libraries are imported by its process, so knowing them all costs nothing.

Decides which kinds this node offers: those whose software is installed, those of environments that were made for them or that the owner
names, `attach` where he attached a server, and `scripted`, the engine of tests and benchmarks, where he says so. It must not know which of
them the pool asks for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import structlog

from potluck_node.engines import sglang, vllm
from potluck_node.engines.attach import AttachEngine
from potluck_node.engines.base import Engine
from potluck_node.engines.environments import python_of
from potluck_node.engines.llamacpp import LlamaCppEngine
from potluck_node.engines.scripted import ScriptedEngine
from potluck_protocol.errors import PotluckError

if TYPE_CHECKING:
    from potluck_node.attached_servers import AttachedServers
    from potluck_node.settings import Settings

_log = structlog.get_logger()


def available_engines(settings: Settings, attached: AttachedServers | None = None) -> dict[str, Engine]:
    """The engines that may run here, by kind; `attached`: the owner's own, if there are any.

    Raises:
        PotluckError: INVALID_REQUEST for an environment that the owner names, and that has no such engine in it.
    """
    engines: dict[str, Engine] = {"scripted": ScriptedEngine()} if settings.scripted_engine else {}
    if find_spec("xllamacpp") is not None:
        engines["llamacpp"] = LlamaCppEngine()
    for kind, named, engine_in in (
        ("vllm", settings.vllm_python, vllm.environment_of),
        ("sglang", settings.sglang_python, sglang.environment_of),
    ):
        python = python_of(kind, named, settings.cache_dir)
        if python is None:
            continue
        try:
            engines[kind] = engine_in(python)
        except PotluckError as error:
            # What the owner names is his word; what was made here and damaged since must not cost the other engines.
            if named is not None:
                raise
            _log.warning("engine_left_out", engine_kind=kind, reason=error.message)
    if attached is not None and attached.servers:
        engines["attach"] = AttachEngine(attached)
    return engines
