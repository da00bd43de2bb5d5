"""Writes the generated code beside the .proto files, or with --check says whether it is up to date.

The generator is pinned to the oldest protobuf line that Potluck supports, in an environment of its own (`make protos` builds it), because
generated code refuses to load on an older runtime than its own.
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO_ROOT = Path(__file__).resolve().parent
PACKAGE = Path("potluck_protocol/v1")


def generate(output_root: Path) -> None:
    """Runs protoc over every .proto file, writing under output_root."""
    protos = sorted(str(path.relative_to(PROTO_ROOT)) for path in (PROTO_ROOT / PACKAGE).glob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "--proto_path=."),
            *(f"--python_out={output_root}", f"--grpc_python_out={output_root}"),
            f"--mypy_out=readable_stubs,quiet:{output_root}",
            f"--mypy_grpc_out=quiet:{output_root}",
            *protos,
        ],
        cwd=PROTO_ROOT,
        check=True,
        env={"PATH": str(Path(sys.executable).parent), "PYTHONPATH": ""},
    )


def main() -> int:
    """Generates in place, or compares a fresh generation with what is checked in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the checked-in code differs")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(PROTO_ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.name for path in (Path(folder) / PACKAGE).iterdir()}
        kept = {path.name for path in (PROTO_ROOT / PACKAGE).glob("*_pb2*")}
        _, changed, missing = filecmp.cmpfiles(Path(folder) / PACKAGE, PROTO_ROOT / PACKAGE, sorted(fresh), shallow=False)
        stale = sorted({*changed, *missing, *(kept - fresh)})
    if stale:
        print(f"generated code is out of date: {', '.join(stale)}; run `make protos` and commit the result", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
