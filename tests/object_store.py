"""A store of objects on this machine, which tests reach as gs://: python -m tests.object_store

It is gcp-storage-emulator with what that lacks: conditions on generations (`ifGenerationMatch`), the header that names
the generation of what is read, several requests at once, and faults on demand. It prints its address and serves until
its standard input ends. `Store` starts one in a process of its own.

A fault is a dictionary: `method` and `contains` choose requests by method and by a part of the address, `after` lets so
many of them pass first, `every` hits each so-many-th, `times` is how many are hit, `lasting` are the seconds from the
first hit after which no more are, and `kind` is one of "status" (with `status`), "slow" (with
`seconds`), "truncated" (half of the body, then the connection ends), "short" (half of the body, and a header that says
that this is all) and "dropped" (the connection ends without a reply).
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bkt"
ROOT = Path(__file__).parents[1]
_OBJECT = re.compile(r"(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/([^?]+)")
_UPLOAD = re.compile(r"(?:/upload)?(?:/storage/v1)?/b/([^/]+)/o")


class Store:
    """A running store.

    Attributes:
        address: Where it is reached.
        environment: The variables by which a process finds it.
    """

    def __init__(self) -> None:
        """Starts it."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.object_store"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address.startswith("http"), "the store did not start"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
        }

    def close(self) -> None:
        """Ends it."""
        self._process.communicate(timeout=20)

    def inject(self, *faults: Mapping[str, Any]) -> None:
        """Takes the place of all earlier faults, and sets the counts to zero."""
        self._ask("POST", "/_faults", json.dumps(list(faults)).encode())

    def counts(self) -> dict[str, int]:
        """How many requests there were since the last `inject` ("requests"), and how many faults of each kind."""
        return json.loads(self._ask("GET", "/_counts", None))

    def _ask(self, method: str, path: str, data: bytes | None) -> bytes:
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()


class Faults:
    """The faults that are still to come."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {"requests": 0}
        self.guard = threading.Lock()

    def of(self, method: str, address: str) -> dict[str, Any] | None:
        with self.guard:
            self.counts["requests"] += 1
            for fault in self.waiting:
                if fault.get("method", method) != method or fault.get("contains", "") not in address:
                    continue
                if fault.get("after", 0) > 0:
                    fault["after"] -= 1
                    continue
                fault["seen"] = fault.get("seen", 0) + 1
                fault.setdefault("since", time.monotonic())
                over = "lasting" in fault and time.monotonic() - fault["since"] > fault["lasting"]
                if over or fault.get("times", 1) <= 0 or fault["seen"] % fault.get("every", 1):
                    continue
                fault["times"] = fault.get("times", 1) - 1
                self.counts[fault["kind"]] = self.counts.get(fault["kind"], 0) + 1
                return dict(fault)
        return None


def serve() -> None:
    """Serves until the standard input ends."""
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    logging.disable(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    one_at_a_time = threading.RLock()  # the emulator's storage is not made for threads
    faults = Faults()

    def generation(bucket: str, name: str) -> str:
        try:
            return str(storage.get_file_obj(bucket, name)["generation"])
        except NotFound:
            return "0"

    class Handler(emulator.RequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args: Any) -> None:
            super().__init__(storage, *args)

        def _serve(self, method: str) -> None:
            if self.path.startswith("/_"):
                self._administer()
                return
            fault = faults.of(method, urllib.parse.unquote(self.path))
            kind = fault["kind"] if fault else ""
            if kind == "slow":
                time.sleep(fault["seconds"])
            length = int(self.headers.get("Content-Length") or 0)
            if kind in ("status", "dropped"):
                self.rfile.read(length)
                if kind == "status":
                    self._reply(fault["status"], b'{"error": {"message": "injected"}}')
                self.close_connection = True
                return
            head, body = self._answered(method)
            if kind in ("truncated", "short") and len(body) > 1:
                body = body[: len(body) // 2]
                if kind == "short":
                    head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
                self.close_connection = True
            self.wfile.write(head + b"\r\n\r\n" + body)

        def _answered(self, method: str) -> tuple[bytes, bytes]:
            """The head and the body of the emulator's reply, with conditions and generations."""
            address, _, query = self.path.partition("?")
            asked = dict(urllib.parse.parse_qsl(query))
            found = _OBJECT.fullmatch(address)
            upload = _UPLOAD.fullmatch(address) if method == "POST" else None
            bucket = name = None
            if found is not None:
                bucket, name = found[1], urllib.parse.unquote(found[2])
            elif upload is not None and "name" in asked:
                bucket, name = upload[1], asked["name"]
            real, self.wfile = self.wfile, io.BytesIO()
            try:
                with one_at_a_time:
                    before = generation(bucket, name) if bucket and name else "0"
                    if asked.get("ifGenerationMatch", before) != before:
                        self.rfile.read(int(self.headers.get("Content-Length") or 0))
                        self._reply(412, b'{"error": {"message": "conditionNotMet"}}')
                    elif before != "0" and asked.get("ifGenerationNotMatch") == before:
                        self._reply(304, b"")
                    elif asked.get("alt") == "media" and asked.get("generation", before) != before:
                        self._reply(404, b"")
                    else:
                        emulator.Router(self).handle(method)
                head, _, body = self.wfile.getvalue().partition(b"\r\n\r\n")
            finally:
                self.wfile = real
            if before != "0":
                head += f"\r\nx-goog-generation: {before}".encode()
            return head, body

        def _administer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with faults.guard:
                if self.path == "/_faults":
                    faults.waiting, faults.counts = json.loads(data), {"requests": 0}
                self._reply(200, json.dumps(faults.counts).encode())

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:  # noqa: N802
            self._serve("GET")

        def do_HEAD(self) -> None:  # noqa: N802
            self._serve("GET")

        def do_POST(self) -> None:  # noqa: N802
            self._serve("POST")

        def do_PUT(self) -> None:  # noqa: N802
            self._serve("PUT")

        def do_PATCH(self) -> None:  # noqa: N802
            self._serve("PATCH")

        def do_DELETE(self) -> None:  # noqa: N802
            self._serve("DELETE")

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that was killed

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{running.server_address[1]}", flush=True)
        sys.stdin.read()
        running.shutdown()


@contextmanager
def started() -> Iterator[Store]:
    """A store for the length of the block."""
    store = Store()
    try:
        yield store
    finally:
        store.close()


if __name__ == "__main__":
    serve()
