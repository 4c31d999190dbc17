"""A program that answers as llama-server does, for tests without llama.cpp.

The next token is the last one plus 1, up to 510, then 3 again; a token takes a millisecond by its
own times. It ends at once, with a line of complaint, if a model's name holds "broken".
"""

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LAST = 510


def write_program(path: Path) -> Path:
    """Write this file as an executable program of this Python; return its path."""
    path.write_text(f"#!{sys.executable}\n{Path(__file__).read_text(encoding='utf-8')}")
    path.chmod(0o700)
    return path


def continuation(prompt: list[int], count: int) -> list[int]:
    """Return the tokens that follow a prompt."""
    tokens = [prompt[-1]]
    for _ in range(count):
        tokens.append(tokens[-1] + 1 if tokens[-1] < LAST else 3)
    return tokens[1:]


class Answers(BaseHTTPRequestHandler):
    """Answer /health, /completion, and every text of /tokenize with three tokens."""

    options: argparse.Namespace

    def do_GET(self) -> None:
        """Say that the model is loaded."""
        self._send(200 if self.path == "/health" else 404, {"status": "ok"})

    def do_POST(self) -> None:
        """Continue a prompt."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self._send(200, {"tokens": [1, 4, 5]})
        prompt, count = body["prompt"], body["n_predict"]
        if not all(isinstance(token, int) for token in prompt) or not body["ignore_eos"]:
            return self._send(400, {"error": {"message": "prompt: token ids are expected"}})
        times = {
            "prompt_n": len(prompt), "prompt_ms": float(len(prompt)), "predicted_n": count,
            "predicted_ms": float(count), "predicted_per_second": 1000.0 * (count - 1) / count,
        }  # fmt: skip
        if self.options.model_draft:
            times |= {"draft_n": 2 * count, "draft_n_accepted": count}
        return self._send(200, {"tokens": continuation(prompt, count), "timings": times})

    def log_message(self, *values: object) -> None:
        """Stay quiet."""

    def _send(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--model-draft", "--host"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    Answers.options, _ = parser.parse_known_args()
    if "broken" in Answers.options.model:
        sys.exit("this model is broken")
    ThreadingHTTPServer((Answers.options.host, Answers.options.port), Answers).serve_forever()


if __name__ == "__main__":
    main()
