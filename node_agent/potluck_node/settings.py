"""The volunteer's own limits and places.

Decides what may be set and where it is read from: flags, then `POTLUCK_NODE_*`, then `node.toml`. Only the command loads settings.
These limits win over any wish of the coordinator.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import platformdirs
from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from potluck_node.domain.attached import parse_attached
from potluck_node.domain.hours import WINDOWS_MAX, parse_window
from potluck_protocol.errors import ErrorCode, PotluckError

PREFIX: Final = "POTLUCK_NODE_"


def config_path() -> Path:
    """Where the volunteer's file is looked for."""
    return platformdirs.user_config_path("potluck") / "node.toml"


def _in_whose_home(path: Path) -> Path:
    """No shell has looked at what stands in a file."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


UsersPath = Annotated[Path, AfterValidator(_in_whose_home)]
Folder = Annotated[UsersPath, AfterValidator(Path.absolute)]
"""From the root: what is told of it is the same from everywhere, and is taken out as a whole of what is pasted in public."""


class NodePlace(BaseSettings):
    """Where a node's files are: all that its owner's word needs, whatever is wrong with other settings."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    state_dir: Folder = Field(default_factory=lambda: platformdirs.user_state_path("potluck") / "node", validate_default=True)
    """The node's key, certificate and control files."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base class names them
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_path())


class Settings(NodePlace):
    """One agent's settings, fixed for its life."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(extra="forbid")

    cache_dir: Folder = Field(default_factory=lambda: platformdirs.user_cache_path("potluck"), validate_default=True)
    """Where model files are kept, and the environments of engines. Agents that run at the same time keep their own model files there."""
    disk_budget_bytes: int | None = Field(default=None, gt=0)
    """How much the model files may take together; none: whatever the disk has free."""
    models_allowed: Annotated[tuple[str, ...], NoDecode] = ()
    """Model ids that may run here; empty: any of the pool's."""
    slot_count_max: int | None = Field(default=None, gt=0)
    """How many requests one engine may answer at once, at most."""
    power_supply_watts: int | None = Field(default=None, gt=0)
    """What is written on the machine's power supply, for `potluck node doctor`."""
    temperature_celsius_max: int | None = Field(default=None, ge=40, le=95)
    """How hot a card may get before it gets less to do; none: until shortly before it would slow down by itself."""
    power_limit_watts: int | None = Field(default=None, ge=50, le=1_000)
    """How much power each card with an engine may take at most; none: what it may take without the agent."""
    memory_budget_bytes: int | None = Field(default=None, gt=0)
    """How much of the machine's memory engines without cards may take together; none: the pool leaves a part to the system."""
    hours: Annotated[tuple[str, ...], NoDecode] = Field(default=(), max_length=WINDOWS_MAX)
    """When this machine serves, in local time, such as "mon-fri 22:00-07:00"; empty: at all hours. Outside them the node takes no more,
    lets answers end within `drain_seconds`, and frees the machine."""
    idle_minutes: int | None = Field(default=None, gt=0, le=24 * 60)
    """Serve only after the machine was not used for so long; none: also while it is in use."""
    card_memory_bytes_max: int | None = Field(default=None, gt=0)
    """How much of one card's memory engines may take; none: what other programs leave of it."""
    upload_bytes_per_second_max: int | None = Field(default=None, ge=1_000)
    """How fast answers may leave this machine, together; none: as fast as they come. What keeps the link alive goes beside it."""
    group_site: str = Field(default="", max_length=64)
    """The owner's word for the place, if this machine may be one of several that serve a model together: those with the same word."""
    group_address: str = ""
    """An address of a private network, or the name of its interface: where this node and others of its group reach each other."""
    group_port: int = Field(default=29_600, ge=1_024, le=65_534)
    """Where a group's leader meets its members; one above it, other nodes of the site are measured."""
    group_trusts: Annotated[tuple[str, ...], NoDecode] = Field(default=(), max_length=64)
    """Accounts of other owners whose nodes may be in a group with this one, if they trust this one's owner, too."""
    attach_urls: Annotated[tuple[str, ...], NoDecode] = Field(default=(), max_length=16)
    """Servers that run here already and are shared as they are: "http://127.0.0.1:11434", with the file of their key after a blank."""
    vllm_python: UsersPath | None = None
    """The Python of an environment with vLLM in it; none: of the one that `potluck node engines install vllm` made, if it did."""
    sglang_python: UsersPath | None = None
    """The same for SGLang."""
    drain_seconds: float = Field(default=10.0, ge=0, le=86_400, allow_inf_nan=False)
    """How long answers under way may go on after the first Ctrl-C, after `potluck node finish`, and after the last of the `hours`."""
    url: str | None = None
    """Where the coordinator answers now, if it moved since the node joined; it must still be the same pool."""
    scripted_engine: bool = False
    """Whether the pool may also have the engine of tests and benchmarks here, which makes its answers up."""
    keep_engine_lines: bool = False
    """Whether the last lines of an engine that failed while it served are kept in the state folder. They may quote prompts and answers."""
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("models_allowed", "group_trusts", "attach_urls", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment gives one text: `model-a,model-b`."""
        return _parts(value, ",") if isinstance(value, str) else value

    @field_validator("hours", mode="before")
    @classmethod
    def _split_hours(cls, value: object) -> object:
        """The environment gives one text, `mon-fri 22:00-07:00; sat,sun 00:00-24:00`: a comma stands between days."""
        return _parts(value, ";") if isinstance(value, str) else value

    @field_validator("hours")
    @classmethod
    def _can_be_read(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        for words in hours:
            parse_window(words)
        return hours

    @field_validator("attach_urls")
    @classmethod
    def _on_loopback(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse_attached(url)) for url in urls)


def load_settings(**flags: Any) -> Settings:
    """The settings, with the flags that were given (None: not given) above everything else.

    Raises:
        PotluckError: INVALID_REQUEST, naming each setting that is wrong and where it may come from.
    """
    try:
        _check_names(os.environ)
        if config_path().is_dir():
            raise IsADirectoryError("it is a folder")
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(
            _fault_words(fault["type"], ".".join(str(part) for part in fault["loc"]), fault["msg"]) for fault in error.errors()
        )
        text = f"A setting is wrong ({faults}). Settings come from flags, {PREFIX}* variables and {config_path()}."
        raise PotluckError(ErrorCode.INVALID_REQUEST, text) from None
    except OSError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{config_path()} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{config_path()} cannot be read as TOML: {error}") from None


def load_place(state_dir: Path | None) -> NodePlace:
    """The same of the node's folder alone; without the file, where that cannot be read and does not name one.

    Raises:
        PotluckError: INVALID_REQUEST, where what is said of the folder is wrong, or cannot be read.
    """
    path, flags = config_path(), {} if state_dir is None else {"state_dir": state_dir}
    is_readable = _is_readable(path)
    try:
        place = NodePlace(**flags) if is_readable else _PlaceWithoutFile(**flags)
    except ValidationError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"state_dir: {error.errors()[0]['msg']}; name it with --state-dir.") from None
    if not is_readable and "state_dir" not in place.model_fields_set and _may_name_a_folder(path):
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{path} may name the node's folder: name it with --state-dir.")
    return place


def _is_readable(path: Path) -> bool:
    """Whether the file can be read as TOML, or there is none."""
    if not path.is_file():
        return True
    try:
        tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _may_name_a_folder(path: Path) -> bool:
    try:
        return b"state_dir" in path.read_bytes()
    except OSError:
        return True


class _PlaceWithoutFile(NodePlace):
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the base class names them
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def _check_names(environment: Mapping[str, str]) -> None:
    """A limit that was written wrong is none, and nobody would hear of it."""
    for variable in environment:
        name = variable.upper().removeprefix(PREFIX).lower()
        if variable.upper().startswith(PREFIX) and name not in Settings.model_fields:
            words = _fault_words("extra_forbidden", name, "")
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"The variable {variable} sets nothing ({words}); correct it, or unset it.")


def _fault_words(kind: str, name: str, message: str) -> str:
    if kind == "tuple_type":
        return f'{name}: it is a list, such as ["a", "b"]'
    if kind != "extra_forbidden":
        return f"{name}: {message}"
    near = difflib.get_close_matches(name, Settings.model_fields, 1)
    return f"{name}: there is no such setting" + (f", is {near[0]} meant?" if near else "")


def _parts(text: str, separator: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(separator) if part.strip())
    if text and not parts:
        # An empty list allows everything.
        raise ValueError("it names nothing; leave it out, or name something")
    return parts
