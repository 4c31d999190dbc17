"""``megatron-sorted serve``: a nested model under OpenAI's API; requests may say ``way`` and ``task`` beside OpenAI's fields."""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.options.decoding import (
    add_generation_config,
    add_model_options,
    add_strategy_options,
    requests_strategy,
    strategy_choice,
    usual_sampling,
    writer_of,
)
from megatron_sorted.commands.parser import Parser
from megatron_sorted.decoding.strategies import STRATEGIES, Strategy
from megatron_sorted.decoding.tuning.choices import LEARNED
from megatron_sorted.errors import SettingsError

MOST_SHUTDOWN_SECONDS = 86400
DESCRIPTION = """\
Serve a nested model under OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.
Only this machine is listened to unless --host says otherwise; put a proxy with keys and TLS before it."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser(
        "megatron-sorted serve",
        DESCRIPTION,
        "megatron-sorted serve MODEL --strategy sorted_speculative --port 8000",
        usage="%(prog)s MODEL [options]",
    )
    add_model_options(parser)
    add_strategy_options(parser)
    group = parser.add_argument_group("server")
    add_generation_config(group)
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 for any that is free (%(default)s)"
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="texts may end within this time after SIGTERM or Ctrl-C (%(default)s)",
    )
    group.add_argument(
        "--served-name", metavar="NAME", help="what clients call the model (default: its directory)"
    )
    group.add_argument(
        "--adapt",
        action="store_true",
        help="learn which way is fastest for each task, instead of --strategy",
    )
    group.add_argument(
        "--adapt-file",
        type=Path,
        metavar="FILE",
        help=f"of one server, with what it learns (MODEL/{LEARNED})",
    )
    values = parser.parse_args(arguments)
    if values.adapt_file is not None and not values.adapt:
        raise SettingsError(
            f"--adapt-file: {values.adapt_file} is of no use without --adapt. Give both, or none."
        )
    if values.adapt and requests_strategy(values):
        named = f" beside --strategy {values.strategy}" if values.strategy else ""
        raise SettingsError(
            f"--adapt{named}: it chooses the way and its options by itself. Leave out options of ways, or --adapt."
        )
    if not 0 <= values.shutdown_timeout <= MOST_SHUTDOWN_SECONDS:
        raise SettingsError(
            f"--shutdown-timeout: {values.shutdown_timeout} is not in 0..{MOST_SHUTDOWN_SECONDS} seconds. Change it."
        )
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until it is stopped."""
    values = read_arguments(arguments)
    try:
        import torch

        from megatron_sorted.serving.adaptation import open_adaptation
        from megatron_sorted.serving.api import make_app, served_name
        from megatron_sorted.serving.listening import bind, serve
        from megatron_sorted.serving.worker import GenerationWorker
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"serve: {error.name} is not installed. pip install 'megatron_sorted[serve]'."
        ) from error
    bound = bind(values.host, values.port)  # before the model is read, which may take minutes
    writer, choice = writer_of(values), strategy_choice(values)
    usual = usual_sampling(values, writer, 1.0)
    print(f"[{writer.form.line}]", flush=True)
    machine = {"device": values.device, "dtype": values.dtype, "threads": torch.get_num_threads()}
    adaptation = (
        open_adaptation(choice, writer, machine, values.adapt_file) if values.adapt else None
    )
    own = None if adaptation else choice.strategy(writer.network, writer.draft)

    @functools.cache
    def strategy_for(name: str | None) -> Strategy | None:
        is_own = name is None or (own and name == own.name)
        return (
            own
            if is_own
            else choice.named(name).strategy(writer.network, writer.draft_for(STRATEGIES[name]))
        )

    name = served_name(writer, values.served_name or values.model.resolve().name)
    strategy = (
        own.name
        if own
        else f"the fastest of {', '.join(strategy.name for strategy in adaptation.strategies)}"
    )
    host, port = values.host, bound.getsockname()[1]

    def announce() -> None:
        print(
            f"[{name}: exits at {', '.join(map(str, writer.network.depths))}; way: {strategy}; "
            f"http://{f'[{host}]' if ':' in host else host}:{port}/v1]",
            flush=True,
        )

    worker = GenerationWorker(writer, adaptation)
    serve(
        make_app(worker, name, strategy_for, usual),
        worker,
        bound,
        values.shutdown_timeout,
        announce,
    )
