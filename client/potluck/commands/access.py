"""`potluck tokens`, `potluck keys`, `potluck accounts`: who may join, who may ask, and who they are.

Decides how secrets are shown: once, alone on standard output, so that they can be piped into a file. It must not keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

import typer

from potluck import calls
from potluck.commands.session import KeyFileOption, UrlOption, address, connected
from potluck.commands.terminal import JsonOption, duration_seconds, moment, say, show, show_json, show_table
from potluck.results import JoinTokenInfo, KeyQuotas
from potluck.transport import Transport
from potluck_protocol.connection import Invite, is_loopback_host
from potluck_protocol.money import MICRO_CREDITS_PER_CREDIT, credits_text
from potluck_protocol.values import AccountId, KeyPrefix, TokenId

tokens_app = typer.Typer(help="Invites, with which nodes join the pool.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys, with which people use the pool.", no_args_is_help=True)
accounts_app = typer.Typer(help="The people of the pool. Operators only.", no_args_is_help=True)

AccountOption = Annotated[
    str | None, typer.Option("--account", help="Whose, by account id. Else your own; another's takes the operator's key.")
]
InviteLifetime = Annotated[str, typer.Option(metavar="DURATION", help="How long it can be used: 30m, 1h, 7d.")]
KeyLifetime = Annotated[str, typer.Option(metavar="DURATION", help="How long it works: 12h, 30d. 0s: no end.")]


RequestsPerDay = Annotated[int | None, typer.Option(min=0, metavar="COUNT", help="A day of UTC begins anew. 0: no bound.")]
TokensPerDay = Annotated[int | None, typer.Option(min=0, metavar="COUNT", help="Of prompts and answers together. 0: no bound.")]
ConcurrentMax = Annotated[int | None, typer.Option(min=0, metavar="COUNT", help="Requests at a time. 0: no bound.")]
SpendPerDay = Annotated[str | None, typer.Option(metavar="CREDITS", help="Such as 2.5. 0: no bound.")]


@dataclass(frozen=True, slots=True)
class MadeInvite:
    """What `potluck tokens create --json` prints."""

    invite: str
    token_id: TokenId
    account_id: AccountId
    expires_at_unix_ms: int


def make_invite(transport: Transport, url: str, lifetime_seconds: int, account_id: AccountId | None = None) -> tuple[Invite, JoinTokenInfo]:
    """A single-use invite to the pool behind the URL, under the name that the pool gives itself where it has one."""
    document = transport.document()
    token, secret = transport.unary(calls.create_join_token(lifetime_seconds, account_id))
    return Invite(_reachable_url(url, document.host), document.ca_hash, token.token_id, secret.value), token


@tokens_app.command("create")
def create_token(
    lifetime: InviteLifetime = "1h",
    account: AccountOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Print one invite: an address, the pool's fingerprint and a secret that admits one node, once.

    What that node earns goes to the account. Hand the invite over as you would a password, for `potluck node join`.
    """
    lifetime_seconds = duration_seconds(lifetime)
    if lifetime_seconds == 0:
        raise typer.BadParameter("an invite always ends; write how long it can be used, such as 30m, 1h or 7d")
    found = address(url, api_key_file)
    with connected(url, api_key_file) as transport:
        invite, token = make_invite(transport, found.url, lifetime_seconds, AccountId(account) if account else None)
    if as_json:
        show_json(MadeInvite(invite.encode(), token.token_id, token.account_id, token.expires_at_unix_ms))
    else:
        show(invite.encode())
    say(
        f"Good for one node. On its machine: potluck node join, and paste the invite. Take it back: potluck tokens revoke {invite.token_id}"
    )
    if is_loopback_host(urlsplit(invite.url).hostname or ""):
        say("It leads to this machine only. For others, start the coordinator with --host and --public-host.")


@tokens_app.command("list")
def list_tokens(
    account: AccountOption = None, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None
) -> None:
    """List your invites by token id, as the operator another person's with --account; their secrets are not kept."""
    with connected(url, api_key_file) as transport:
        found = transport.unary(calls.list_join_tokens(AccountId(account) if account else None))
    if as_json:
        show_json(found)
        return
    rows = [
        (
            token.token_id,
            token.account_id,
            moment(token.created_at_unix_ms),
            moment(token.expires_at_unix_ms),
            "revoked" if token.revoked else token.used_by_node_id or "unused",
        )
        for token in found
    ]
    show_table(("TOKEN", "ACCOUNT", "CREATED (UTC)", "EXPIRES (UTC)", "USED BY"), rows)


@tokens_app.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(help="From `potluck tokens list`.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Make an unused invite worthless."""
    with connected(url, api_key_file) as transport:
        transport.unary(calls.revoke_join_token(TokenId(token_id)))
    if as_json:
        show_json({"token_id": token_id})
    say(f"Invite {token_id} is revoked.")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What it is for, such as the machine it goes to.")] = "",
    lifetime: KeyLifetime = "0s",
    account: AccountOption = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_day: TokensPerDay = None,
    concurrent_max: ConcurrentMax = None,
    spend_per_day: SpendPerDay = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Print a new API key. It is shown this once; the pool keeps only its hash.

    A key with a bound makes no other keys. What a key has used today is counted by the gateway, and forgotten when that starts anew.

    For example: potluck keys create --name course --requests-per-day 500 --spend-per-day 20
    """
    lifetime_seconds = duration_seconds(lifetime)
    quotas = _quotas(requests_per_day, tokens_per_day, concurrent_max, spend_per_day)
    with connected(url, api_key_file) as transport:
        secret = transport.unary(calls.create_key(name, lifetime_seconds, AccountId(account) if account else None, quotas))
    if as_json:
        show_json({"key_prefix": secret.identifier, "api_key": secret.value})
    else:
        show(secret.value)
    say(f"Keep it like a password. Take it back: potluck keys revoke {secret.identifier}")


@keys_app.command("list")
def list_keys(
    account: AccountOption = None, as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None
) -> None:
    """List your API keys by their prefix; as the operator, another person's with --account."""
    with connected(url, api_key_file) as transport:
        found = transport.unary(calls.list_keys(AccountId(account) if account else None))
    if as_json:
        show_json(found)
        return
    rows = [
        (
            key.key_prefix,
            key.name or "-",
            key.account_id,
            moment(key.created_at_unix_ms),
            moment(key.expires_at_unix_ms),
            "revoked" if key.revoked else "active",
            _quota_words(key.quotas),
        )
        for key in found
    ]
    show_table(("PREFIX", "NAME", "ACCOUNT", "CREATED (UTC)", "EXPIRES (UTC)", "STATE", "MAY USE"), rows)


@keys_app.command("set")
def set_key(
    key_prefix: Annotated[str, typer.Argument(help="From `potluck keys list`.")],
    requests_per_day: RequestsPerDay = None,
    tokens_per_day: TokensPerDay = None,
    concurrent_max: ConcurrentMax = None,
    spend_per_day: SpendPerDay = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Change what an API key may use. What is not named stays as it is; 0 takes a bound away.

    For example: potluck keys set k3xz7q2a --tokens-per-day 1000000 --requests-per-day 0
    """
    quotas = _quotas(requests_per_day, tokens_per_day, concurrent_max, spend_per_day)
    if not quotas:
        raise typer.BadParameter("name at least one bound, such as --requests-per-day 500")
    with connected(url, api_key_file) as transport:
        key = transport.unary(calls.set_key_quotas(KeyPrefix(key_prefix), quotas))
    show_json(key) if as_json else say(f"Key {key_prefix} may use {_quota_words(key.quotas)}.")


@keys_app.command("revoke")
def revoke_key(
    key_prefix: Annotated[str, typer.Argument(help="From `potluck keys list`.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Make an API key worthless for good. New requests with it are refused; answers that are running finish."""
    with connected(url, api_key_file) as transport:
        transport.unary(calls.revoke_key(KeyPrefix(key_prefix)))
    if as_json:
        show_json({"key_prefix": key_prefix})
    say(f"Key {key_prefix} is revoked.")


@accounts_app.command("create")
def create_account(
    name: Annotated[str, typer.Argument(help="The person's name in the pool.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Add a person, with the credits that the pool grants newcomers. Prints the account id."""
    with connected(url, api_key_file) as transport:
        made = transport.unary(calls.create_account(name))
    if as_json:
        show_json(made)
        return
    show(made.account_id)
    say(f"Next: potluck keys create --account {made.account_id}")


@accounts_app.command("list")
def list_accounts(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """List the people of the pool."""
    with connected(url, api_key_file) as transport:
        found = transport.unary(calls.list_accounts())
    if as_json:
        show_json(found)
        return
    rows = [(one.account_id, one.name, "operator" if one.operator else "user", moment(one.created_at_unix_ms)) for one in found]
    show_table(("ACCOUNT", "NAME", "ROLE", "CREATED (UTC)"), rows)


def _reachable_url(url: str, host: str | None) -> str:
    """The URL without its pin, under the pool's own host name where that differs."""
    parts = urlsplit(url)
    if host and host != parts.hostname:
        name = f"[{host}]" if ":" in host else host
        parts = parts._replace(netloc=f"{name}:{parts.port}" if parts.port else name)
    return urlunsplit(parts._replace(fragment=""))


def _quotas(
    requests_per_day: int | None, tokens_per_day: int | None, concurrent_max: int | None, spend_per_day: str | None
) -> dict[str, int]:
    """Those that were named, by the names of `KeyQuotas`."""
    named = {
        "requests_per_day": requests_per_day,
        "tokens_per_day": tokens_per_day,
        "concurrent_max": concurrent_max,
        "spend_micro_credits_per_day": None if spend_per_day is None else _micro_credits(spend_per_day),
    }
    return {name: bound for name, bound in named.items() if bound is not None}


def _micro_credits(text: str) -> int:
    try:
        amount = Decimal(text) * MICRO_CREDITS_PER_CREDIT
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or amount < 0 or amount != amount.to_integral_value():
        raise typer.BadParameter(f"{text!r} is no amount of credits; write one such as 20 or 2.5")
    return int(amount)


def _quota_words(quotas: KeyQuotas) -> str:
    words = (
        (quotas.requests_per_day, f"{quotas.requests_per_day} requests a day"),
        (quotas.tokens_per_day, f"{quotas.tokens_per_day} tokens a day"),
        (quotas.concurrent_max, f"{quotas.concurrent_max} at a time"),
        (quotas.spend_micro_credits_per_day, f"{credits_text(quotas.spend_micro_credits_per_day)} credits a day"),
    )
    return ", ".join(text for bound, text in words if bound) or "all"
