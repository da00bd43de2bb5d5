"""The engine kind `attach`: a server that the owner runs already, asked for one of its models.

Decides nothing about that server: it is neither started nor stopped nor configured. `attach_server` is the process that stands for it here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from potluck_node.domain.attached import WORD_SECONDS_MAX
from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.engines.base import EngineLaunch, EngineProbe
from potluck_protocol.values import Endpoint

if TYPE_CHECKING:
    from potluck_node.attached_servers import AttachedServers

SERVERS_VARIABLE: Final = "POTLUCK_ATTACHED_SERVERS"
"""Of the environment of what stands for them: a JSON list of texts as an owner's setting has them."""


@dataclass(frozen=True, slots=True)
class AttachEngine:
    """See the module. It has no use for a launch's model path."""

    servers: AttachedServers
    kind: str = ATTACHED_KIND
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS)

    @property
    def version(self) -> str:
        return self.servers.kinds or "no answer"

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        return ("-m", "potluck_node.engines.attach_server", "--lifeline", f"--name={launch.attached_name}")

    @property
    def variables(self) -> dict[str, str]:
        """Where the servers are. Arguments are everybody's to read on a machine, and a URL's path may be secret."""
        return {SERVERS_VARIABLE: json.dumps([str(server) for server in self.servers.servers])}

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        body = {"model": launch.attached_name, "prompt": "Hello", "max_tokens": 1}
        return EngineProbe(Endpoint.COMPLETIONS, json.dumps(body).encode(), WORD_SECONDS_MAX)
