"""`potluck coordinator refused`: the requests that are refused for good, and how the operator lifts one.

Decides what is shown of them: their keyed hashes and days, for nothing else is kept. Those that are only suspected are not shown, but can
be forgotten as well. It works on the books of a coordinator that is stopped: while one runs, it has them to itself. It makes no books where
there are none. What nodes refuse by themselves it cannot lift, and says so.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from potluck_coordinator.data_folder import locked
from potluck_coordinator.storage.database import parse_url
from potluck_coordinator.storage.store import Store
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from potluck_coordinator.settings import Settings
    from potluck_coordinator.storage.unit_of_work import UnitOfWork


NODES_GO_ON: Final = (
    "A node where engines died of it more than once may refuse it for an hour after the last of them, or until its agent is started anew."
)
"""Nodes know requests by keys of their own, so that nobody can tell them which one was lifted."""


async def refused(settings: Settings, lift: str | None, *, as_json: bool = False) -> list[str]:
    """The lines to show, or one JSON document; `lift` is a request's number, or "all".

    Raises:
        PotluckError: COORDINATOR_UNAVAILABLE while a coordinator runs; NOT_FOUND for a number of none, or where there is no pool;
            INVALID_REQUEST for a database URL that is none.
    """
    if not _holds_pool(settings):
        raise PotluckError(ErrorCode.NOT_FOUND, f"There is no pool in {settings.data_dir}; name its folder with --data-dir.")
    with locked(settings):
        store = Store(settings.database_url)
        try:
            store.migrate()
            return await store.run(lambda work: _listed(work, as_json=as_json) if lift is None else _lifted(work, lift, as_json=as_json))
        finally:
            store.close()


def _holds_pool(settings: Settings) -> bool:
    """Whether a coordinator has served from the data folder and has its books still, of which a file is looked for, and no server asked."""
    url = parse_url(settings.database_url)
    has_books = url.get_backend_name() != "sqlite" or (bool(url.database) and Path(url.database or "").is_file())
    return has_books and any(path.exists() for path in (settings.certificate_authority_dir, settings.fingerprint_key_file))


def _listed(work: UnitOfWork, *, as_json: bool) -> list[str]:
    at = {one.fingerprint.hex(): one.refused_at_unix_ms for one in work.lethal_requests.all() if one.refused_at_unix_ms is not None}
    if as_json:
        return [json.dumps([{"number": number, "refused_at_unix_ms": ms} for number, ms in at.items()], indent=2)]
    lines = [f"{number}  {datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M} UTC" for number, ms in at.items()]
    return lines or ["No request is refused for good."]


def _lifted(work: UnitOfWork, lift: str, *, as_json: bool) -> list[str]:
    lifted = [one for one in work.lethal_requests.all() if lift.lower() in {"all", one.fingerprint.hex()}]
    if not lifted and lift.lower() != "all":
        raise PotluckError(ErrorCode.NOT_FOUND, f"No request {lift} is refused; `potluck coordinator refused` lists those that are.")
    for one in lifted:
        work.lethal_requests.remove(one.fingerprint)
    refused_count = sum(one.refused_at_unix_ms is not None for one in lifted)
    suspect_count = len(lifted) - refused_count
    if as_json:
        return [json.dumps({"lifted_count": refused_count, "forgotten_suspect_count": suspect_count}, indent=2)]
    if lift.lower() == "all":
        words = f"{refused_count} refused no longer, {suspect_count} suspected no longer."
    elif refused_count:
        words = f"{lift} is refused no longer."
    else:
        words = f"{lift} was not refused, only suspected; it is no longer."
    return [words, NODES_GO_ON] if refused_count else [words]
