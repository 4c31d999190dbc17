"""The part of wandb's server that a client needs to open and resume a run and send its history."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """The data that clients sent.

    Attributes:
        url: For ``WANDB_BASE_URL``.
        runs: {run id: history rows by line number}: a line that is sent again replaces the first.
        names: {run id: display name}.
        finished: {run id: exit code of the last process}.
    """

    def __init__(self, url: str):
        self.url = url
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.names: dict[str, str] = {}
        self.finished: dict[str, int] = {}

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Return the history of a run, in the order of its lines."""
        return [row for _, row in sorted(self.runs[run_id].items())]

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the data that answers one query."""
        name = values.get("name")
        project = {
            "id": "cA==",
            "name": values.get("project"),
            "entity": {"id": "ZQ==", "name": "team"},
        }
        if operation == "RunResumeStatus":
            return {
                "model": {**project, "bucket": self._bucket(name) if name in self.runs else None}
            }
        if operation == "UpsertBucket":
            new = name not in self.runs
            self.runs.setdefault(name, {})
            self.names.setdefault(name, values.get("displayName"))
            return {
                "upsertBucket": {
                    "inserted": new,
                    "bucket": self._bucket(name) | {"project": project, "sweepName": None},
                }
            }
        if operation == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in values["files"]
            ]
            return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        rows = self.rows(name)
        return {
            "id": "cnVu",
            "name": name,
            "displayName": self.names.get(name),
            "description": "",
            "config": "{}",
            "summaryMetrics": "{}",
            "historyLineCount": len(rows),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "tags": [],
            "notes": "",
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "wandbConfig": '{"t": 1}',
        }

    def take(self, run_id: str, sent: dict[str, Any]) -> None:
        """Keep the history that was sent."""
        history = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], history["offset"]):
            self.runs[run_id][number] = json.loads(line)
        if sent.get("complete"):
            self.finished[run_id] = sent.get("exitcode")


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Yield a server of this host that runs in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            reply: dict[str, Any] = {}
            if self.path == "/graphql":
                query = json.loads(body)
                reply = {
                    "data": server.answer(query.get("operationName"), query.get("variables") or {})
                }
            elif self.path.endswith("/file_stream"):
                server.take(self.path.split("/")[-2], json.loads(body))
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_GET = do_POST

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = WandbServer(f"http://127.0.0.1:{http.server_address[1]}")
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()
