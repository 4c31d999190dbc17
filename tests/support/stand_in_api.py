"""A server that streams completions as OpenAI's API and llama-server do, for tests.

The next token is the last one plus 1. Run as a program, its argument is the port.
"""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answers(BaseHTTPRequestHandler):
    """Answer /health, completions, conversations and llama-server's /completion."""

    log: list[tuple[str, int]]

    def do_GET(self) -> None:
        """Say that the server is ready."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Stream the continuation of a prompt."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body.get("prompt") or [sum(len(one["content"]) for one in body["messages"])]
        self.log.append(("asked", len(prompt)))
        if prompt[0] == 0:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b"no room")
            return
        self.send_response(200)
        self.end_headers()
        count = body.get("max_tokens") or body["n_predict"]
        for place in range(1, count + 1):
            token = prompt[-1] + place
            if self.path == "/completion":
                event = {"content": "?", "tokens": [token], "stop": False}
            elif self.path == "/v1/completions":
                event = {"choices": [{"text": f" {token}"}]}
            else:
                event = {"choices": [{"delta": {"content": f" {token}"}}]}
            self._send(event)
            if place == 1:
                self.log.append(("first", len(prompt)))
        if self.path == "/completion":
            self._send({"content": "", "tokens": [], "stop": True, "tokens_predicted": count})
        else:
            details = {"cached_tokens": 3}
            usage = {"completion_tokens": count, "prompt_tokens_details": details}
            self._send({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *values: object) -> None:
        """Stay quiet."""

    def _send(self, event: dict) -> None:
        self.wfile.write(b"data: %s\n\n" % json.dumps(event).encode())


def make_server(port: int = 0) -> ThreadingHTTPServer:
    """Return a server that listens; its class's ``log`` lists what happened, in order."""
    kind = type("Answers", (Answers,), {"log": []})
    return ThreadingHTTPServer(("127.0.0.1", port), kind)


@contextmanager
def running_server():
    """Yield the port and the log of a server in a thread."""
    server = make_server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1], server.RequestHandlerClass.log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    make_server(int(sys.argv[1])).serve_forever()
