"""`potluck models`: what the pool can serve, and as its operator what it may.

Decides the columns, which options go with a repository only, and how long a command waits for the coordinator to read one. It must not know
how models are chosen, nor what of a repository may be served; the coordinator does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from potluck import calls, catalogue_calls
from potluck.commands.progress import LiveLine, megabytes
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import JsonOption, moment, say, show, show_json, show_table
from potluck.errors import PoolTimeoutError
from potluck.results import CatalogueModel, Deployment, ModelInfo, Progress
from potluck.transport import Transport
from potluck_protocol.bounds import CATALOGUE_CHARACTERS_MAX
from potluck_protocol.errors import ErrorCode
from potluck_protocol.values import ModelId

REPOSITORY_PREFIX: Final = "hf:"
ATTACHED_PREFIX: Final = "attach:"
"""Of the source of a model that owners' own engines serve; it has no files and needs none."""
PIN_SECONDS_MAX: Final = 1800.0
"""For one repository: the hub may be slow, and the coordinator hashes its small files itself."""
PROGRESS_PAUSE_SECONDS: Final = 0.2
"""Between two calls for more, so that a coordinator which answers at once is not asked in a busy loop."""
_COLUMNS: Final = ("MODEL", "READY", "CONTEXT", "IN", "OUT", "LICENCE")

models_app = typer.Typer(invoke_without_command=True)


def _option(help_text: str, name: str, metavar: str = "N", least: int | None = None) -> Any:
    return typer.Option(name, metavar=metavar, min=least, max=None if least is None else 2**31 - 1, help=help_text, show_default=False)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id, from `potluck models list`.", show_default=False)]
_What = Annotated[
    str, typer.Argument(metavar="FILE.toml|hf:ORG/NAME@REVISION", help="A catalogue file, or a repository.", show_default=False)
]
_As = Annotated[str | None, _option("The id to serve it under. Else the repository's name.", "--as", "ID")]
_File = Annotated[str | None, _option("Which of several GGUF files.", "--file", "NAME")]
_PriceIn = Annotated[int | None, _option("Credits for a million tokens of the prompt.", "--price-in", least=0)]
_PriceOut = Annotated[int | None, _option("Credits for a million tokens of the answer.", "--price-out", least=0)]
_Engines = Annotated[
    list[str] | None, _option("An engine that can serve it, the preferred one first. May be given again.", "--engine", "KIND")
]
_Context = Annotated[int | None, _option("Tokens of one request, prompt and answer together.", "--context", least=1)]
_Slots = Annotated[int | None, _option("Requests that one replica answers at a time.", "--slots", least=1)]


@models_app.callback()
def _models(context: typer.Context, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the models that the pool serves, what they cost, and how many replicas are ready.

    Prices are credits for a million tokens, of the prompt (IN) and of the answer (OUT). `potluck models list` names also those that the
    operator has yet to add.
    """
    if context.invoked_subcommand is not None:
        return
    with connected(url, api_key_file) as transport:
        found = transport.unary(calls.list_models())
    if as_json:
        show_json(found)
    else:
        show_table(_COLUMNS, [_row(model) for model in found])


@models_app.command("list")
def list_models(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the whole catalogue.

    A model whose files are not pinned yet is an offer: its note is the command that pins them. Prices are credits for a million tokens,
    of the prompt (IN) and of the answer (OUT).

    For example: potluck models list
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(calls.list_models(with_offers=True))
    if as_json:
        show_json(found)
    else:
        rows = [(*_row(model), _not_pinned(model.model_id, model.offered_repository)) for model in found]
        show_table((*_COLUMNS, "NOTE"), rows)


@models_app.command("show")
def show_model(model: ModelArgument, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Show all about one model: where it is from, its limits and prices, its files and their hashes, and the wish for it.

    For example: potluck models show my-model
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(catalogue_calls.get_model(ModelId(model)))
    if as_json:
        show_json(found)
        return
    for name, value in _facts(found):
        show(f"{name:<12}  {value}")
    if found.files:
        show("")
        show_table(("FILE", "SIZE", "SHA256"), [(file.file_name, _size(file.size_bytes), file.sha256) for file in found.files])
    if found.architecture:
        show("")
        show_table(("ARCHITECTURE", "NUMBER"), [fact for fact in found.architecture.items() if fact[1]])


@models_app.command("add")
def add_model(
    what: _What,
    model_id: _As = None,
    file_name: _File = None,
    price_in: _PriceIn = None,
    price_out: _PriceOut = None,
    engine: _Engines = None,
    context: _Context = None,
    slots: _Slots = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Put models into the catalogue. Operators only.

    They come from a file, or from a repository of the Hugging Face hub. Of a repository the coordinator takes the formats that hold no
    code, safetensors and GGUF, and pins each file by its hash at one commit. What no option says comes from the offer of the same id
    (`potluck models list`), else it is a default. To change an entry, add it again.

    For example: potluck models add hf:ORG/NAME@main --as my-model --price-in 2 --price-out 6

    Or: potluck models add my-models.toml
    """
    said: dict[str, Any] = {
        "model_id": model_id,
        "file_name": file_name,
        "prompt_price_micro_credits_per_token": price_in,
        "completion_price_micro_credits_per_token": price_out,
        "engine_kinds": tuple(engine or ()),
        "context_length_tokens": context,
        "slot_count": slots,
    }
    added: tuple[CatalogueModel, ...]
    if what.startswith(REPOSITORY_PREFIX):
        with connected(url, api_key_file) as transport:
            added = (_pinned(transport, what, said),)
    elif any(word not in {None, ()} for word in said.values()):
        raise typer.BadParameter("options describe a repository, hf:ORG/NAME@REVISION; a catalogue file says all of it itself")
    else:
        text = _catalogue_text(what)
        with connected(url, api_key_file) as transport:
            added = transport.unary(catalogue_calls.add_model_text(text))
    if as_json:
        show_json(added)
    else:
        _show_added(added)


@models_app.command("remove")
def remove_model(model: ModelArgument, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Take an added model away. Operators only.

    Those that `potluck models add` has added can be; with one goes the wish to have it served.

    For example: potluck models remove my-model
    """
    with connected(url, api_key_file) as transport:
        transport.unary(catalogue_calls.remove_model(ModelId(model)))
    if as_json:
        show_json({"model_id": model})
    say(f"{model} is no longer in the catalogue.")


def wish_words(deployment: Deployment) -> str:
    """How many replicas are wished, and in which tier."""
    count = deployment.replica_count
    how_many = "one replica on every node that can serve it" if count is None else f"{count} replica{'' if count == 1 else 's'}"
    return f"{how_many}, tier {deployment.tier}"


def _row(model: ModelInfo) -> tuple[object, ...]:
    return (
        model.model_id,
        model.ready_replica_count,
        model.context_length_tokens,
        # A micro-credit a token is a credit a million tokens.
        model.prompt_price_micro_credits_per_token,
        model.completion_price_micro_credits_per_token,
        model.licence or "-",
    )


def _not_pinned(model_id: ModelId, repository: str) -> str:
    """What stands between an offer and its first answer; empty for a model that is none."""
    return f"not pinned: potluck models add {repository}@REVISION --as {model_id}" if repository else ""


def _facts(model: CatalogueModel) -> list[tuple[str, object]]:
    """Line by line, without those that there is nothing to say of."""
    lines: list[tuple[str, object]] = [
        ("model", model.model_id),
        ("origin", model.origin),
        ("source", model.source),
        ("files", "" if _is_servable(model) else _not_pinned(model.model_id, model.source)),
        ("size", _total_size(model)),
        ("engines", ", ".join(model.engine_kinds)),
        ("quantization", model.quantization),
        ("context", f"{model.context_length_tokens} tokens a request, prompt and answer together"),
        ("slots", f"{model.slot_count} requests at a time, where a replica has room for so many"),
        ("price in", f"{model.prompt_price_micro_credits_per_token} credits a million tokens"),
        ("price out", f"{model.completion_price_micro_credits_per_token} credits a million tokens"),
        ("licence", model.licence),
        ("endpoints", ", ".join(model.endpoints)),
        ("created", moment(model.created_at_unix_seconds * 1000)[:10] if model.created_at_unix_seconds else ""),
        ("unchecked", model.unchecked),
        ("deployed", "no" if model.deployment is None else wish_words(model.deployment)),
    ]
    return [line for line in lines if line[1]]


def _is_servable(model: CatalogueModel) -> bool:
    return bool(model.files) or model.source.startswith(ATTACHED_PREFIX)


def _total_size(model: CatalogueModel) -> str:
    """Of all files; empty where there are none."""
    return _size(sum(file.size_bytes for file in model.files)) if model.files else ""


def _size(byte_count: int) -> str:
    return f"{byte_count / 1e9:.1f} GB" if byte_count >= 1e9 else megabytes(byte_count)


def _catalogue_text(name: str) -> str:
    """The file's text. Of one that is too long only so much that the coordinator says so."""
    path = Path(name)
    if not path.is_file():
        raise typer.BadParameter(f"there is no catalogue file {name}; a repository is written hf:ORG/NAME@REVISION")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(CATALOGUE_CHARACTERS_MAX + 1)
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{name} is not text in UTF-8") from None


def _pinned(transport: Transport, source: str, said: dict[str, Any]) -> CatalogueModel:
    """The repository's entry, once the coordinator has read it; raises PoolTimeoutError."""
    call = catalogue_calls.add_model_from_hub(source, **said)
    give_up_at = time.monotonic() + PIN_SECONDS_MAX
    with LiveLine() as line:
        while isinstance(found := transport.unary(call), Progress):
            if time.monotonic() >= give_up_at:
                message = f"{source} is not read after {PIN_SECONDS_MAX / 60:.0f} min; the same command again waits for more."
                raise PoolTimeoutError(ErrorCode.CANCELLED, message)
            line.update(found.words)
            time.sleep(PROGRESS_PAUSE_SECONDS)
    return found


def _show_added(added: Sequence[CatalogueModel]) -> None:
    rows = [
        (
            model.model_id,
            model.source,
            len(model.files),
            _total_size(model) or "-",
            ", ".join(model.engine_kinds),
            model.licence or "-",
        )
        for model in added
    ]
    show_table(("MODEL", "SOURCE", "FILES", "SIZE", "ENGINES", "LICENCE"), rows)
    for model in added:
        if model.unchecked:
            say(f"Not checked of {model.model_id}: {model.unchecked}.")
        if not _is_servable(model):
            say(f"{model.model_id} is {_not_pinned(model.model_id, model.source)}")
        elif model.deployment is None:
            say(f"To have it served: potluck deploy {model.model_id}")
