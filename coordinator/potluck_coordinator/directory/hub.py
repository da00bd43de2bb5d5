"""Reads a model's repository on the Hugging Face hub, or a mirror of it, and pins what it holds.

Decides the bounds: how much text is fetched, be it small files or the hub's list of them, and how many files there may be. How long the hub
may take in all is for its caller to say. The hub says sizes, and the hashes of large files; small ones it keeps without a hash, so they
are fetched and hashed here. Weights are never fetched; of a GGUF file its first bytes are, which say what the model is made of. What may be
served is `domain.repository`'s to say. The hub's own client is used, with its addresses (HF_ENDPOINT), credentials and retries. Everything
here blocks, and belongs into a thread.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from potluck_coordinator.domain.fit.gguf_header import GgufHeader, HeaderCutError, gguf_header
from potluck_coordinator.domain.repository import CONFIG, TOKENIZER_CONFIG, WEIGHT_INDEX, Repository, RepositoryFile, files_to_serve
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import PinnedFile

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

SMALL_FILE_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of a file that is fetched to be hashed or read. The hub keeps nothing larger than 10 MB without a hash of its own."""
SMALL_FILES_BYTES_MAX: Final = 128 * 1024 * 1024
"""Of all of them together."""
DESCRIPTION_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of what the hub says of a repository: some hundred bytes a file."""
FILES_MAX: Final = 10_000
"""Of a repository; the largest models have a few hundred."""
GGUF_HEAD_BYTES: Final = (8 * 1024 * 1024, 32 * 1024 * 1024)
"""Of a GGUF file: a vocabulary of 128,000 tokens takes 8 MB of its header, one of 262,144 takes 16."""
RETRY_SECONDS: Final = 5.0
"""When a hub that could not be reached may be asked again."""
TRIES_AGAIN: Final = 5
"""For a file whose transfer broke off, from where it did."""
SOURCE: Final = re.compile(r"hf:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*)")

_ABSENT: Final = "The hub has no such repository, revision or file, or hides it from whoever has no token (HF_TOKEN)."
_READ: Final = frozenset({CONFIG, TOKENIZER_CONFIG})
"""Files whose content decides, hash or not."""

OnProgress = Callable[[str], None]


class _LyingHubError(ValueError):
    """What it sends is not what it announced."""


class _Bounded(io.BytesIO):
    """Takes no more than its bound, whatever the other side sends, and nothing once it is to stop.

    Args:
        size_bytes_max: the bound.
        bound: where it is from, in words.
        stop: ends it.
    """

    def __init__(self, size_bytes_max: int, bound: str, stop: Event) -> None:
        super().__init__()
        self._size_bytes_max = size_bytes_max
        self._bound = bound
        self._stop = stop

    def write(self, data: Any, /) -> int:
        if self._stop.is_set():
            raise _unreachable("it took too long")
        if self.tell() + len(data) > self._size_bytes_max:
            raise _LyingHubError(f"the hub sends more than the {self._size_bytes_max} bytes that {self._bound}")
        return super().write(data)


class Hub:
    """The hub.

    Args:
        endpoint: its address; None: HF_ENDPOINT, else the public one.
        stop: once it is set, nothing more is fetched, and `read` raises COORDINATOR_UNAVAILABLE.
    """

    def __init__(self, endpoint: str | None, stop: Event) -> None:
        self._endpoint = endpoint
        self._stop = stop

    def read(
        self, name: str, revision: str, wanted_file: str | None, on_progress: OnProgress
    ) -> tuple[Repository, tuple[PinnedFile, ...], dict[str, Any]]:
        """The repository at that revision, the files to serve with their pins, and its parsed JSON files by name.

        Of a GGUF file a `GgufHeader` is beside them, or in words why there is none: it can be served without.

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
        documents = _documents(fetched)
        if chosen[0].name.endswith(".gguf"):
            on_progress(f"Reading the header of {chosen[0].name}")
            documents[chosen[0].name] = self._gguf_header(repository, chosen[0])
        return repository, tuple(_pin(file, fetched.get(file.name)) for file in chosen), documents

    def _describe(self, name: str, revision: str) -> Repository:
        info = self._asked(lambda: self._model_info(name, revision))
        if info.siblings is not None and len(info.siblings) > FILES_MAX:
            raise ValueError(f"it has {len(info.siblings)} files; up to {FILES_MAX} are looked at")
        if not all(_makes_sense(sibling) for sibling in info.siblings or ()):
            raise _unreachable("its list of files makes no sense")
        files = tuple(
            RepositoryFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs is not None else "")
            for sibling in info.siblings or ()
            # Names are shown on terminals and in errors; one that would act there is nobody's honest file.
            if sibling.rfilename.isprintable()
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

    def _model_info(self, name: str, revision: str) -> ModelInfo:
        """What the client's own `model_info` asks and answers, but no more of it than fits the bound."""
        from huggingface_hub import HfApi, ModelInfo  # noqa: PLC0415 - heavy, and needed by few

        url = f"{HfApi(endpoint=self._endpoint).endpoint}/api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
        content = _Bounded(DESCRIPTION_BYTES_MAX, "a description may have", self._stop)
        # Tried once, as the client's own: whoever asks again asks from the start.
        self._get(url, content, None, tries_again=0)
        return ModelInfo(**json.loads(content.getvalue()))  # type: ignore[no-untyped-call]

    def _fetch(self, repository: Repository, file: RepositoryFile) -> bytes:
        """A small file's bytes."""
        if file.size_bytes > SMALL_FILE_BYTES_MAX:
            raise ValueError(
                f"{file.name} has {file.size_bytes} bytes and no hash at the hub; up to {SMALL_FILE_BYTES_MAX} are hashed here"
            )
        content = _Bounded(file.size_bytes, "it announced", self._stop)
        self._asked(lambda: self._get(self._url(repository, file), content, file.size_bytes, tries_again=TRIES_AGAIN))
        return content.getvalue()

    def _gguf_header(self, repository: Repository, file: RepositoryFile) -> GgufHeader | str:
        reason = ""
        for head_bytes in sorted({min(size_bytes, file.size_bytes) for size_bytes in GGUF_HEAD_BYTES}):
            content = _Bounded(head_bytes, "were asked for", self._stop)
            part = {"Range": f"bytes=0-{head_bytes - 1}"}
            try:
                # Tried once: to go on where it broke off, the client would ask for the whole rest.
                self._asked(functools.partial(self._get, self._url(repository, file), content, head_bytes, tries_again=0, headers=part))
                return gguf_header(content.getvalue())
            except HeaderCutError as error:
                reason = str(error)
            except (ValueError, PotluckError) as error:
                if self._stop.is_set():
                    raise
                return f"its header could not be read: {error}"
        return reason

    def _url(self, repository: Repository, file: RepositoryFile) -> str:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        return hf_hub_url(repository.name, file.name, revision=repository.commit, endpoint=self._endpoint)

    @staticmethod
    def _get(
        url: str, content: _Bounded, size_bytes: int | None, *, tries_again: int, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        from huggingface_hub.file_download import http_get  # noqa: PLC0415
        from huggingface_hub.utils._headers import build_hf_headers  # noqa: PLC0415
        from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

        disable_progress_bars()
        http_get(url, content, headers={**build_hf_headers(), **headers}, expected_size=size_bytes, _nb_retries=tries_again)

    @staticmethod
    def _asked(question: Callable[[], Any]) -> Any:
        """The hub's answer; its client's failures as ours."""
        from huggingface_hub.errors import (  # noqa: PLC0415
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return question()
        except GatedRepoError as error:
            message = "The repository's owners ask who fetches it: accept their terms at the hub, and set HF_TOKEN for the coordinator."
            # As of one that is hidden: it is the hub's refusal of the coordinator, and says nothing of the caller's key.
            raise PotluckError(ErrorCode.NOT_FOUND, message) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise PotluckError(ErrorCode.NOT_FOUND, _ABSENT) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in {401, 404}:
                raise PotluckError(ErrorCode.NOT_FOUND, _ABSENT) from error
            message = f"The hub refused with HTTP status {status}."
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, message, retry_after_seconds=RETRY_SECONDS) from error
        except (PotluckError, HFValidationError, _LyingHubError):
            raise
        except Exception as error:
            # Its HTTP library's own failures, or an answer that is none: somebody else's page, half of a document.
            raise _unreachable(type(error).__name__) from error


def _makes_sense(sibling: RepoSibling) -> bool:
    """The client hands on whatever it was sent."""
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
    return isinstance(sibling.rfilename, str) and isinstance(sibling.size or 0, int) and isinstance(sha256, str)


def _unreachable(why: str) -> PotluckError:
    message = f"The hub could not be reached: {why}. Is it reachable from the coordinator, or HF_ENDPOINT set to a mirror?"
    return PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, message, retry_after_seconds=RETRY_SECONDS)


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
