"""The catalogue desk over a real database and a hub on loopback: what is pinned and deployed, who wins, and how long a reading may take."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from potluck.commands import models
from potluck_coordinator.desks import Progress
from potluck_coordinator.directory import catalogue as catalogue_module
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.bootstrap import offer
from potluck_coordinator.directory.catalogue import PATIENCE_SECONDS, READING_SECONDS_MAX, READINGS_MAX, Catalogue
from potluck_coordinator.directory.hub import Hub
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.domain.catalogue import Deployment, ServiceTier
from potluck_coordinator.domain.repository import ModelWishes
from potluck_coordinator.storage.catalogue import Origin
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import ModelId
from tests.integration.test_hub import NAME, folder
from tests.support.books import Books
from tests.support.catalogue_text import model_text
from tests.support.hub_server import COMMIT, running_hub
from tests.support.replicas import catalogue_entry

SHIPPED = catalogue_entry("shipped")
OFFER = replace(catalogue_entry("offered", slot_count=3), file=None, repository=f"hf:{NAME}", unchecked="all")
OWN = catalogue_entry("own")
SOURCE = f"hf:{NAME}@main"


@asynccontextmanager
async def desk(database_url):
    """The desk, its books and a hub."""
    books = Books(database_url)
    with running_hub() as hub:
        hub.repositories[NAME] = folder()
        try:
            await books.found()
            await offer(books.store, [SHIPPED, OFFER], [OWN])
            nodes = Nodes(books.store, SnapshotBoard(1), books.clock, 15.0)
            await nodes.refresh()
            made = Catalogue(books.store, nodes, [SHIPPED, OFFER], lambda stop: Hub(hub.url, stop))
            try:
                yield made, books, hub
            finally:
                made.close()
        finally:
            books.store.close()


async def pinned(made, wishes=None, source=SOURCE):
    """The record, however often the desk says that it is not there yet."""
    while True:
        found = await made.pin_model(source, wishes or ModelWishes())
        if not isinstance(found, Progress):
            return found


async def refusal(awaitable) -> PotluckError:
    with pytest.raises(PotluckError) as failure:
        await awaitable
    return failure.value


async def test_a_repository_takes_the_place_of_the_offer_that_waited_for_it_and_can_be_deployed(database_url):
    async with desk(database_url) as (made, _, _):
        before = await refusal(made.deploy(Deployment(ModelId("offered"), 1)))
        assert (before.code, "potluck models add hf:org/tiny@REVISION --as offered" in before.message) == (ErrorCode.INVALID_REQUEST, True)
        record = await pinned(made)
        assert (record.entry.model_id, record.origin, record.deployment) == ("offered", "added", None)
        assert (record.entry.file.source, record.entry.slot_count, record.entry.unchecked) == (f"hf:{NAME}@{COMMIT}", 3, "")
        await made.deploy(Deployment(ModelId("offered"), 2, ServiceTier.FLEX))
        (status,) = [one for one in await made.list_deployments() if one.deployment.model_id == "offered"]
        assert (status.deployment.replica_count, status.deployment.tier, status.shortfall) == (2, "flex", "the pool has no node")


async def test_a_repository_that_nobody_offered_is_called_as_it_is_or_as_the_operator_says(database_url):
    async with desk(database_url) as (made, _, hub):
        hub.repositories["org/Other"] = folder()
        assert (await pinned(made, source="hf:org/Other@main")).entry.model_id == "other"
        assert (await pinned(made, ModelWishes(model_id="mine"), "hf:org/Other@main")).entry.model_id == "mine"


async def test_an_entry_of_the_catalogue_file_is_changed_there_alone(database_url):
    async with desk(database_url) as (made, _, _):
        for attempt in (
            pinned(made, ModelWishes(model_id="own")),
            made.add_models(model_text("own")),
        ):
            assert (await refusal(attempt)).code is ErrorCode.ALREADY_EXISTS
        for model_id in ("own", "shipped"):
            assert "potluck undeploy" in (await refusal(made.remove_model(ModelId(model_id)))).message


async def test_what_was_added_over_a_shipped_entry_gives_way_to_it_when_it_is_removed(database_url):
    async with desk(database_url) as (made, _, _):
        await made.add_models(model_text("shipped"))
        assert (await made.get_model(ModelId("shipped"))).origin == "added"
        await made.remove_model(ModelId("shipped"))
        record = await made.get_model(ModelId("shipped"))
        assert (record.origin, record.entry, record.deployment) == ("built_in", SHIPPED, None)


async def test_an_offer_takes_no_deployed_models_place_and_one_that_came_before_is_explained(database_url):
    unpinned = "\n".join(line for line in model_text("shipped").splitlines() if not line.startswith(("file_name", "sha256", "size_bytes")))
    unpinned = unpinned.replace("path:/srv/models", "hf:org/shipped") + '\npinned = false\nunchecked = "all"\n'
    async with desk(database_url) as (made, books, _):
        shipped = ModelId("shipped")
        await made.deploy(Deployment(shipped, 1))
        failure = await refusal(made.add_models(unpinned))
        assert (failure.code, failure.message.split(":")[0]) == (ErrorCode.INVALID_REQUEST, "shipped")
        assert (await made.get_model(shipped)).entry == SHIPPED
        # An older coordinator took it.
        await books.store.run(lambda work: work.catalogue.put((replace(OFFER, model_id=shipped),), Origin.ADDED))
        assert await made.explain(shipped) == ()
        await made.undeploy(shipped)
        await made.add_models(unpinned)
        assert (await made.get_model(shipped)).entry.file is None


async def test_what_the_operator_said_outlives_a_restart(database_url):
    async with desk(database_url) as (made, books, _):
        await pinned(made)
        await made.undeploy(ModelId("shipped"))
        await made.deploy(Deployment(ModelId("own"), 3, ServiceTier.FLEX))
        await offer(books.store, [SHIPPED, OFFER, catalogue_entry("new")], [OWN])
        assert (await made.get_model(ModelId("offered"))).origin == "added"
        wishes = {one.deployment.model_id: one.deployment for one in await made.list_deployments()}
        assert wishes == {
            "new": Deployment(ModelId("new")),
            "own": Deployment(ModelId("own"), 3, ServiceTier.FLEX),
        }


async def test_a_slow_hub_is_waited_for_with_words_and_asked_once(database_url, monkeypatch):
    monkeypatch.setattr(catalogue_module, "PATIENCE_SECONDS", 0.1)
    async with desk(database_url) as (made, _, hub):
        hub.waiting = threading.Event()
        first, second = await asyncio.gather(made.pin_model(SOURCE, ModelWishes()), made.pin_model(SOURCE, ModelWishes()))
        assert isinstance(first, Progress)
        assert isinstance(second, Progress)
        async with asyncio.timeout(10):
            while not (await made.pin_model(SOURCE, ModelWishes())).words.startswith("Hashing config.json"):
                await asyncio.sleep(0.02)
        hub.waiting.set()
        assert (await pinned(made)).entry.model_id == "offered"
        assert len([path for path in hub.requests if path.startswith("/api/")]) == 1


async def test_no_reading_takes_for_ever_and_no_more_than_a_few_run(database_url, monkeypatch):
    monkeypatch.setattr(catalogue_module, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_module, "READING_SECONDS_MAX", 0.3)
    async with desk(database_url) as (made, _, hub):
        hub.waiting = threading.Event()
        for number in range(READINGS_MAX):
            assert isinstance(await made.pin_model(SOURCE, ModelWishes(model_id=f"model{number}")), Progress)
        assert (await refusal(made.pin_model(SOURCE, ModelWishes(model_id="one-more")))).code is ErrorCode.NO_CAPACITY
        await asyncio.sleep(0.4)
        hub.waiting.set()
        late = await refusal(pinned(made, ModelWishes(model_id="model0")))
        assert ("took too long" in late.message, late.code) == (True, ErrorCode.COORDINATOR_UNAVAILABLE)
        assert (await refusal(made.get_model(ModelId("model0")))).code is ErrorCode.MODEL_NOT_FOUND


def test_the_command_waits_a_little_longer_than_the_coordinator_reads():
    assert models.PIN_SECONDS_MAX - 200 <= READING_SECONDS_MAX < models.PIN_SECONDS_MAX - PATIENCE_SECONDS


async def test_what_was_read_for_nobody_answers_no_later_question(database_url, monkeypatch):
    monkeypatch.setattr(catalogue_module, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_module, "DONE_SECONDS_MAX", 0.1)
    async with desk(database_url) as (made, _, hub):
        hub.waiting = threading.Event()
        assert isinstance(await made.pin_model(SOURCE, ModelWishes()), Progress)
        hub.waiting.set()
        async with asyncio.timeout(10):
            while made._readings:
                await asyncio.sleep(0.01)
        hub.repositories[NAME] = folder(tokenizer__json=b'{"a": 1}')
        assert {pin.size_bytes for pin in (await pinned(made)).entry.file.files if pin.file_name == "tokenizer.json"} == {8}


async def test_what_cannot_be_served_is_refused_with_the_reason_and_may_be_tried_again(database_url):
    async with desk(database_url) as (made, _, hub):
        good = hub.repositories[NAME]
        hub.repositories[NAME] = {"a.gguf": 5_000, "b.gguf": 6_000}
        assert "say which one with --file" in (await refusal(pinned(made))).message
        hub.repositories[NAME] = good
        assert (await pinned(made)).entry.model_id == "offered"


async def test_an_engine_that_reads_other_files_is_refused_with_the_one_that_reads_them(database_url):
    async with desk(database_url) as (made, books, hub):
        hub.repositories[NAME] = {"a.gguf": 5_000}
        failure = await refusal(pinned(made, ModelWishes(model_id="new", engine_kinds=("vllm",))))
        assert (failure.code, "add it anew with --engine llamacpp" in failure.message) == (ErrorCode.INVALID_REQUEST, True)
        # One that was added before this was looked at.
        await books.store.run(lambda work: work.catalogue.put([replace(SHIPPED, engine_kinds=("sglang",))], Origin.ADDED))
        failure = await refusal(made.deploy(Deployment(ModelId("shipped"), 1)))
        assert (failure.code, "sglang reads safetensors files, and it has gguf" in failure.message) == (ErrorCode.INVALID_REQUEST, True)


async def test_words_of_a_repository_that_would_act_on_a_terminal_do_not_get_there(database_url):
    async with desk(database_url) as (made, _, hub):
        hub.card = {"license": "MIT\x1b[2J\n"}
        record = await pinned(made)
        assert record.entry.licence == "MIT [2J "
        hub.repositories[NAME] = folder() | {"config.json": json.dumps({"a\x1b]0;b\x07": {"auto_map": {}}}).encode(), "x\n.gguf": 5_000}
        message = (await refusal(pinned(made))).message
        assert ("auto_map" in message, message.isprintable()) == (True, True)


@pytest.mark.parametrize(
    ("licence", "files", "words"),
    [
        ("x" * 9_000_000, {}, "its licence has 9000000 characters"),
        ("mit", {"model__safetensors": 1 << 63}, "model.safetensors has 9223372036854775808 bytes"),
        ("mit", {"Tokenizer__json": b"{}"}, "are one file on some disks"),
        ("mit", {"config__json": b"[]"}, "its config.json is no JSON object"),
    ],
)
async def test_what_could_not_be_told_or_served_is_not_kept(database_url, licence, files, words):
    async with desk(database_url) as (made, _, hub):
        hub.card["license"] = licence
        hub.repositories[NAME] = folder(**files)
        failure = await refusal(pinned(made, ModelWishes(model_id="m")))
        assert (failure.code, words in failure.message, len(failure.message) < 300) == (ErrorCode.INVALID_REQUEST, True, True)
        assert (await refusal(made.get_model(ModelId("m")))).code is ErrorCode.MODEL_NOT_FOUND


async def test_a_catalogue_has_no_more_models_than_are_told_at_once(database_url, monkeypatch):
    monkeypatch.setattr(catalogue_module, "MODELS_MAX", 4)
    async with desk(database_url) as (made, _, _):
        await made.add_models(model_text("fourth"))
        failure = await refusal(made.add_models(model_text("fifth")))
        assert "more than 4 models; `potluck models remove MODEL` makes room" in failure.message
        await made.add_models(model_text("fourth"))
        await made.remove_model(ModelId("fourth"))
        await made.add_models(model_text("fifth"))


async def test_nothing_unknown_is_deployed_undeployed_removed_or_explained(database_url):
    async with desk(database_url) as (made, _, _):
        gone = ModelId("gone")
        for attempt in (
            made.deploy(Deployment(gone)),
            made.undeploy(gone),
            made.remove_model(gone),
            made.get_model(gone),
            made.explain(gone),
        ):
            assert (await refusal(attempt)).code is ErrorCode.MODEL_NOT_FOUND
        await made.undeploy(ModelId("shipped"))
        # Once more, for an answer that was lost.
        await made.undeploy(ModelId("shipped"))
        assert "potluck deploy shipped" in (await refusal(made.explain(ModelId("shipped")))).message
        assert "potluck models add hf:org/tiny@REVISION --as offered" in (await refusal(made.explain(ModelId("offered")))).message


def test_the_hubs_address_may_be_a_mirrors(database_url):
    code = (
        "from threading import Event\nfrom potluck_coordinator.directory.hub import Hub\n"
        f"print(Hub(None, Event()).read({NAME!r}, 'main', None, lambda _: None)[0].commit)"
    )
    with running_hub() as hub:
        hub.repositories[NAME] = folder()
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(database_url)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == COMMIT
