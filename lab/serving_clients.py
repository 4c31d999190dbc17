"""Run public clients against a running server of ours, and print what each of them did.

    python -m lab.serving_clients http://127.0.0.1:8000/v1
    python -m lab.serving_clients http://127.0.0.1:8000/v1 --api-key KEY --tokenizer DIR

openai, litellm and langchain-openai ask for completions, conversations and streams; lm-eval scores
continuations and writes; locust and hey put load on the server. What is not installed in this
Python, or not on the path, is named and left out.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import importlib.metadata
import os
import sys
import urllib.request
from pathlib import Path

from lab.serving.public_clients import CLIENTS, Missing, Target
from megatron_sorted.errors import PlatformError
from megatron_sorted.reading.json_text import parse_json
from megatron_sorted.reporting.markdown import table


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("url", help="base URL, with /v1")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY") or "none",
        help="(OPENAI_API_KEY, else none)")  # fmt: skip
    add("--model", help="the model's name (the first that the server lists)")
    add("--tokenizer", type=Path, help="directory for transformers, which lm-eval needs")
    add("--clients", nargs="+", choices=tuple(CLIENTS), default=list(CLIENTS), help="(all)")
    add("--seconds", type=float, default=10.0, help="of load (%(default)s)")
    return parser.parse_args()


def first_model(url: str, key: str) -> str:
    """Return the name of the first model that a server lists.

    Raises:
        PlatformError: It does not answer.
    """
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return parse_json(answer.read(), "the list of models")["data"][0]["id"]
    except (OSError, ValueError, LookupError) as error:
        raise PlatformError(
            f"{url}/models: no model is listed there ({error}). Start a server, and give its URL "
            "with /v1."
        ) from error


def main() -> None:
    """Run the clients; exit with status 1 if one of them failed."""
    values = read_arguments()
    url = values.url.rstrip("/")
    target = Target(
        url, values.api_key, values.model or first_model(url, values.api_key), values.tokenizer,
        values.seconds,
    )  # fmt: skip
    rows, failed = [], False
    for name in values.clients:
        package, run = CLIENTS[name]
        try:
            version = importlib.metadata.version(package) if package else ""
            done = run(target)
        except (Missing, ImportError, importlib.metadata.PackageNotFoundError) as error:
            version, done = "", f"not run: {error}"
        except Exception as error:  # another client may work
            failed, done = True, f"failed: {type(error).__name__}: {error}"
        rows.append([name, version, " ".join(done.split())[:300]])
        print(f"{name}: {rows[-1][2]}", file=sys.stderr, flush=True)
    print("\n".join(table(["client", "version", "what it did"], rows)))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
