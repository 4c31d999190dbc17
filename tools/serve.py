"""Serves a nested model under OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models; streaming, every way to generate.

    python tools/serve.py MODEL --way sorted_speculative --port 8000
    python tools/serve.py MODEL --adapt
    curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once", "max_tokens": 40, "temperature": 0}'

Requests may say `way` (full, self_speculative, ...) and `task` beside OpenAI's fields. One request is written at a time, its texts as one
batch; others wait in line. Without --host only this machine is listened to; put a proxy with keys and TLS in front of it before others may.

With --adapt the server finds out which way is fastest, for each task apart: of requests that name no way it takes those of decoding.json in
turn and soon mostly the best. All of them write the same text. /v1/adaptation tells what was learned; decoding_bandit.json keeps it.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from decoding.adaptation import LEARNED, check_adapt, open_adaptation
from decoding.options import add_generation_config, add_model_options, add_way_options, named_way, usual_sampling, way_of, writer_of

from megatron_sorted.decoding.ways import Way
from megatron_sorted.errors import SettingsError

MOST_SHUTDOWN_SECONDS = 86400


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_way_options(parser)
    add_generation_config(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any that is free (%(default)s)")
    group.add_argument("--shutdown-timeout", type=float, default=10.0, metavar="SECONDS",
                       help="SIGTERM and Ctrl-C end the server within this time; texts that are not over by then are ended with an error "
                            "(%(default)s)")
    group.add_argument("--served-name", help="what clients call the model (default: its directory's name)")
    group.add_argument("--adapt", action="store_true", help="learn which way is fastest, instead of --way")
    group.add_argument("--adapt-file", type=Path, metavar="FILE",
                       help=f"where to keep what is learned (default: {LEARNED} in the model's directory); each server needs its own")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until it is stopped."""
    values = read_arguments(arguments)
    check_adapt(values)
    if not 0 <= values.shutdown_timeout <= MOST_SHUTDOWN_SECONDS:
        raise SettingsError(f"--shutdown-timeout: {values.shutdown_timeout} is not in 0..{MOST_SHUTDOWN_SECONDS} seconds. Change it.")
    try:
        from decoding.api import make_app, served_name
        from decoding.listening import bind, serve
        from decoding.worker import Worker
    except ModuleNotFoundError as error:
        raise SettingsError(f"serve: {error.name} is not installed. pip install 'megatron_sorted[serve]'.") from error
    bound = bind(values.host, values.port)  # before the model is read, which may take minutes
    writer = writer_of(values)
    usual = usual_sampling(values, writer, 1.0)
    print(f"[{writer.form.line}]", flush=True)
    adaptation = open_adaptation(values, writer) if values.adapt else None
    own = None if adaptation else way_of(values, writer.network, writer.draft)

    @functools.cache
    def way_for(name: str | None) -> Way | None:
        return own if name is None or (own and name == own.name) else named_way(values, name, writer)

    name = served_name(writer, values.served_name or values.model.resolve().name)
    way = own.name if own else f"the fastest of {', '.join(way.name for way in adaptation.ways)}"
    host, port = values.host, bound.getsockname()[1]

    def announce() -> None:
        print(f"[{name}: exits at {', '.join(map(str, writer.network.depths))}; way: {way}; "
              f"http://{f'[{host}]' if ':' in host else host}:{port}/v1]", flush=True)

    worker = Worker(writer, adaptation)
    serve(make_app(worker, name, way_for, usual), worker, bound, values.shutdown_timeout, announce)


if __name__ == "__main__":
    run_main(main)
