"""Models of several files: a folder of exactly these, whatever the source, and cheap the second time."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import structlog.testing
from aiohttp import web

from potluck_node.domain.strict_json import BadModelError
from potluck_node.model_store import assembled, checker
from potluck_node.model_store.download import FetchFailedError
from potluck_node.model_store.verification import FileMismatchError
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import EngineState, ModelFile, ModelId
from tests.integration.test_model_store import ensured, store_in, wheel_in
from tests.support.engines import children_of, running, supervisor_of, wished
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model_folder import SHARDS, good_files, model_of, pin, pinned_folder, safetensors, write_files

GOOD = good_files()
PINS = [pin(name, content) for name, content in GOOD.items()]


def contents(folder: Path) -> dict[str, bytes]:
    """All that an engine could open there."""
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hashed(monkeypatch):
    """The names of files that are hashed from now on."""
    from potluck_node.model_store import verification

    names: list[str] = []
    real = verification.sha256_of

    def counted(path, stop):
        names.append(path.name)
        return real(path, stop)

    monkeypatch.setattr(verification, "sha256_of", counted)
    return names


@pytest.fixture
def no_check(monkeypatch):
    """From when it is called, looking into a file fails the test."""

    def start():
        async def unexpected(*_):
            raise AssertionError("files that were looked into and not touched are not looked into again")

        monkeypatch.setattr("potluck_node.model_store.store.check_files", unexpected)

    return start


async def test_owners_folder_stays_as_it_is_and_the_engine_sees_the_pinned_files_only(tmp_path, hashed, no_check):
    owners = tmp_path / "owners"
    model = pinned_folder(owners, GOOD)
    write_files(owners, {"modeling_evil.py": b"import os", "sub/more.json": b"{}"})
    before = {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in owners.rglob("*")}
    store = store_in(tmp_path)
    folder = await ensured(store, model)
    assert contents(folder) == GOOD
    assert {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in owners.rglob("*")} == before
    assert (folder / SHARDS[0]).samefile(owners / SHARDS[0]), "a link, not a copy"
    assert folder.stat().st_mode & 0o777 == 0o500
    assert sorted(hashed) == sorted(GOOD)

    hashed.clear()
    no_check()
    assert await ensured(store_in(tmp_path), model) == folder
    assert hashed == []


async def test_a_write_to_the_owners_file_is_noticed_through_the_link_and_the_file_taken_again_once_it_is_right(tmp_path):
    model = pinned_folder(tmp_path / "owners", GOOD)
    store = store_in(tmp_path)
    folder = await ensured(store, model)
    shard = tmp_path / "owners" / SHARDS[1]
    shard.write_bytes(b"\0" + GOOD[SHARDS[1]][1:])
    with pytest.raises(FileMismatchError) as caught:
        await ensured(store, model)
    assert str(caught.value) == f"{SHARDS[1]} does not match the catalogue"
    shard.write_bytes(GOOD[SHARDS[1]])
    assert await ensured(store, model) == folder
    assert contents(folder) == GOOD


@pytest.mark.parametrize("linked", [True, False])
async def test_a_file_that_the_owner_replaced_or_removed_is_not_served_from_the_link_or_the_copy(tmp_path, monkeypatch, linked):
    if not linked:
        monkeypatch.setattr(assembled, "link_into", lambda *_: False)
    model = pinned_folder(tmp_path / "owners", GOOD)
    store = store_in(tmp_path)
    folder = await ensured(store, model)
    before = (folder / SHARDS[0]).stat().st_ino
    assert await ensured(store, model) == folder
    assert (folder / SHARDS[0]).stat().st_ino == before, "what still is the owner's is not taken again"
    another = tmp_path / "owners" / "another"
    another.write_bytes(b"\0" + GOOD[SHARDS[1]][1:])
    another.replace(tmp_path / "owners" / SHARDS[1])
    with pytest.raises(FileMismatchError, match="does not match the catalogue"):
        await ensured(store, model)
    (tmp_path / "owners" / SHARDS[1]).unlink()
    with pytest.raises(FetchFailedError, match=f"^{SHARDS[1]}: No such file"):
        await ensured(store, model)


@pytest.mark.parametrize("stray", ["modeling_evil.py", "sub/config.json", "sub"])
async def test_what_does_not_belong_into_the_folder_is_removed_before_an_engine_sees_it(tmp_path, stray):
    model = pinned_folder(tmp_path / "owners", GOOD)
    store = store_in(tmp_path)
    folder = await ensured(store, model)
    folder.chmod(0o700)
    if stray == "sub":
        (folder / stray).symlink_to(tmp_path)
    else:
        write_files(folder, {stray: b"{}"})
    with structlog.testing.capture_logs() as logs:
        assert await ensured(store, model) == folder
    assert contents(folder) == GOOD
    assert [log["event"] for log in logs] == ["model_folder_damaged"]
    assert stray.split("/")[0] in logs[0]["reason"]


async def test_a_link_in_the_folder_that_took_a_files_place_is_replaced(tmp_path):
    model = pinned_folder(tmp_path / "owners", GOOD)
    store = store_in(tmp_path)
    folder = await ensured(store, model)
    folder.chmod(0o700)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "owners" / "config.json")
    assert contents(await ensured(store, model)) == GOOD


async def test_links_to_the_owners_files_go_when_nothing_wishes_for_them(tmp_path):
    model = pinned_folder(tmp_path / "owners", GOOD)
    other = pinned_folder(tmp_path / "others", {**GOOD, "config.json": b"{}"})
    store = store_in(tmp_path)
    folder = await ensured(store, model)
    await ensured(store, other, keep=frozenset({model}))
    assert folder.exists()
    await ensured(store, other)
    assert not folder.exists(), "the owner's files would stay on the disk after they were deleted"


async def test_files_of_another_disk_are_copied_within_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(assembled, "link_into", lambda *_: False)
    model = pinned_folder(tmp_path / "owners", GOOD)
    folder = await ensured(store_in(tmp_path, budget=model.total_bytes), model)
    assert contents(folder) == GOOD
    assert not (folder / SHARDS[0]).samefile(tmp_path / "owners" / SHARDS[0])
    assembled.remove(tmp_path / "cache")
    with pytest.raises(FetchFailedError, match="bytes of disk are missing"):
        await ensured(store_in(tmp_path, budget=model.total_bytes - 1), model)


async def test_several_files_come_out_of_one_wheel_and_share_what_another_model_has(tmp_path, hashed, no_check):
    wheel = wheel_in(tmp_path / "wheels", {f"tiny/{name}": content for name, content in GOOD.items()})
    model = model_of("wheel:tiny-model==1.0", PINS)
    store = store_in(tmp_path, wheels=wheel.parent)
    seen: list[int] = []
    folder = await store.ensure(model, keep=frozenset(), on_progress=seen.append)
    assert contents(folder) == GOOD
    assert sorted(hashed) == sorted(GOOD), "each file is hashed once, where the engine finds it"
    assert seen[-1] > 0
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*")} == {0o400}
    wheel.unlink()

    newer = model_of("wheel:tiny-model==1.0", [pinned for pinned in PINS if pinned.file_name != "merges.txt"])
    shared = await ensured(store, newer, keep=frozenset({model}))
    assert contents(shared) == {name: content for name, content in GOOD.items() if name != "merges.txt"}
    assert (shared / SHARDS[0]).samefile(folder / SHARDS[0]), "nothing is fetched or kept twice"
    no_check()
    hashed.clear()
    assert await ensured(store, model, keep=frozenset({newer})) == folder
    assert hashed == []


async def test_one_wrong_file_of_a_wheel_is_the_only_one_dropped(tmp_path):
    wheels = wheel_in(tmp_path / "wheels", {f"tiny/{name}": content for name, content in GOOD.items()}).parent
    wrong = [replace(pinned, sha256="0" * 64) if pinned.file_name == "merges.txt" else pinned for pinned in PINS]
    with pytest.raises(FileMismatchError, match=r"^merges.txt has the sha256 [0-9a-f]{64}, and the catalogue says 0{64}$"):
        await ensured(store_in(tmp_path, wheels=wheels), model_of("wheel:tiny-model==1.0", wrong))
    kept = {path.name for path in (tmp_path / "cache" / "models").iterdir()}
    assert kept < {pinned.sha256 for pinned in wrong}
    assert "0" * 64 not in kept


async def test_damage_to_a_kept_file_is_mended_by_fetching_that_file(tmp_path):
    wheels = wheel_in(tmp_path / "wheels", {f"tiny/{name}": content for name, content in GOOD.items()}).parent
    model = model_of("wheel:tiny-model==1.0", PINS)
    store = store_in(tmp_path, wheels=wheels)
    folder = await ensured(store, model)
    (folder / SHARDS[0]).chmod(0o600)
    (folder / SHARDS[0]).write_bytes(b"\0" + GOOD[SHARDS[0]][1:])
    assert contents(await ensured(store, model)) == GOOD


async def test_budget_counts_a_shared_file_once_and_lets_what_nothing_wishes_for_go(tmp_path):
    wheels = wheel_in(tmp_path / "wheels", {f"tiny/{name}": content for name, content in GOOD.items()}).parent
    large = safetensors({"weight": bytes(1200)})
    wheel_in(tmp_path / "wheels", {"m/large.safetensors": large}, name="large")
    model = model_of("wheel:tiny-model==1.0", PINS)
    shared = model_of("wheel:tiny-model==1.0", PINS[1:])
    store = store_in(tmp_path, budget=model.total_bytes + 1000, wheels=wheels)
    folders = [await ensured(store, model), await ensured(store, shared)]
    other = model_of("wheel:large==1.0", [pin("large.safetensors", large)])
    with pytest.raises(FetchFailedError, match="every model kept there is in use"):
        await ensured(store, other, keep=frozenset({model, shared}))
    assert contents(folders[0]) == GOOD
    await ensured(store, other)
    assert [folder.exists() for folder in folders] == [False, False]


class Hub:
    """A hub that has the good files, and stops in the middle of one if a test wants it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        headers = {"etag": '"tag"', "x-repo-commit": "a" * 40, "accept-ranges": "bytes", "content-length": str(len(GOOD[name]))}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        self.asked.append(name)
        if name == self.broken:
            return web.Response(status=404)
        return web.Response(body=GOOD[name], headers=headers)


@pytest.fixture
async def hub():
    hub = Hub()
    application = web.Application()
    application.router.add_route("*", "/org/tiny/resolve/main/{name:.*}", hub.serve)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield hub
    await runner.cleanup()


async def test_files_of_a_hub_come_one_by_one_and_what_is_here_is_not_asked_for_again(tmp_path, hub):
    names = ("config.json", *SHARDS)
    model = model_of("hf:org/tiny@main", [pin(name, GOOD[name]) for name in names])
    store = store_in(tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    hub.broken = SHARDS[1]
    seen: list[int] = []
    with pytest.raises(FetchFailedError, match="404"):
        await store.ensure(model, keep=frozenset(), on_progress=seen.append)
    assert seen == sorted(seen), "progress counts all files together"
    assert next((tmp_path / "cache" / "folders").iterdir()).stat().st_mode & 0o777 == 0o700, "not finished"
    hub.asked.clear()
    hub.broken = ""
    assert contents(await ensured(store, model)) == {name: GOOD[name] for name in names}
    assert hub.asked == [SHARDS[1]]


async def test_an_index_is_right_for_one_set_of_files_only(tmp_path):
    model = pinned_folder(tmp_path / "owners", GOOD)
    store = store_in(tmp_path)
    await ensured(store, model)
    with pytest.raises(BadModelError, match=r"index.json is not loaded: its weight_map names 'model-00002-of-00002.safetensors'"):
        await ensured(store, model_of(model.source, [pinned for pinned in PINS if pinned.file_name != SHARDS[1]]))


async def test_bytes_that_were_sound_under_one_name_are_looked_into_again_under_another(tmp_path):
    content = json.dumps({"harmless": True}).encode()
    write_files(tmp_path / "owners", {"a.json": content, "a.safetensors": content})
    store = store_in(tmp_path)
    source = f"path:{tmp_path / 'owners'}"
    await ensured(store, model_of(source, [pin("a.json", content)]))
    with pytest.raises(BadModelError, match=r"^a.safetensors is not loaded: its header would be longer than the file"):
        await ensured(store, model_of(source, [pin("a.safetensors", content)]))


async def test_a_vocabulary_is_no_config_although_both_are_json(tmp_path):
    content = b'{"auto_map": 7}'
    write_files(tmp_path / "owners", {"vocab.json": content, "config.json": content})
    store = store_in(tmp_path)
    source = f"path:{tmp_path / 'owners'}"
    await ensured(store, model_of(source, [pin("vocab.json", content)]))
    with pytest.raises(BadModelError, match=r"^config.json is not loaded: it says 'auto_map'"):
        await ensured(store, model_of(source, [pin("config.json", content)]))


async def test_the_owners_files_do_not_count_as_the_pools(tmp_path):
    wheels = wheel_in(tmp_path / "wheels", {"m/config.json": b"{}"}).parent
    store = store_in(tmp_path, budget=10, wheels=wheels)
    local = pinned_folder(tmp_path / "owners", GOOD)
    await ensured(store, local)
    await ensured(store, model_of("wheel:tiny-model==1.0", [pin("config.json", b"{}")]), keep=frozenset({local}))


async def test_two_names_for_the_same_bytes_are_two_files_of_the_folder(tmp_path):
    files = {"added_tokens.json": b"{}", "generation_config.json": b"{}", "sub/config.json": b"{}"}
    wheels = wheel_in(tmp_path / "wheels", {f"tiny/{name}": content for name, content in files.items()}).parent
    model = model_of("wheel:tiny-model==1.0", [pin(name, content) for name, content in files.items()])
    assert contents(await ensured(store_in(tmp_path, wheels=wheels), model)) == files


async def test_what_is_sound_by_its_hash_and_bad_is_kept_and_not_fetched_again(tmp_path):
    bad = json.dumps({"auto_map": {"AutoModel": "evil.Model"}}).encode()
    wheel = wheel_in(tmp_path / "wheels", {"tiny/config.json": bad})
    model = model_of("wheel:tiny-model==1.0", [pin("config.json", bad)])
    store = store_in(tmp_path, wheels=wheel.parent)
    for _ in range(2):
        with pytest.raises(BadModelError, match=r"^config.json is not loaded: it says 'auto_map'"):
            await ensured(store, model)
        wheel.unlink(missing_ok=True)


async def test_an_attached_engines_model_has_no_files(tmp_path):
    assert await ensured(store_in(tmp_path), ModelFile(ModelId("m"), "attach:llama3.2:3b", "", "", 0)) == Path("llama3.2:3b")


async def test_llamacpp_takes_a_model_in_several_files(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", tensors_per_file=8)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    assert len(files) > 1
    model = pinned_folder(tmp_path / "owners", {f"sub/{name}": files[name] for name in sorted(files, reverse=True)})
    async with running(supervisor_of(tmp_path, SystemClock())) as node:
        node.wish(wished(model, kind="llamacpp"))
        await node.until_state(EngineState.READY)
        first = pinned_folder(tmp_path / "owners", {f"sub/{min(files)}": files[min(files)]})
        node.wish(wished(first, kind="llamacpp"))
        status = (await node.until(lambda statuses: len(statuses) == 1 and bool(statuses[0].failure)))[0]
        assert f"is one of {len(files)} files, and the catalogue pins 1" in status.failure, "it would take the others from beside it"


LOOK = """
import resource, sys
from pathlib import Path
from potluck_node.model_store import checker

bound = int(sys.argv[2])
if bound:
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    checker._check(Path(sys.argv[1]), "config.json", frozenset())
else:
    checker._bound_memory()
    print(*resource.getrlimit(resource.RLIMIT_AS))
"""


def test_a_file_that_takes_too_much_memory_to_look_into_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"[" + b"[]," * 8_000_000 + b"1]")
    done = subprocess.run([sys.executable, "-c", LOOK, str(tmp_path), str(2**29)], capture_output=True, text=True, check=False)
    assert "BadModelError: config.json is not loaded: to look into it takes more than" in done.stderr
    done = subprocess.run([sys.executable, "-c", LOOK, str(tmp_path), "0"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(checker.MEMORY_BYTES_MAX)] * 2, "the bound was lowered to save the test its time"


async def test_a_cancelled_check_leaves_no_process(tmp_path, monkeypatch):
    started = asyncio.Event()

    async def never_ends(_):
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("potluck_node.model_store.checker.ChildProcess.wait", never_ends)
    working = asyncio.create_task(ensured(store_in(tmp_path), pinned_folder(tmp_path / "owners", GOOD)))
    async with asyncio.timeout(10):
        await started.wait()
    assert len(children_of(os.getpid())) == 1
    working.cancel()
    await asyncio.wait({working})
    assert children_of(os.getpid()) == []
