"""`potluck coordinator …`: the operator's command line, and the only caller of `load_settings`, which reads the environment for it.

Decides the flags and what an operator is told. It must not know how a coordinator starts; `serve` does.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from potluck_coordinator.settings import Settings, default_data_dir, load_settings
from potluck_protocol.connection import certificate_hash, is_loopback_host, pinned_url
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.observe import configure_logging

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(name="coordinator", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _coordinator() -> None:
    """Run the operator's side of a pool.

    Start with `potluck coordinator serve`. In another terminal, `potluck tokens create` prints an invite for a volunteer, and
    `potluck keys create` a key for someone who wants to use the pool.
    """


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, show_default=False)


DataDir = Annotated[Path | None, _option("Folder for the database and the pool's keys; made private to you. Back it up: it is the pool.")]
Host = Annotated[str | None, _option("Address to listen on; 0.0.0.0 for all. [127.0.0.1]")]
HttpPort = Annotated[int | None, _option("OpenAI API. 0: any free port. [8600]")]
GrpcPort = Annotated[int | None, _option("SDK, and nodes that join; TLS. [8601]")]
LinkPort = Annotated[int | None, _option("Links of nodes; mutual TLS. [8602]")]
PublicHost = Annotated[str | None, _option("Name or address that others reach you by, if not the one in the URL they use.")]
TlsCertificate = Annotated[Path | None, _option("Serve https with this PEM chain.")]
TlsKey = Annotated[Path | None, _option("The private key to it.")]
DatabaseUrl = Annotated[str | None, _option("postgresql+psycopg://USER@HOST/NAME, its password in ~/.pgpass. [SQLite in the data folder]")]
CatalogueFile = Annotated[Path | None, _option("TOML file with models beside the built-in one.", "--catalogue")]
RayAddress = Annotated[str | None, _option("Join your own Ray cluster instead; Ray's own RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH apply.")]
Gateways = Annotated[
    int | None,
    _option("Processes that relay, on the cluster's machines in turn; those of one machine share its ports. [1]"),
]
GrantCredits = Annotated[int | None, _option("Credits of a new account. [1000]")]
FeeBasisPoints = Annotated[int | None, _option("The pool's share; 500 is 5 %. [500]")]
DefaultTierRate = Annotated[str | None, _option("What an account may ask for in the default tier, such as 20/minute. [100/hour]")]
LogFormat = Annotated[str | None, _option("console or json. [console]")]
LogLevel = Annotated[str | None, _option("debug, info, warning or error. [info]")]
SettingsFile = Annotated[Path | None, _option("TOML file with any of these, names with underscores, and the rarer ones.", "--settings")]


@app.command()
def serve(
    data_dir: DataDir = None,
    host: Host = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
    link_port: LinkPort = None,
    public_host: PublicHost = None,
    http_tls_certificate: TlsCertificate = None,
    http_tls_key: TlsKey = None,
    database_url: DatabaseUrl = None,
    catalogue_file: CatalogueFile = None,
    ray_address: RayAddress = None,
    gateways: Gateways = None,
    grant_credits: GrantCredits = None,
    fee_basis_points: FeeBasisPoints = None,
    default_tier_rate: DefaultTierRate = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    settings_file: SettingsFile = None,
) -> None:
    """Serve a pool until Ctrl-C.

    Flags win over POTLUCK_COORDINATOR_… variables (POTLUCK_COORDINATOR_HTTP_PORT=9000), and those over the --settings file.

    Logs go to standard error; prompts, answers and secrets are in none of them.
    """
    flags = {name: value for name, value in locals().items() if name != "settings_file"}  # each is a setting of that name
    try:
        loaded = load_settings(flags, settings_file)
    except PotluckError as error:
        _fail(error, EXIT_USAGE)
    configure_logging(json=loaded.log_format == "json", level=loaded.log_level)
    from potluck_coordinator.serve import serve as serve_until_stopped  # noqa: PLC0415 - `--help` need not wait for the whole coordinator

    try:
        serve_until_stopped(loaded, _say_ready)
    except PotluckError as error:
        _fail(error, EXIT_USAGE if error.code is ErrorCode.INVALID_REQUEST else EXIT_FAILED)
    except KeyboardInterrupt:
        _fail(PotluckError(ErrorCode.CANCELLED, "Stopped before the coordinator was ready."), EXIT_FAILED)


@app.command()
def restart(
    drain_seconds: Annotated[float, _option("How long a gateway waits for its answers; what is left then is broken off. [300]")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each step.")] = False,
    data_dir: DataDir = None,
    settings_file: SettingsFile = None,
) -> None:
    """Start the gateways of the coordinator on this machine anew, one after another, without breaking an answer off.

    Each takes nothing new, lets its answers end and its nodes go to the others, stops, and serves again before the next one begins. A
    single gateway does the same, and nobody is served while it starts. The directory goes on; stop the coordinator to upgrade it.
    """
    from potluck_coordinator.restart_command import restart as steps  # noqa: PLC0415

    try:
        for line in steps(load_settings({"data_dir": data_dir}, settings_file), drain_seconds, as_json=as_json):
            typer.echo(line)
    except PotluckError as error:
        _fail(error, EXIT_FAILED)


@app.command()
def refused(
    lift: Annotated[str | None, _option("Refuse a request no longer: its number, or all; all forgets suspects, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    settings_file: SettingsFile = None,
) -> None:
    """List the requests that are refused for good, for two engines died of them. Stop the coordinator first."""
    from potluck_coordinator.refused_command import refused as listed  # noqa: PLC0415 - `--help` need not wait for the database

    try:
        settings = load_settings({"data_dir": data_dir, "database_url": database_url}, settings_file)
        lines = asyncio.run(listed(settings, lift, as_json=as_json))
    except PotluckError as error:
        _fail(error, EXIT_FAILED)
    typer.echo("\n".join(lines))


def public_url(settings: Settings, ca_certificate_pem: str) -> str:
    """The URL to hand out: with the CA's hash where plain HTTP leaves this machine, so that users can tell a forged answer."""
    secure = settings.http_tls_certificate is not None
    host = settings.public_host or settings.host
    authority = f"[{host}]" if ":" in host else host
    url = f"{'https' if secure else 'http'}://{authority}:{settings.http_port}"
    return url if secure or is_loopback_host(host) else pinned_url(url, certificate_hash(ca_certificate_pem))


def _say_ready(settings: Settings) -> None:
    """Where nobody can read it the pool serves all the same: a service needs no standard output, which other commands are ended for."""
    url = public_url(settings, (settings.certificate_authority_dir / "ca.pem").read_text())
    default_folder = settings.data_dir == default_data_dir()
    hint = "" if default_folder else f"POTLUCK_COORDINATOR_DATA_DIR={settings.data_dir} "
    words = (
        f"Potluck coordinator is ready.\n"
        f"  http  {url}  (OpenAI API: {url.partition('#')[0]}/v1)\n"
        f"  grpc  {settings.host}:{settings.grpc_port}  (SDK, nodes that join)\n"
        f"  link  {settings.host}:{settings.link_port}  (links of nodes)\n"
        f"Operator's key: {settings.operator_file}; `potluck` on this machine finds it there.\n"
        f"Next: {hint}potluck tokens create\n"
        f"Stop: Ctrl-C"
    )
    with suppress(SystemExit):
        typer.echo(words)


def _fail(error: PotluckError, exit_code: int) -> None:
    typer.echo(f"error: {error.message}", err=True)
    raise typer.Exit(exit_code)
