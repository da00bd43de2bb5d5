"""Packages small enough to be made in a test: wheels, and a source whose build waits until it is told to go on."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_BACKEND = """
import json, os, pathlib, time, zipfile

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    pathlib.Path({seen!r}).write_text(json.dumps(dict(os.environ)))
    while not pathlib.Path({go_on!r}).exists():
        time.sleep(0.05)
    source = pathlib.Path({wheel!r})
    (pathlib.Path(wheel_directory) / source.name).write_bytes(source.read_bytes())
    return source.name
"""


def write_wheel(folder: Path, package: str, version: str, modules: Mapping[str, str], requires: Sequence[str] = ()) -> Path:
    """A wheel of these modules, by path; whoever installs it finds nothing to complain of."""
    stem = f"{package.replace('-', '_')}-{version}"
    requirements = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    members = {
        **modules,
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{requirements}",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in members.items()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
        archive.writestr(f"{stem}.dist-info/RECORD", "\n".join([*record, f"{stem}.dist-info/RECORD,,"]))
    return path


def write_waiting_source(folder: Path, wheel: Path, *, seen: Path, go_on: Path) -> None:
    """The source that a wheel is built of: its build writes its environment to `seen`, and is done when `go_on` is there."""
    package, version = wheel.name.split("-")[:2]
    stem = f"{package}-{version}"
    members = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": _BACKEND.format(seen=str(seen), go_on=str(go_on), wheel=str(wheel)),
        "PKG-INFO": f"Metadata-Version: 2.2\nName: {package.replace('_', '-')}\nVersion: {version}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{stem}.tar.gz", "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"{stem}/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
