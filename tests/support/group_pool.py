"""A pool whose nodes share one place: the coordinator and three owners' nodes, each on a host of its own, with vLLM on processors.

Each node is limited to less memory than the model needs. Ann and Bob trust each other; Eve says that she trusts both.
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

from potluck_coordinator.domain.fit.config_json import architecture_of_config
from potluck_coordinator.domain.fit.engines import traits_of
from potluck_coordinator.domain.fit.hardware import NodeProcessor
from potluck_coordinator.domain.fit.interconnect import ALONE
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import stage_memory
from potluck_coordinator.domain.fit.shapes import Stage
from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.namespaces import Host, hosts_of_one_site
from tests.support.pool_processes import ChatStream, NodeProcess
from tests.support.safetensors_model import ROOT, built_in_folder

WEIGHTS = "model.safetensors"
MODEL = "smollm2-135m-instruct-bf16"
CONTEXT_LENGTH_TOKENS = 2048
SLOT_COUNT = 2
PROMPT_PRICE, COMPLETION_PRICE = 1_000, 4_000
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
READY_SECONDS_MAX = 400.0
"""For two vLLM starts on two processors."""
ENGINE_WORDS = ("vllm_inside", "VLLM::")


def memory_budget_bytes(folder: Path) -> int:
    """Between what the fit says of one sequence on one machine, and of either half of the layers."""
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of_config(config, model_id=MODEL, weight_bytes=(folder / WEIGHTS).stat().st_size)
    load = Load(traits_of("vllm"), CONTEXT_LENGTH_TOKENS, 1)
    processor = NodeProcessor(0, 40.0, 1)

    def needed_bytes(layer_count: int, *, is_first: bool, is_last: bool) -> int:
        stage = Stage(0, (), (), ALONE, processor, layer_count, is_first, is_last)
        return stage_memory(architecture, stage, load).needed_bytes

    half = architecture.layer_count // 2
    halves = (needed_bytes(half, is_first=True, is_last=False), needed_bytes(half, is_first=False, is_last=True))
    return (needed_bytes(2 * half, is_first=True, is_last=True) + max(halves)) // 2


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
tie_word_embeddings = true
weight_bytes_of_files = {weight_bytes}
"""


class SiteNode(NodeProcess):
    """A node that offers itself to groups of the place."""

    def __init__(self, folder: Path, invite: str, host: Host, settings: dict[str, str], core: int) -> None:
        self._settings = settings
        self.host = host
        super().__init__(folder, invite, wrap=(*host.wrap, "taskset", "-c", str(core)))

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

    def __init__(self, host: Host, coordinator: CoordinatorProcess) -> None:
        self.host = host
        self.coordinator = coordinator
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
def group_pool(folder: Path) -> Iterator[GroupPool]:
    """A coordinator, and Ann's, Bob's and Eve's nodes; nothing is deployed yet."""
    catalogue = folder / "catalogue.toml"
    folder.mkdir(parents=True, exist_ok=True)
    model_folder = built_in_folder()
    catalogue.write_text(catalogue_text(model_folder))
    budget_bytes = memory_budget_bytes(model_folder)
    with ExitStack() as stack:
        operator, *hosts = stack.enter_context(hosts_of_one_site(3))
        flags = ("--host", operator.address, "--catalogue", str(catalogue))
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", *flags, wrap=operator.wrap))
        coordinator.wait_ready()
        pool = GroupPool(operator, coordinator)
        for model_id in json.loads(pool.potluck("models", "--json")):
            pool.potluck("undeploy", model_id["model_id"])
        pool.people("ann", "bob", "eve")
        trusts = {"ann": ("bob",), "bob": ("ann",), "eve": ("ann", "bob")}
        for number, (name, host) in enumerate(zip(trusts, hosts, strict=True)):
            settings = {
                "POTLUCK_NODE_VLLM_PYTHON": str(VLLM_PYTHON),
                "POTLUCK_NODE_MEMORY_BUDGET_BYTES": str(budget_bytes),
                "POTLUCK_NODE_GROUP_SITE": "the-lab",
                "POTLUCK_NODE_GROUP_ADDRESS": "potluck0",
                "POTLUCK_NODE_GROUP_TRUSTS": ",".join(pool.accounts[trusted] for trusted in trusts[name]),
            }
            node = SiteNode(folder / name, pool.invite(name), host, settings, core=number % (os.cpu_count() or 1))
            pool.nodes[name] = stack.enter_context(node)
        yield pool


def kill(process: psutil.Process) -> float:
    """`kill -9`; when, on the monotonic clock."""
    process.send_signal(signal.SIGKILL)
    return time.monotonic()
