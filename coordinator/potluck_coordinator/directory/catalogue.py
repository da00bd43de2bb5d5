"""The operator's models, and the wishes to have them served.

Decides who wins where an entry is added twice, what may be removed, and what may be wished. A repository is read in a thread of its own
while the operator waits; what was read is put into the catalogue at once. It must not know how the hub is asked (`hub`), nor what follows
from a wish (`nodes`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from threading import Event
from typing import Final

import structlog

from potluck_coordinator.catalogue_file import parse_catalogue
from potluck_coordinator.desks import DeploymentRecord, ModelRecord, NodeVerdictRecord, Progress
from potluck_coordinator.directory.hub import SOURCE, Hub
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment, engine_refusal, not_pinned
from potluck_coordinator.domain.entry_rules import MODELS_MAX, WORD_CHARACTERS_MAX, entry_refusal
from potluck_coordinator.domain.planning.explain import Standing
from potluck_coordinator.domain.repository import ModelWishes, entry_of_repository, model_id_of
from potluck_coordinator.storage.catalogue import Origin
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.bounds import printable
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import ModelId, NodeId

PATIENCE_SECONDS: Final = 5.0
"""How long one call waits for the hub before it answers with progress."""
READINGS_MAX: Final = 4
"""Repositories that are read at a time."""
READING_SECONDS_MAX: Final = 1700.0
"""For one repository: its list of files, and a few small ones. A little less than `potluck models add` waits, so that it hears why."""
DONE_SECONDS_MAX: Final = 60.0
"""How long what was read waits for whoever asked: then it is old, and the hub is asked anew."""
_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Reading:
    """A repository on its way into the catalogue."""

    task: asyncio.Task[ModelRecord]
    stop: Event
    """Ends the thread that reads."""
    words: list[str]
    """Of its progress, the newest last."""


class Catalogue:
    """The `CatalogueDesk`.

    Args:
        store: the books.
        nodes: who plans, and knows how far wishes are met.
        shipped: the entries that come with Potluck.
        hub: makes the hub's client; its argument ends it.
    """

    def __init__(self, store: Store, nodes: Nodes, shipped: Iterable[CatalogueEntry], hub: Callable[[Event], Hub]) -> None:
        self._store = store
        self._nodes = nodes
        self._shipped = {entry.model_id: entry for entry in shipped}
        self._hub = hub
        self._readings: dict[tuple[str, ModelWishes], _Reading] = {}

    async def add_models(self, catalogue_toml: str) -> tuple[ModelRecord, ...]:
        """As `CatalogueDesk.add_models`."""
        # A parser in Python, and a text from outside: the loop has better things to do.
        return await self._put(await asyncio.to_thread(parse_catalogue, catalogue_toml, "The text"))

    async def pin_model(self, source: str, wishes: ModelWishes) -> ModelRecord | Progress:
        """As `CatalogueDesk.pin_model`."""
        reading = self._readings.get((source, wishes))
        if reading is None:
            reading = self._begin_reading(source, wishes)
        done, _ = await asyncio.wait({reading.task}, timeout=PATIENCE_SECONDS)
        if not done:
            return Progress(reading.words[-1])
        self._readings.pop((source, wishes), None)
        return reading.task.result()

    async def remove_model(self, model_id: ModelId) -> None:
        """As `CatalogueDesk.remove_model`."""

        def remove(work: UnitOfWork) -> None:
            _known(work, model_id)
            if work.catalogue.origins()[model_id] is not Origin.ADDED:
                message = f"{model_id} is in a catalogue file, not added by command. To have it served no more: potluck undeploy {model_id}"
                raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="model_id")
            work.catalogue.remove(model_id)
            if model_id in self._shipped:
                work.catalogue.put((self._shipped[model_id],), Origin.BUILT_IN)

        await self._store.run(remove)
        _log.info("model_removed", model_id=model_id)
        await self._nodes.refresh()

    async def get_model(self, model_id: ModelId) -> ModelRecord:
        return await self._store.run(lambda work: _record(work, model_id))

    async def deploy(self, deployment: Deployment) -> None:
        def wish(work: UnitOfWork) -> None:
            entry = _known(work, deployment.model_id)
            if entry.file is None:
                message = f"{deployment.model_id} cannot be deployed: {not_pinned(entry)}"
                raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="model_id")
            if refusal := engine_refusal(entry):
                raise PotluckError(ErrorCode.INVALID_REQUEST, f"{deployment.model_id} cannot be deployed: {refusal}.", param="model_id")
            work.catalogue.deploy(deployment)

        await self._store.run(wish)
        _log.info("deployed", model_id=deployment.model_id, replica_count=deployment.replica_count, tier=deployment.tier)
        await self._nodes.refresh()

    async def undeploy(self, model_id: ModelId) -> None:
        """As `CatalogueDesk.undeploy`."""

        def withdraw(work: UnitOfWork) -> None:
            _known(work, model_id)
            work.catalogue.withdraw(model_id)

        await self._store.run(withdraw)
        _log.info("undeployed", model_id=model_id)
        await self._nodes.refresh()

    async def list_deployments(self) -> tuple[DeploymentRecord, ...]:
        standings, waiting_counts = await self._nodes.standings()
        deployments = await self._store.run(lambda work: work.catalogue.deployments())
        nothing = Standing(0, 0, "the catalogue does not say what its files are")
        return tuple(
            DeploymentRecord(
                deployment=deployment,
                ready_count=standing.ready_count,
                starting_count=standing.starting_count,
                waiting_request_count=waiting_counts.get(deployment.model_id, 0),
                shortfall=standing.shortfall,
            )
            for deployment in deployments
            for standing in (standings.get(deployment.model_id, nothing),)
        )

    async def explain(self, model_id: ModelId) -> tuple[NodeVerdictRecord, ...]:
        """As `CatalogueDesk.explain`."""
        record = await self.get_model(model_id)
        if record.deployment is None:
            why = not_pinned(record.entry) if record.entry.file is None else f"to have it served, `potluck deploy {model_id}`"
            raise PotluckError(ErrorCode.NOT_FOUND, f"{model_id} is not deployed: {why}", param="model_id")
        await self._nodes.refresh()
        verdicts, names, group_words = await self._nodes.verdicts(model_id)
        rows = tuple(NodeVerdictRecord(each.node_id, names.get(each.node_id, ""), each.verdict, each.reason) for each in verdicts)
        return (*rows, NodeVerdictRecord(NodeId(""), "", "group", group_words)) if group_words else rows

    def close(self) -> None:
        """Ends what is being read."""
        for reading in self._readings.values():
            reading.stop.set()
            reading.task.cancel()

    def _begin_reading(self, source: str, wishes: ModelWishes) -> _Reading:
        parsed = SOURCE.fullmatch(source)
        if parsed is None:
            message = f"{source!r} is not hf:ORG/NAME@REVISION; a revision is a branch, a tag or a commit, such as main."
            raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="source")
        self._readings = {key: reading for key, reading in self._readings.items() if not reading.task.done()}
        if len(self._readings) >= READINGS_MAX:
            message = f"{READINGS_MAX} repositories are being read; try again when one of them is done."
            raise PotluckError(ErrorCode.NO_CAPACITY, message, retry_after_seconds=PATIENCE_SECONDS)
        words, stop = [f"Asking the hub for {parsed['name']}"], Event()
        reading = self._read(source, parsed["name"], parsed["revision"], wishes=wishes, hub=self._hub(stop), on_progress=words.append)
        task = asyncio.create_task(reading)
        # The thread ends at its next byte, and with it the task.
        asyncio.get_running_loop().call_later(READING_SECONDS_MAX, stop.set)
        # One that nobody asks for again must not complain of that.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._readings[source, wishes] = begun = _Reading(task, stop, words)
        task.add_done_callback(lambda _: asyncio.get_running_loop().call_later(DONE_SECONDS_MAX, self._drop, (source, wishes), begun))
        return begun

    def _drop(self, key: tuple[str, ModelWishes], reading: _Reading) -> None:
        """A reading that nobody asked for again; another of the same repository may have begun since."""
        if self._readings.get(key) is reading:
            del self._readings[key]

    async def _read(
        self, source: str, name: str, revision: str, *, wishes: ModelWishes, hub: Hub, on_progress: Callable[[str], None]
    ) -> ModelRecord:
        try:
            repository, pins, documents = await asyncio.to_thread(hub.read, name, revision, wishes.file_name, on_progress)
            offers = await self._store.run(lambda work: work.catalogue.entries())
            wanted_id = ModelId(wishes.model_id) if wishes.model_id is not None else None
            offer = next((entry for entry in offers.values() if entry.file is None and _is_meant(entry, wanted_id, name)), None)
            entry = entry_of_repository(repository, pins, documents, wishes, offer)
        except ValueError as error:
            # It may quote the repository, which is somebody's.
            message = f"{source} cannot be served: {printable(str(error))[:WORD_CHARACTERS_MAX]}."
            raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="source") from None
        # What is unchecked may quote the repository at any length.
        entry = replace(entry, licence=printable(entry.licence), unchecked=printable(entry.unchecked)[:WORD_CHARACTERS_MAX])
        if refusal := entry_refusal(entry):
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"{source} cannot be served: {refusal}.", param="source")
        return (await self._put((entry,)))[0]

    async def _put(self, entries: tuple[CatalogueEntry, ...]) -> tuple[ModelRecord, ...]:
        def put(work: UnitOfWork) -> tuple[ModelRecord, ...]:
            origins = work.catalogue.origins()
            if fixed := [entry.model_id for entry in entries if origins.get(entry.model_id) is Origin.FILE]:
                message = f"{', '.join(fixed)}: the coordinator's catalogue file has an entry of that name, and is read at each start."
                raise PotluckError(ErrorCode.ALREADY_EXISTS, f"{message} Change it there, or choose another name.", param="model_id")
            deployed = {deployment.model_id for deployment in work.catalogue.deployments()}
            if offers := [entry.model_id for entry in entries if entry.file is None and entry.model_id in deployed]:
                message = f"{', '.join(offers)}: deployed, and an entry without files is not served. Undeploy it first, or pin its files."
                raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="model_id")
            if len(origins.keys() | {entry.model_id for entry in entries}) > MODELS_MAX:
                message = f"The catalogue would have more than {MODELS_MAX} models; `potluck models remove MODEL` makes room."
                raise PotluckError(ErrorCode.INVALID_REQUEST, message)
            work.catalogue.put(entries, Origin.ADDED)
            return tuple(_record(work, entry.model_id) for entry in entries)

        records = await self._store.run(put)
        _log.info("models_added", model_ids=[entry.model_id for entry in entries])
        await self._nodes.refresh()
        return records


def _is_meant(offer: CatalogueEntry, wanted_id: ModelId | None, repository_name: str) -> bool:
    """Whether the repository is what the offer was waiting for: by the name that was asked for, else by its own."""
    if wanted_id is not None:
        return offer.model_id == wanted_id
    return offer.repository == f"hf:{repository_name}" or offer.model_id == model_id_of(repository_name)


def _known(work: UnitOfWork, model_id: ModelId) -> CatalogueEntry:
    entry = work.catalogue.entries().get(model_id)
    if entry is None:
        message = f"The catalogue has no model {model_id!r}; `potluck models list` shows those that it has."
        raise PotluckError(ErrorCode.MODEL_NOT_FOUND, message, param="model_id")
    return entry


def _record(work: UnitOfWork, model_id: ModelId) -> ModelRecord:
    entry = _known(work, model_id)
    deployment = next((each for each in work.catalogue.deployments() if each.model_id == model_id), None)
    return ModelRecord(entry, work.catalogue.origins()[model_id], deployment)
