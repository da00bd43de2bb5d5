"""Everything an operator can set about one coordinator, as one frozen value.

Decides the names, bounds and defaults, and which source wins: a flag over the environment over a TOML file. It must not know who uses a
value. Only `command` calls `load_settings`; everything else is handed a `Settings`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from potluck_coordinator.domain.tiers import RESERVE_PERCENT
from potluck_coordinator.rate_text import rate_limit
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.money import MICRO_CREDITS_PER_CREDIT

ENVIRONMENT_PREFIX: Final = "POTLUCK_COORDINATOR_"

PORT_MAX: Final = 65_535
Port = Annotated[int, Field(ge=0, le=PORT_MAX)]


def default_data_dir() -> Path:
    """`$XDG_STATE_HOME/potluck/coordinator`, by the XDG rule that an unset or relative base means `~/.local/state`."""
    base = os.environ.get("XDG_STATE_HOME", "")
    state_home = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    return state_home / "potluck" / "coordinator"


def _default_database_url(values: dict[str, Any]) -> str:
    return f"sqlite:///{values['data_dir'] / 'potluck.db'}"


class Settings(BaseModel):
    """One coordinator's settings. Built directly it reads nothing but its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    data_dir: Path
    """Holds the database, the CA's keys and the operator's key; private to its owner."""
    database_url: str = Field(default_factory=_default_database_url, validate_default=True, repr=False)
    """SQLAlchemy URL; the default is a SQLite file in `data_dir`. It may hold a password, so it is never shown."""

    host: str = "127.0.0.1"
    """The address that the three ports listen on."""
    http_port: Port = 8600
    grpc_port: Port = 8601
    link_port: Port = 8602
    """0 takes any free port, once, at start."""
    own_link_port: Port | None = None
    """With several gateways, where nodes find the first of them again; each next one's is one higher. None: the ports after `link_port`; 0:
    any free ones."""
    public_host: str | None = None
    """The name or address that others reach this coordinator by, where it is not the one in the URL they used."""
    public_hosts: Mapping[str, str] = Field(default_factory=dict)
    """The same for each machine of a cluster, by its address in the cluster, where nodes reach it by another one."""
    http_tls_certificate: Path | None = None
    http_tls_key: Path | None = None

    ray_address: str | None = None
    """An existing Ray cluster of the operator's to join; None starts one on this machine, loopback only."""
    gateways: int = Field(default=1, ge=1, le=64)
    """Data-plane processes, spread over the cluster's machines; those of one machine share its three ports."""

    catalogue_file: Path | None = None
    """TOML with models beside the built-in ones."""
    grant_credits: int = Field(default=1000, ge=0, le=1_000_000_000)
    """What a new account starts with."""
    fee_basis_points: int = Field(default=500, ge=0, le=10_000)
    """The pool's share of what a node earns; 500 is 5 %."""

    queue_length_max: int = Field(default=1024, ge=0, le=100_000)
    """Requests that may wait for one model, whatever the prediction is."""
    queue_deadline_seconds: float = Field(default=30.0, gt=0, le=3600)
    """How long one may wait; who would wait longer is refused at once."""

    answer_token_seconds_max: float = Field(default=0.2, gt=0, le=60)
    """Between two tokens of an answer: a replica gets no more requests at a time than leave it this pace. Five tokens a second are read as
    fast as they come."""

    default_tier_rate: str = "100/hour"
    """What an account may ask for in the default tier: a count and a time, such as 20/minute or 5 per 10 seconds."""
    default_tier_reserve_percent: int = Field(default=RESERVE_PERCENT, ge=0, le=90)
    """Of each model's room, what the flex tier leaves to the default tier."""
    default_tier_first_token_seconds: float = Field(default=5.0, gt=0, le=3600)
    """What the default tier promises, and what its compliance is measured by."""

    lease_ttl_ms: int = Field(default=15_000, ge=100, le=600_000)
    heartbeat_busy_ms: int = Field(default=1_000, ge=10, le=60_000)
    heartbeat_idle_ms: int = Field(default=5_000, ge=10, le=60_000)
    link_grace_ms: int = Field(default=500, ge=0, le=60_000)
    """How long a broken link may take to come back before its attempts are lost."""

    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("default_tier_rate")
    @classmethod
    def _is_rate(cls, text: str) -> str:
        try:
            rate_limit(text)
        except PotluckError as error:
            raise ValueError(error.message) from None
        return text

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.http_tls_certificate is None) != (self.http_tls_key is None):
            raise ValueError("http_tls_certificate and http_tls_key go together: set both or neither")
        if self.heartbeat_idle_ms * 2 > self.lease_ttl_ms:
            raise ValueError("lease_ttl_ms must be at least twice heartbeat_idle_ms, or one lost heartbeat ends a lease")
        fixed = [port for port in (self.http_port, self.grpc_port, self.link_port, *self.own_link_ports) if port]
        if len(fixed) != len(set(fixed)):
            own = f", and the {self.gateways} own ports of the gateways, {fixed[-self.gateways]} and up," if self.own_link_ports else ""
            raise ValueError(f"http_port, grpc_port and link_port{own} must differ")
        if fixed and max(fixed) > PORT_MAX:
            raise ValueError(f"own_link_port leaves no room for {self.gateways} ports")
        return self

    def own_link_port_of(self, number: int) -> int | None:
        """The port of the gateway of that number that no other one shares; None where there is but one, 0 for any."""
        if self.gateways == 1:
            return None
        first = self.own_link_port
        if first is None and self.link_port:
            first = self.link_port + 1
        return first + number if first else 0

    @property
    def own_link_ports(self) -> tuple[int, ...]:
        """Of all gateways, as far as they are fixed."""
        ports = (self.own_link_port_of(number) for number in range(self.gateways))
        return tuple(port for port in ports if port)

    @property
    def grant_micro_credits(self) -> int:
        return self.grant_credits * MICRO_CREDITS_PER_CREDIT

    @property
    def certificate_authority_dir(self) -> Path:
        return self.data_dir / "ca"

    @property
    def fingerprint_key_file(self) -> Path:
        """What requests that killed engines are hashed with."""
        return self.data_dir / "fingerprint_key"

    @property
    def operator_file(self) -> Path:
        """The operator's URL and key, for the command line on this machine."""
        return self.data_dir / "operator.json"

    @property
    def endpoints_file(self) -> Path:
        """The bound ports; there while the coordinator serves."""
        return self.data_dir / "endpoints.json"

    @property
    def lock_file(self) -> Path:
        return self.data_dir / "coordinator.lock"

    @property
    def ray_token_file(self) -> Path:
        return self.data_dir / "ray_token"


class _LayeredSettings(Settings, BaseSettings):
    """`Settings` that also looks into the environment and a TOML file."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True
    )

    data_dir: Path = Field(default_factory=default_data_dir)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        toml_file = settings_cls.model_config.get("toml_file")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file)


def load_settings(flags: Mapping[str, Any], toml_file: Path | None = None) -> Settings:
    """One `Settings` from flags over `POTLUCK_COORDINATOR_*` over a TOML file; a flag of None was not given.

    Raises:
        PotluckError: INVALID_REQUEST, naming each setting at fault and what is wrong with it.
    """
    if toml_file is not None and not toml_file.is_file():
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"there is no settings file {toml_file}")
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_open_password(given, toml_file)
    layered = type(
        "_LayeredSettings", (_LayeredSettings,), {"model_config": SettingsConfigDict(toml_file=toml_file), "__module__": __name__}
    )
    try:
        values = layered(**given).model_dump()
        return Settings(**values)
    except ValidationError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, _explain(error)) from error
    except (ValueError, RecursionError) as error:  # a TOML file that is not TOML
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"cannot read the settings: {error}") from error


def _refuse_open_password(flags: Mapping[str, Any], toml_file: Path | None) -> None:
    """A database's password is given where only the operator can read it: every program of the machine sees a process's arguments."""
    if _holds_password(flags.get("database_url")):
        raise PotluckError(
            ErrorCode.INVALID_REQUEST,
            "The database URL holds a password, and everybody on this machine can read a command's arguments. Leave the password out, "
            "and put it into ~/.pgpass (or the file that PGPASSFILE names), or the URL into a --settings file that only you can read.",
        )
    if toml_file is None or not toml_file.stat().st_mode & 0o077:
        return
    try:
        settings = tomllib.loads(toml_file.read_text())
    except (ValueError, OSError, RecursionError):
        return  # what is wrong with it is said by whoever reads the settings
    if _holds_password(settings.get("database_url")):
        raise PotluckError(
            ErrorCode.INVALID_REQUEST, f"{toml_file} holds the database's password, and others can read it: chmod 600 {toml_file}"
        )


def _holds_password(url: object) -> bool:
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        return bool(parts.password) or any("password" in name for name in parse_qs(parts.query, keep_blank_values=True))
    except ValueError:
        return "@" in url  # no URL, but perhaps meant to be one


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"setting {'.'.join(str(part) for part in fault['loc']) or 'combination'}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    )
