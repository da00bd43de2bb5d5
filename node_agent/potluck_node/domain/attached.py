"""Engines that the owner runs already: where they are, which of them is which, and what they serve, as read from their own answers.

Decides what may be attached (loopback only), and whose answers these are. It must not know HTTP: `attached_servers` asks.

What each server says of itself, by its own source or documentation: the `owned_by` of its models (vLLM, SGLang, llama.cpp, TensorRT-LLM,
TabbyAPI, LM Studio, KoboldCpp), `/api/version` (Ollama), `/info` (TGI), `/props` (llama.cpp), `/version` (vLLM, TensorRT-LLM). LM Studio
answers 200 to a path that it does not know, so only words count, never a status alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from potluck_node.domain.model_source import is_attachable

MODELS_PATH: Final = "/v1/models"
NAMES_MAX: Final = 256
"""Of one node, as many as the coordinator takes."""
WORD_SECONDS_MAX: Final = 600.0
"""For any word of a server, as long as a gateway gives a request: its owner's own requests may keep it busy, a large model may have to be
loaded first, and some servers list nothing while they are at work."""
BUSY_STATUSES: Final = frozenset({429, 502, 503, 504})
"""What a server, or what stands before it, says while it cannot answer just now: llama.cpp 503 for as long as it loads a model, which it
lists already. Not 500, which is an answer: the request was tried."""
UNKNOWN: Final = "an OpenAI-compatible server"

_BY_OWNER: Final = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "tensorrt_llm": "TensorRT-LLM",
    "tabbyAPI": "TabbyAPI",
    "organization_owner": "LM Studio",
    "koboldcpp": "KoboldCpp",
}
_KINDS: Final = {
    "vLLM": "vllm",
    "SGLang": "sglang",
    "llama.cpp": "llamacpp",
    "TensorRT-LLM": "tensorrt_llm",
    "TGI": "tgi",
    "TabbyAPI": "tabbyapi",
    "Ollama": "ollama",
}
RECOGNITION_PATHS: Final = ("/api/version", "/info", "/props", "/version")
"""Asked of a server after its models, until the answers are conclusive."""


@dataclass(frozen=True, slots=True)
class AttachedServer:
    """One server of the owner's."""

    url: str
    """Its root, such as "http://127.0.0.1:11434"."""
    key_file: str = ""
    """A file with the key that it asks for; empty: it asks for none."""

    @property
    def place(self) -> str:
        """For people: host and port, without a path that may be secret."""
        return urlsplit(self.url).netloc

    def __str__(self) -> str:
        return f"{self.url} {self.key_file}".rstrip()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to a GET."""

    status: int
    value: Any = None
    """Its JSON; None where it was none."""
    server_header: str = ""


def parse_attached(text: str) -> AttachedServer:
    """The server that an owner's setting names: "URL" or "URL KEY_FILE"; raises ValueError with a one-line reason."""
    url, _, key_file = text.strip().partition(" ")
    if {"@", "?", "#"} & set(url):
        # Not quoted: there may be a secret in it.
        raise ValueError(
            "an attached URL has a user, a password, a query or a fragment; give a server on this machine's loopback such as "
            "http://127.0.0.1:11434, and the file of its key, if it asks for one, after a blank"
        )
    if fault := _fault(url):
        raise ValueError(f"{fault}; give a server on this machine's loopback such as http://127.0.0.1:11434")
    # People copy what they give to OpenAI's client, which wants it with the version.
    return AttachedServer(url.rstrip("/").removesuffix("/v1"), key_file.strip())


def _fault(url: str) -> str:
    """Why it cannot be attached; empty: it can. Names the host and the port alone, for the path may be secret."""
    try:
        parts = urlsplit(url)
        place, scheme, host = parts.netloc, parts.scheme, parts.hostname or ""
    except ValueError:
        return "an attached URL cannot be read"
    if not place:
        return "an attached URL does not begin with http:// and a host"
    if not _is_loopback(host):
        return f"{place!r} is no server on this machine's loopback"
    if scheme != "http":
        return f"{place!r} is named with {scheme}://, and attached servers are asked by http:// alone"
    try:
        return "" if parts.port is not None else f"{place!r} is named without its port"
    except ValueError:
        return f"{place!r} has no such port"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def model_names(models: Answer) -> tuple[str, ...]:
    """What the server calls its models, as far as a catalogue can name them."""
    ids = (entry.get("id") for entry in _entries(models))
    return tuple(sorted({name for name in ids if isinstance(name, str) and is_attachable(name)}))


def is_only_busy(models: Answer) -> bool:
    """Whether a server that is asked for its models does not list them just now, which says nothing of what it has."""
    return models.status >= HTTPStatus.INTERNAL_SERVER_ERROR or models.status in BUSY_STATUSES


def recognised(answers: Mapping[str, Answer]) -> str:
    """Which software this is, for people, with its version where it says so."""
    software, props = _software(answers), _fields(answers.get("/props"))
    if not software:
        return UNKNOWN
    said = {"Ollama": "/api/version", "TGI": "/info", "vLLM": "/version", "TensorRT-LLM": "/version"}.get(software)
    version = _fields(answers.get(said)).get("version") if said else props.get("build_info") if software == "llama.cpp" else None
    return f"{software} {version}" if isinstance(version, str) and version.isprintable() and 0 < len(version) <= 40 else software


def is_conclusive(answers: Mapping[str, Answer]) -> bool:
    """Whether asking again would bring nothing new: the software is known, or everything was answered, and nothing by one too busy."""
    if _software(answers):
        return True
    return all(path in answers and not is_only_busy(answers[path]) for path in RECOGNITION_PATHS)


def recognised_kind(answers: Mapping[str, Answer]) -> str:
    """The same as the word for a kind of engine, by which `engines.metrics` has its metrics; empty for one that has none there."""
    return _KINDS.get(_software(answers), "")


def _software(answers: Mapping[str, Answer]) -> str:
    """What the server says of its models' owner counts before everything else; empty where it says nothing known."""
    models = answers.get(MODELS_PATH, Answer(0))
    owners = [entry.get("owned_by") for entry in _entries(models)]
    kind = next((_BY_OWNER[owner] for owner in owners if isinstance(owner, str) and owner in _BY_OWNER), "")
    info, props = _fields(answers.get("/info")), _fields(answers.get("/props"))
    if not kind and (models.server_header.startswith("llama.cpp") or "default_generation_settings" in props):
        kind = "llama.cpp"
    if not kind and (info.get("router") == "text-generation-router" or {"model_id", "docker_label"} <= info.keys()):
        kind = "TGI"
    if not kind and isinstance(_fields(answers.get("/api/version")).get("version"), str):
        kind = "Ollama"
    return kind


def _entries(models: Answer) -> list[dict[str, Any]]:
    data = _fields(models).get("data")
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def _fields(answer: Answer | None) -> dict[str, Any]:
    return answer.value if answer is not None and answer.status == 200 and isinstance(answer.value, dict) else {}
