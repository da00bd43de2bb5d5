"""A pool whose nodes share one place: the coordinator and three owners' nodes, each on a host of its own, with vLLM on processors.

The kernel limits each node to less memory than the model needs. Ann and Bob trust each other; Eve says that she trusts both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.fit.config_json import architecture_of_config
from potluck_coordinator.domain.fit.engines import traits_of
from potluck_coordinator.domain.fit.hardware import NodeProcessor
from potluck_coordinator.domain.fit.interconnect import ALONE
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import stage_memory
from potluck_coordinator.domain.fit.shapes import Stage
from tests.support import memory_limits, namespaces
from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.memory_limits import MemoryLimit, memory_limit
from tests.support.namespaces import Host, hosts_of_one_site
from tests.support.pool_processes import ChatStream, NodeProcess
from tests.support.safetensors_model import ROOT, read_header

WEIGHTS = "model.safetensors"
MODEL = "smollm2-135m-instruct-bf16"
CONTEXT_LENGTH_TOKENS = 2048
SLOT_COUNT = 2
PROMPT_PRICE, COMPLETION_PRICE = 1_000, 4_000
PROMPT, TOKENS = "Write one sentence about shared meals.", 24
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
READY_SECONDS_MAX = 400.0
"""For two vLLM starts on two processors."""
ENGINE_WORDS = ("vllm_inside", "VLLM::")
WHOLE_BUDGET_BYTES = 12 * GIB
LAYERS_MAX = {"ann": 14, "bob": 18, "eve": 18}
"""Of the model's 30, how many each node has the memory for: of Ann's and Bob's stages one is the larger, and is paid more."""
BESIDE_BUDGET_BYTES = GIB // 4
"""What a node may use beside its engine's budget, before the kernel kills: the agent."""


def available() -> bool:
    """Whether this process may make hosts and limit them."""
    return namespaces.available() and memory_limits.available()


def memory_budget_bytes(folder: Path, layer_count: int) -> int:
    """What the fit says of one sequence with so many of the layers, at either end of the model, and half a layer more."""
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of_config(config, model_id=MODEL, weight_bytes=(folder / WEIGHTS).stat().st_size)
    load = Load(traits_of("vllm"), CONTEXT_LENGTH_TOKENS, 1)
    processor = NodeProcessor(0, 40.0, 1)

    def needed_bytes(layer_count: int, *, is_first: bool, is_last: bool) -> int:
        stage = Stage(0, (), (), ALONE, processor, layer_count, is_first, is_last)
        return stage_memory(architecture, stage, load).needed_bytes

    ends = ((True, False), (False, True))
    so_many, one_more = (
        max(needed_bytes(count, is_first=first, is_last=last) for first, last in ends) for count in (layer_count, layer_count + 1)
    )
    return (so_many + one_more) // 2


def limit_bytes(folder: Path, name: str) -> int:
    """What the kernel allows a node in all."""
    return memory_budget_bytes(folder, LAYERS_MAX[name]) + BESIDE_BUDGET_BYTES


def stage_weight_bytes(folder: Path, layers: range) -> int:
    """What the file has for a stage of these layers, read from its header: of the ends, too, and the head where it is the embeddings."""
    header, _ = read_header(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    is_first, is_last = layers.start == 0, layers.stop == config["num_hidden_layers"]
    total_bytes = 0
    for name, tensor in header.items():
        first_byte, end_byte = tensor.get("data_offsets", (0, 0))
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            count = int(layer[1]) in layers
        elif name == "model.embed_tokens.weight":
            count = is_first + (is_last and config["tie_word_embeddings"])
        else:
            count = is_last
        total_bytes += count * (end_byte - first_byte)
    return total_bytes


def catalogue_text(folder: Path) -> str:
    """The entry of the model's folder."""
    files = "".join(
        f'{{ name = "{path.name}", sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}", size_bytes = {path.stat().st_size} }},\n'
        for path in sorted(folder.iterdir())
    )
    config = json.loads((folder / "config.json").read_text())
    weight_bytes = (folder / WEIGHTS).stat().st_size
    return f"""
[[model]]
model_id = "{MODEL}"
source = "path:{folder}"
files = [
{files}]
engine_kinds = ["vllm"]
context_length_tokens = {CONTEXT_LENGTH_TOKENS}
slot_count = {SLOT_COUNT}
prompt_price_micro_credits = {PROMPT_PRICE}
completion_price_micro_credits = {COMPLETION_PRICE}
licence = "Apache-2.0"
endpoints = ["/v1/chat/completions", "/v1/completions"]
created_at_unix_seconds = 1730419200

[model.architecture]
model_id = "{MODEL}"
layer_count = {config["num_hidden_layers"]}
hidden_size = {config["hidden_size"]}
attention_head_count = {config["num_attention_heads"]}
kv_head_count = {config["num_key_value_heads"]}
head_dim = {config["head_dim"]}
intermediate_size = {config["intermediate_size"]}
vocabulary_size = {config["vocab_size"]}
context_length_max_tokens = {config["max_position_embeddings"]}
tie_word_embeddings = {str(config["tie_word_embeddings"]).lower()}
weight_bytes_of_files = {weight_bytes}
"""


class SiteNode(NodeProcess):
    """A node that offers itself to groups of the place."""

    def __init__(
        self, folder: Path, invite: str, host: Host, settings: dict[str, str], core: int, limit: MemoryLimit | None = None
    ) -> None:
        self._settings = settings
        self.host = host
        self.limit = limit
        super().__init__(folder, invite, wrap=(*(limit.wrap if limit else ()), *host.wrap, "taskset", "-c", str(core)))

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "POTLUCK_NODE_MODELS_ALLOWED": MODEL, **self._settings}

    def engine_processes(self) -> list[psutil.Process]:
        """Every process of its vLLM: the launcher, vLLM's own first one, its children."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if any(word in " ".join(process.cmdline()) for word in ENGINE_WORDS):
                        found.append(process)
        return found


class GroupPool:
    """The pool at work; made by `group_pool`."""

    def __init__(self, host: Host, model_folder: Path, coordinator: CoordinatorProcess, stack: ExitStack) -> None:
        self.host = host
        self.model_folder = model_folder
        self.coordinator = coordinator
        self._stack = stack
        self.nodes: dict[str, SiteNode] = {}
        self.accounts: dict[str, str] = {}
        self._keys: dict[str, str] = {}

    def potluck(self, *arguments: str, **environment: str) -> str:
        """`potluck …` on the operator's host."""
        return subprocess.run(
            [*self.host.wrap, sys.executable, "-m", "potluck", *arguments],
            env={**os.environ, "POTLUCK_COORDINATOR_DATA_DIR": str(self.coordinator.data_dir), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    def people(self, *names: str) -> None:
        """Adds them to the pool."""
        for name in names:
            self.accounts[name] = json.loads(self.potluck("accounts", "create", name, "--json"))["account_id"]
            self._keys[name] = self.potluck("keys", "create", "--account", self.accounts[name]).strip()

    def invite(self, name: str) -> str:
        """One for a node of theirs."""
        made = self.potluck("tokens", "create", "--account", self.accounts[name])
        return next(word for word in made.split() if word.startswith("potluck1."))

    def bring_whole_node(self, name: str) -> SiteNode:
        """One more person, whose machine, the operator's host, has the memory for the whole model; it stops with the pool."""
        self.people(name)
        settings = {"POTLUCK_NODE_VLLM_PYTHON": str(VLLM_PYTHON), "POTLUCK_NODE_MEMORY_BUDGET_BYTES": str(WHOLE_BUDGET_BYTES)}
        node = SiteNode(self.coordinator.data_dir.parent / name, self.invite(name), self.host, settings, core=0)
        self.nodes[name] = self._stack.enter_context(node)
        return node

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """What `potluck explain` says of each node, by its name."""
        # A row without a node is about the model's groups.
        return {row["display_name"]: row for row in json.loads(self.potluck("explain", MODEL, "--json")) if row["node_id"]}

    def ready_count(self) -> int:
        models = json.loads(self.potluck("models", "--json"))
        return next(row["ready_replica_count"] for row in models if row["model_id"] == MODEL)

    def wait_ready(self) -> float:
        """Seconds until the group serves."""
        try:
            return wait_until(lambda: self.ready_count() == 1, READY_SECONDS_MAX, "the group serves")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.potluck('explain', MODEL)}\n{self.logs()}") from None

    def credits(self, name: str) -> dict[str, Any]:
        """What `potluck credits` says to one of them."""
        return json.loads(self.potluck("credits", "--json", POTLUCK_API_KEY=self._keys[name], POTLUCK_URL=self.url))

    @property
    def url(self) -> str:
        return self.coordinator.operator()["url"]

    def stream(self, prompt: str, **fields: Any) -> ChatStream:
        """A greedy answer on its way."""
        operator = self.coordinator.operator()
        messages = [{"role": "user", "content": prompt}]
        with self.host.entered():
            # Beyond loopback the URL ends with the pool's fingerprint.
            url = operator["url"].partition("#")[0]
            return ChatStream(url, operator["api_key"], {"model": MODEL, "messages": messages, "temperature": 0, **fields})

    def greedy(self, prompt: str, max_tokens: int) -> str:
        """The text of a greedy answer."""
        stream = self.stream(prompt, max_tokens=max_tokens)
        pieces = [json.loads(event) for event in stream.events() if event != "[DONE]"]
        assert stream.done, stream.error
        return "".join(choice["delta"].get("content") or "" for piece in pieces for choice in piece.get("choices", ()))

    def leader(self) -> SiteNode:
        """The node that leads the group, by its own words."""
        return next(self.nodes[name] for name, row in self.verdicts().items() if "which it leads" in row["reason"])

    def member(self) -> SiteNode:
        """The other one."""
        return next(self.nodes[name] for name, row in self.verdicts().items() if re.search(r"which node \w+ leads", row["reason"]))

    def logs(self) -> str:
        """The end of everybody's."""
        return "\n\n".join(text[-6_000:] for text in (self.coordinator.log(), *(node.log() for node in self.nodes.values())))


@contextmanager
def group_pool(folder: Path, model_folder: Path) -> Iterator[GroupPool]:
    """A coordinator that offers the model, and Ann's, Bob's and Eve's nodes; nothing is deployed yet."""
    catalogue = folder / "catalogue.toml"
    folder.mkdir(parents=True, exist_ok=True)
    catalogue.write_text(catalogue_text(model_folder))
    with ExitStack() as stack:
        operator, *hosts = stack.enter_context(hosts_of_one_site(3))
        flags = ("--host", operator.address, "--catalogue", str(catalogue))
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", *flags, wrap=operator.wrap))
        coordinator.wait_ready()
        pool = GroupPool(operator, model_folder, coordinator, stack)
        for model_id in json.loads(pool.potluck("models", "--json")):
            pool.potluck("undeploy", model_id["model_id"])
        pool.people("ann", "bob", "eve")
        trusts = {"ann": ("bob",), "bob": ("ann",), "eve": ("ann", "bob")}
        for number, (name, host) in enumerate(zip(trusts, hosts, strict=True)):
            limit = stack.enter_context(memory_limit(name, limit_bytes(model_folder, name)))
            settings = {
                "POTLUCK_NODE_VLLM_PYTHON": str(VLLM_PYTHON),
                "POTLUCK_NODE_MEMORY_BUDGET_BYTES": str(memory_budget_bytes(model_folder, LAYERS_MAX[name])),
                "POTLUCK_NODE_GROUP_SITE": "the-lab",
                "POTLUCK_NODE_GROUP_ADDRESS": "potluck0",
                "POTLUCK_NODE_GROUP_TRUSTS": ",".join(pool.accounts[trusted] for trusted in trusts[name]),
            }
            node = SiteNode(folder / name, pool.invite(name), host, settings, number % (os.cpu_count() or 1), limit)
            pool.nodes[name] = stack.enter_context(node)
        yield pool


def kill(process: psutil.Process) -> float:
    """`kill -9`; when, on the monotonic clock."""
    process.send_signal(signal.SIGKILL)
    return time.monotonic()
