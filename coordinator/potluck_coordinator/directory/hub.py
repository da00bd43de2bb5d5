"""Reads a model's repository on the Hugging Face hub, or a mirror of it, and pins what it holds.

Decides the bounds: how much text is fetched, and how long the hub may take to answer one question. The hub says sizes, and the hashes of
large files; small ones it keeps without a hash, so they are fetched and hashed here. Weights are never fetched. What may be served is
`domain.repository`'s to say. The hub's own client is used, with its addresses (HF_ENDPOINT), credentials and retries. Everything here
blocks, and belongs into a thread.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any, Final

from potluck_coordinator.domain.repository import CONFIG, TOKENIZER_CONFIG, WEIGHT_INDEX, Repository, RepositoryFile, files_to_serve
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import PinnedFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SMALL_FILE_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of a file that is fetched to be hashed or read. The hub keeps nothing larger than 10 MB without a hash of its own."""
SMALL_FILES_BYTES_MAX: Final = 128 * 1024 * 1024
"""Of all of them together."""
ANSWER_SECONDS_MAX: Final = 20.0
SOURCE: Final = re.compile(r"hf:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*)")

_ABSENT: Final = "The hub has no such repository, revision or file, or hides it from whoever has no token (HF_TOKEN)."
_READ: Final = frozenset({CONFIG, TOKENIZER_CONFIG})
"""Files whose content decides, hash or not."""

OnProgress = Callable[[str], None]


class _Bounded(io.BytesIO):
    """Takes no more than its bound, whatever the other side sends, and nothing once it is to stop."""

    def __init__(self, size_bytes_max: int, stop: Event) -> None:
        super().__init__()
        self._size_bytes_max = size_bytes_max
        self._stop = stop

    def write(self, data: Any, /) -> int:
        if self._stop.is_set():
            raise ValueError("the hub took too long")
        if self.tell() + len(data) > self._size_bytes_max:
            raise ValueError(f"the hub sends more than the {self._size_bytes_max} bytes that it announced")
        return super().write(data)


class Hub:
    """The hub.

    Args:
        endpoint: its address; None: HF_ENDPOINT, else the public one.
        stop: once it is set, nothing more is fetched, and `read` raises ValueError.
    """

    def __init__(self, endpoint: str | None, stop: Event) -> None:
        self._endpoint = endpoint
        self._stop = stop

    def read(
        self, name: str, revision: str, wanted_file: str | None, on_progress: OnProgress
    ) -> tuple[Repository, tuple[PinnedFile, ...], dict[str, Any]]:
        """The repository at that revision, the files to serve with their pins, and its parsed JSON files by name.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE where the hub cannot be asked, NOT_FOUND for what it does not have.
            ValueError: there is nothing to serve, with the reason.
        """
        on_progress(f"Asking the hub for {name}")
        repository = self._describe(name, revision)
        known = {file.name: file for file in repository.files}
        fetched: dict[str, bytes] = {}
        if wanted_file is None and WEIGHT_INDEX in known:
            fetched[WEIGHT_INDEX] = self._fetch(repository, known[WEIGHT_INDEX])
        chosen = files_to_serve(repository.files, wanted_file, _weight_map(fetched.get(WEIGHT_INDEX)))
        to_fetch = [file for file in chosen if file.name not in fetched and (not file.sha256 or file.name in _READ)]
        if sum(file.size_bytes for file in to_fetch) > SMALL_FILES_BYTES_MAX:
            raise ValueError(f"its small files are larger than {SMALL_FILES_BYTES_MAX} bytes together")
        for number, file in enumerate(to_fetch, 1):
            on_progress(f"Hashing {file.name}, {number} of {len(to_fetch)} small files")
            fetched[file.name] = self._fetch(repository, file)
        return repository, tuple(_pin(file, fetched.get(file.name)) for file in chosen), _documents(fetched)

    def _describe(self, name: str, revision: str) -> Repository:
        info = self._asked(lambda: self._api().model_info(name, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS_MAX))
        files = tuple(
            RepositoryFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs is not None else "")
            for sibling in info.siblings or ()
        )
        if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"The hub names no commit for {name}@{revision}.")
        licence = getattr(info.card_data, "license", None)
        return Repository(
            name=name,
            commit=info.sha or "",
            files=files,
            licence=licence if isinstance(licence, str) else "",
            created_at_unix_seconds=int(info.created_at.timestamp()) if info.created_at is not None else 0,
            gated=bool(info.gated),
        )

    def _fetch(self, repository: Repository, file: RepositoryFile) -> bytes:
        """A small file's bytes."""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - heavy, and needed by few
        from huggingface_hub.file_download import http_get  # noqa: PLC0415
        from huggingface_hub.utils._headers import build_hf_headers  # noqa: PLC0415
        from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

        if file.size_bytes > SMALL_FILE_BYTES_MAX:
            raise ValueError(
                f"{file.name} has {file.size_bytes} bytes and no hash at the hub; up to {SMALL_FILE_BYTES_MAX} are hashed here"
            )
        disable_progress_bars()
        url = hf_hub_url(repository.name, file.name, revision=repository.commit, endpoint=self._endpoint)
        content = _Bounded(file.size_bytes, self._stop)
        self._asked(lambda: http_get(url, content, headers=build_hf_headers(), expected_size=file.size_bytes))
        return content.getvalue()

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi  # noqa: PLC0415 - heavy, and needed by few

        return HfApi(endpoint=self._endpoint)

    @staticmethod
    def _asked(question: Callable[[], Any]) -> Any:
        """The hub's answer; its client's failures as ours."""
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError  # noqa: PLC0415

        try:
            return question()
        except GatedRepoError as error:
            message = "The repository's owners ask who fetches it: accept their terms at the hub, and set HF_TOKEN for the coordinator."
            raise PotluckError(ErrorCode.PERMISSION_DENIED, message) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise PotluckError(ErrorCode.NOT_FOUND, _ABSENT) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in {401, 404}:
                raise PotluckError(ErrorCode.NOT_FOUND, _ABSENT) from error
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"The hub refused with HTTP status {status}.") from error
        except ValueError:
            raise
        except Exception as error:
            # Its HTTP library's own failures: the hub cannot be reached, or broke off.
            message = (
                f"The hub cannot be asked: {type(error).__name__}. Is it reachable from the coordinator, or HF_ENDPOINT set to a mirror?"
            )
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, message) from error


def _weight_map(content: bytes | None) -> dict[str, str] | None:
    if content is None:
        return None
    document = _parsed(WEIGHT_INDEX, content)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{WEIGHT_INDEX} does not say which file holds which weights")
    return weight_map


def _pin(file: RepositoryFile, content: bytes | None) -> PinnedFile:
    found = hashlib.sha256(content).hexdigest() if content is not None else ""
    if file.sha256 and found and file.sha256 != found:
        raise ValueError(f"{file.name} does not hash to what the hub says")
    return PinnedFile(file.name, file.sha256 or found, file.size_bytes)


def _documents(fetched: dict[str, bytes]) -> dict[str, Any]:
    return {name: _parsed(name, content) for name, content in fetched.items() if name.endswith(".json")}


def _parsed(name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
