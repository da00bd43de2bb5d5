"""What stands for an engine of another environment: it shares memory, has a worker, is well at once, and shows what it was told.

python foreign_engine.py PORT FOLDER [--listen ADDRESS:PORT | --connect ADDRESS:PORT] [--exit STATUS]
"""

from __future__ import annotations

import argparse
import http.server
import json
import mmap
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def share_memory(name: str) -> mmap.mmap:
    descriptor = os.open(f"/dev/shm/{name}", os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return mmap.mmap(descriptor, mmap.PAGESIZE)


def meet(listen: str, connect: str) -> socket.socket | None:
    """Keeps a connection to the other member of a group."""
    if listen:
        address, _, port = listen.rpartition(":")
        server = socket.create_server((address, int(port)))
        return server.accept()[0]
    if connect:
        address, _, port = connect.rpartition(":")
        while True:
            try:
                return socket.create_connection((address, int(port)))
            except ConnectionRefusedError:
                time.sleep(0.1)
    return None


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--listen", default="")
    parser.add_argument("--connect", default="")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--key-file", type=Path)
    options = parser.parse_args()
    if options.exit is not None:
        sys.exit(options.exit)
    _memory = share_memory(f"potluck-test-{os.getpid()}")
    worker = subprocess.Popen(["bash", "-c", "exec -a 'TEST::Worker' sleep 1000"])
    lock = multiprocessing.get_context("spawn").Lock()
    told = {
        "semaphore": lock._semlock.name,
        "pid": os.getpid(),
        "worker": worker.pid,
        "environment": dict(os.environ),
        "key_file": options.key_file.read_text() if options.key_file else "",
    }
    (options.folder / "told.partial").write_text(json.dumps(told))
    (options.folder / "told.partial").rename(options.folder / "told.json")
    _peer = meet(options.listen, options.connect)
    print("engines print whatever they like")
    http.server.HTTPServer(("127.0.0.1", options.port), Health).serve_forever()


if __name__ == "__main__":
    main()
