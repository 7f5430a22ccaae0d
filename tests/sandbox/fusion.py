"""A server with SandboxFusion's `POST /run_code`, which really runs what it is sent (without isolating it)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CAPTURED = 1 << 20
"""Bytes of each stream that the real server keeps."""


class Server(ThreadingHTTPServer):
    """Counts requests and connections; `faults` are taken one per request: a status, or the name of a mishap."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[int | str] = []
        self.requests: list[dict[str, Any]] = []
        self.num_connections = 0
        self.lie: Callable[[str], str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/run_code":
            self.answer(404, {"detail": "Not Found"})
            return
        request = json.loads(body)
        self.server.requests.append(request)
        fault = self.server.faults.pop(0) if self.server.faults else 200
        if fault == "hang up":
            self.close_connection = True
        elif fault == "hang":
            time.sleep(5.0)
            self.close_connection = True
        elif fault == "garbage":
            self.answer(200, {"hello": "world"})
        elif fault == "sandbox error":
            self.answer(200, {"status": "SandboxError", "message": "no room", "run_result": None})
        elif fault == "silence":
            self.answer(200, run({**request, "code": "pass"}))
        elif fault != 200:
            self.answer(int(fault), {"detail": "try later"})
        else:
            answer = run(request)
            if self.server.lie is not None:
                answer["run_result"]["stdout"] = self.server.lie(answer["run_result"]["stdout"])
            self.answer(200, answer)

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run one program through a shell, as the real server does, and report the result in its words."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(request["code"])
        start = time.monotonic()
        process = subprocess.Popen(
            f"{sys.executable} {file}",
            shell=True,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        status, code = "Finished", None
        try:
            out, err = process.communicate((request.get("stdin") or "").encode(), timeout=request["run_timeout"])
            code = process.returncode
        except subprocess.TimeoutExpired:
            status = "TimeLimitExceeded"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
    result = {
        "status": status,
        "execution_time": time.monotonic() - start,
        "return_code": code,
        "stdout": out[:CAPTURED].decode(errors="replace"),
        "stderr": err[:CAPTURED].decode(errors="replace"),
    }
    return {"status": "Success" if code == 0 else "Failed", "message": "", "run_result": result, "files": {}}


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A server for the time of a test."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
