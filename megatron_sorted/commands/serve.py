"""``megatron-sorted serve``: a nested model under OpenAI's API.

Beside OpenAI's fields, requests may have ``depth``, ``confidence``, ``strategy`` and ``task``.
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.options.batching import (
    add_batching_options,
    batching_options,
    limits_line,
)
from megatron_sorted.commands.options.decoding import (
    add_generation_config,
    add_model_options,
    add_strategy_options,
    default_sampling,
    open_generator,
    requested_strategy,
    requests_strategy,
)
from megatron_sorted.commands.options.engine import (
    add_engine_option,
    check_engine,
    given_options,
    open_launch,
    split_line,
)
from megatron_sorted.commands.options.models import check_directories
from megatron_sorted.commands.parser import Parser
from megatron_sorted.decoding.strategies import STRATEGIES, Strategy
from megatron_sorted.decoding.tuning.tuned_options import LEARNED_FILE
from megatron_sorted.errors import SettingsError

MAX_SHUTDOWN_SECONDS = 86400
SWITCH_SECONDS, READY_SECONDS = 0.001, 5
DESCRIPTION = """\
Serve a nested model under OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.
The page / tries it, /metrics is for Prometheus. By default only this machine can connect. For
others, give --host and --api-key-file (or set MEGATRON_SORTED_API_KEY), and put a proxy with TLS
in front. --engine vllm: vLLM serves it, with full, fixed and the two speculative strategies."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of the options."""
    parser = Parser(
        "megatron-sorted serve",
        DESCRIPTION,
        "megatron-sorted serve MODEL --strategy sorted_speculative --port 8000",
        usage="%(prog)s MODEL [options] [-- vLLM's own options]",
    )
    add_model_options(parser)
    add_strategy_options(parser)
    add_batching_options(parser)
    group = parser.add_argument_group("server")
    add_engine_option(group, "what decodes and answers (default: %(default)s)")
    group.add_argument(
        "--print", action="store_true", help="print the command that starts vLLM; do not run it"
    )
    add_generation_config(group)
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port to listen on; 0 takes any free one (default: %(default)s)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="time for running requests after SIGTERM or Ctrl-C (default: %(default)s)",
    )
    group.add_argument(
        "--served-name",
        metavar="NAME",
        help="the model's name for clients (default: that of its directory)",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys for /v1, one a line: KEY or NAME KEY (default: none is needed)",
    )
    group.add_argument(
        "--no-request-log",
        dest="request_log",
        action="store_false",
        help="do not write a line to standard error for each request",
    )
    group.add_argument(
        "--adapt",
        action="store_true",
        help="learn the fastest strategy for each task, instead of --strategy",
    )
    group.add_argument(
        "--adapt-file",
        type=Path,
        metavar="FILE",
        help=f"file of --adapt, one per server (default: MODEL/{LEARNED_FILE})",
    )
    line, own = split_line(arguments)
    values = parser.parse_args(line)
    check_engine(values.engine, own)
    if values.print and values.engine == "own":
        raise SettingsError("--print: it prints another engine's command. Add --engine vllm.")
    values.given, values.own = given_options(parser, line), own
    values.batching = batching_options(values)
    if values.adapt_file is not None and not values.adapt:
        raise SettingsError(
            f"--adapt-file: {values.adapt_file} has no effect without --adapt. "
            "Give both or neither."
        )
    if values.adapt and requests_strategy(values):
        named = f" beside --strategy {values.strategy}" if values.strategy else ""
        raise SettingsError(
            f"--adapt{named}: it chooses the strategy and its options by itself. "
            "Leave out the options of strategies, or --adapt."
        )
    if not 0 <= values.shutdown_timeout <= MAX_SHUTDOWN_SECONDS:
        raise SettingsError(
            f"--shutdown-timeout: {values.shutdown_timeout} is not in "
            f"0..{MAX_SHUTDOWN_SECONDS} seconds. Change it."
        )
    return values


def serve_by_engine(values: argparse.Namespace) -> None:
    """Print the command that starts another engine, and replace this process with it.

    Raises:
        SortedError: The engine is missing, or the model or an option cannot work with it.
    """
    check_directories(values.model)
    started = open_launch(values.model, values.given, values.own)
    print(started, flush=True)
    if not values.print:
        os.execvpe(started.line[0], started.line, started.environment(os.environ))


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until the process is stopped."""
    values = read_arguments(arguments)
    if values.engine != "own":
        return serve_by_engine(values)
    import torch

    from megatron_sorted.serving.adaptation import open_adaptation
    from megatron_sorted.serving.api import make_app, served_name
    from megatron_sorted.serving.keys import open_keys
    from megatron_sorted.serving.listening import bind, open_warning, serve
    from megatron_sorted.serving.request_log import write_request_log
    from megatron_sorted.serving.worker import GenerationWorker

    keys = open_keys(values.api_key_file)
    bound = bind(values.host, values.port)  # before the model is read, which may take minutes
    if not keys and (warning := open_warning(bound)):
        print(warning, file=sys.stderr, flush=True)
    generator, choice = open_generator(values), requested_strategy(values)
    defaults = default_sampling(values, generator, 1.0)
    print(f"[{generator.form.line}]", flush=True)
    machine = {"device": values.device, "dtype": values.dtype, "threads": torch.get_num_threads()}
    adaptation = (
        open_adaptation(choice, generator, machine, values.adapt_file) if values.adapt else None
    )
    default = None if adaptation else choice.strategy(generator.network, generator.draft)

    @functools.cache
    def strategy_for(name: str | None) -> Strategy | None:
        if name is None or (default and name == default.name):
            return default
        draft = generator.draft_for(STRATEGIES[name])
        return choice.named(name).strategy(generator.network, draft)

    name = served_name(generator, values.served_name or values.model.resolve().name)
    strategy = (
        default.name
        if default
        else f"the fastest of {', '.join(one.name for one in adaptation.strategies)}"
    )
    host, port = values.host, bound.getsockname()[1]
    print(f"[{limits_line(values.batching)}; API keys: {len(keys) or 'none'}]", flush=True)
    if values.request_log:
        write_request_log()

    def announce() -> None:
        print(
            f"[{name}: exits at {', '.join(map(str, generator.network.depths))}; "
            f"strategy: {strategy}; "
            f"http://{f'[{host}]' if ':' in host else host}:{port}/v1]",
            flush=True,
        )

    # the model's thread waits less for Python's lock, which it gives up in every pass
    sys.setswitchinterval(SWITCH_SECONDS)
    worker = GenerationWorker(generator, adaptation, options=values.batching)
    while not worker.is_ready.wait(READY_SECONDS):
        print("[measuring what drafts cost at each load]", flush=True)
    serve(
        make_app(worker, name, strategy_for, defaults, keys),
        worker,
        bound,
        values.shutdown_timeout,
        announce,
    )
