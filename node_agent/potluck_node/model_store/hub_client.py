"""Downloads one file from a hub, as a process of its own that can be watched and ended.

`python -m potluck_node.model_store.hub_client REPOSITORY REVISION FILE TARGET`. Decides that a download goes on where TARGET ends. It must
not know whether the file is the right one; `store` verifies it. huggingface_hub is imported here and nowhere else: its addresses,
credentials, retries and ranges are used, and not its `hf_hub_download`, which since version 2 begins every file anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from potluck_node.lifeline import exit_with_parent


def download(repository: str, revision: str, file_name: str, target: Path) -> None:
    """Makes TARGET whole; what is in it is the file's beginning."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415 - half a second, after the lifeline
    from huggingface_hub.file_download import http_get  # noqa: PLC0415 - as above
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415 - lazily exported; as above

    url = hf_hub_url(repository, file_name, revision=revision)
    headers = build_hf_headers()
    size_bytes = get_hf_file_metadata(url, headers=headers).size
    # Unbuffered: what has arrived counts, whatever ends this process.
    with target.open("ab", buffering=0) as file:
        if size_bytes is not None and file.tell() > size_bytes:
            file.truncate(0)
        http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size_bytes)


def main() -> None:
    exit_with_parent()
    repository, revision, file_name, target = sys.argv[1:]
    download(repository, revision, file_name, Path(target))


if __name__ == "__main__":
    main()
