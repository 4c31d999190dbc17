"""The contenders: our server of two versions, transformers', llama.cpp's."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.contests.contenders import LLAMA, OURS, TRANSFORMERS
from lab.contests.entrants import Peer
from lab.serving.dialects import Completions, Dialect, LlamaCompletions
from lab.serving.servers import Launch
from megatron_sorted.errors import PlatformError
from megatron_sorted.llama_cpp.server import ServedModel

BEFORE = "ours before"
FULL, SPECULATIVE = "full", "self_speculative"
LLAMA_KINDS = {"float32": "F32", "int8": "Q8_0"}
"""Our kind of weights -> llama.cpp's kind of the same precision."""
BLOCK_TOKENS = 256
"""Tokens of a block of keys and values in transformers, its default. It shares full blocks of
equal beginnings, so that shorter texts share nothing."""


@dataclass(frozen=True)
class Contender:
    """A server that is asked for one strategy.

    Attributes:
        name: Name, unique in a part.
        engine: Our server, our server before, or one of the others.
        kind: Kind of weights, by our name.
        strategy: "full" where every token is computed alone.
        launch: How its server is started.
        dialect: How it is asked.
    """

    name: str
    engine: str
    kind: str
    strategy: str
    launch: Launch
    dialect: Dialect


@dataclass(frozen=True)
class Setting:
    """What all servers have in common.

    Attributes:
        model: Hugging Face directory whose texts do not end early.
        threads: Number of threads.
        slots: Largest number of texts at once.
        context: Longest text.
        exit_layer, draft_tokens: Options of self-speculation; None: our server's default.
    """

    model: Path
    threads: int
    slots: int
    context: int
    exit_layer: int | None = None
    draft_tokens: int = 4

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment variables of all servers."""
        return {
            "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1",
        }  # fmt: skip


@functools.cache
def has_option(checkout: Path, option: str) -> bool:
    """Return whether a version's `serve` has an option."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sorted", "serve", "--help"],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return option in done.stdout


def ours(
    setting: Setting, kind: str, strategy: str, checkout: Path, engine: str = OURS,
    caching: bool = False,
) -> Contender:  # fmt: skip
    """Return our server from a checkout, asked for a strategy.

    Args:
        setting: What all servers have in common.
        kind: Kind of weights.
        strategy: The strategy.
        checkout: The version's files.
        engine: `OURS` or `BEFORE`.
        caching: Whether beginnings of texts are kept, if the version can.
    """
    command = [
        sys.executable, "-m", "megatron_sorted", "serve", setting.model, "--dtype", kind,
        "--device", "cpu", "--threads", setting.threads, "--port", "PORT",
        "--strategy", SPECULATIVE, "--num-draft-tokens", setting.draft_tokens,
    ]  # fmt: skip
    if setting.exit_layer is not None:
        command += ["--exit-layer", setting.exit_layer]
    if has_option(checkout, "--prefix-caching"):
        command += ["--prefix-caching", "on" if caching else "off"]
    variables = {**setting.variables, "PYTHONPATH": str(checkout)}
    kept = ", prefixes kept" if caching else ""
    launch = Launch(f"{engine} {kind}{kept}", _as_text(command), checkout, tuple(variables.items()))
    fields = {"strategy": strategy, "stream_options": {"include_usage": True}}
    return Contender(
        f"{engine} {kind} {strategy}{kept}", engine, kind, strategy, launch, Completions(fields)
    )


def transformers(setting: Setting, python: Path, cached: int) -> Contender:
    """Return `transformers serve` with continuous batching, in float32.

    Args:
        setting: What all servers have in common.
        python: A Python with transformers[serving].
        cached: Number of tokens whose keys and values are kept.
    """
    command = [
        python, "-m", "transformers.cli.transformers", "serve", setting.model,
        "--continuous-batching", "--device", "cpu", "--dtype", "float32",
        "--attn-implementation", "sdpa", "--host", "127.0.0.1", "--port", "PORT",
        "--cb-block-size", BLOCK_TOKENS, "--cb-num-blocks", -(-cached // BLOCK_TOKENS),
        "--cb-max-batch-tokens", 512,
    ]  # fmt: skip
    launch = Launch(
        TRANSFORMERS, _as_text(command), setting.model, tuple(setting.variables.items())
    )
    dialect = Completions(as_text=True)
    return Contender(TRANSFORMERS, TRANSFORMERS, "float32", FULL, launch, dialect)


def llama(
    setting: Setting, kind: str, peer: Peer, decode: Callable[[list[int]], str],
    depths: tuple[int, int | None],
) -> Contender:  # fmt: skip
    """Return llama.cpp's server.

    Args:
        setting: What all servers have in common.
        kind: Kind of weights, by our name.
        peer: The build and the folder of its files.
        decode: Function from tokens to text.
        depths: Number of layers of the model, and of the model that drafts; None without one.

    Raises:
        PlatformError: Its files cannot be made.
    """
    theirs = LLAMA_KINDS[kind]
    file, draft = (one and peer.file(setting.model, one, theirs) for one in depths)
    served = ServedModel(
        peer.build.programs_for_batches / "llama-server", file, setting.threads,
        setting.context, setting.slots, "f32" if kind == "float32" else "f16", draft,
        setting.draft_tokens,
    )  # fmt: skip
    arguments = [str(one) for one in served.command(0)]
    arguments[arguments.index("--port") + 1] = "PORT"
    strategy = "draft" if draft else FULL
    name = f"{LLAMA} {theirs} {strategy}"
    launch = Launch(
        f"{name} {setting.slots} slots", tuple(arguments), file.parent,
        tuple(setting.variables.items()),
    )  # fmt: skip
    return Contender(name, LLAMA, kind, strategy, launch, LlamaCompletions(decode))


def version_in(python: Path, package: str, modules: str) -> str:
    """Return the version of a package in a Python that can import modules, separated by commas.

    Raises:
        PlatformError: It cannot.
    """
    program = f"import {modules}, importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        raise PlatformError(f"{python}: {error}. Name a Python with {package}.") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise PlatformError(f"{python}: {' '.join(last)}. Install {package} there.")
    return done.stdout.strip().splitlines()[-1]


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout; "unknown" outside of git."""
    done = subprocess.run(
        ["git", "describe", "--always", "--tags"], cwd=checkout, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def _as_text(command: list[object]) -> tuple[str, ...]:
    return tuple(map(str, command))
