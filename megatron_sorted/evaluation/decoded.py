"""Greedy continuations by the program's own decoder, where the compiled library runs the model."""

from collections.abc import Sequence

from tqdm import tqdm

from megatron_sorted.decoding.cache.capacity import free_host_bytes
from megatron_sorted.decoding.cache.eager import distinct_parameters, num_bytes
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.native.choice import native_kind, report_once
from megatron_sorted.decoding.native.compiler import NativeError
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.strategies import Fixed
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.nested_model import NestedModel


def decoding_network(model: NestedModel, native: str = "auto") -> Network | None:
    """Return a network with packed copies of a model's weights; None where transformers generates.

    Args:
        model: The model, which stays as it is.
        native: Whether the compiled library generates: "on", "off", or "auto": on a CPU, unless it
            cannot or a second copy of the weights does not fit into memory.

    Raises:
        SettingsError: The library is asked for and cannot be used.
    """
    kind = native_kind(native, model.model.dtype, model.model.device)
    if kind is None:
        return None
    needed = sum(map(num_bytes, distinct_parameters(model.model, model.exits)))
    free = free_host_bytes()
    try:
        if free is not None and needed > free:
            raise NativeError(
                f"packed copies of the weights need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
                "are free"
            )
        return Network(model.model, model.exits, native=kind, keep=True)
    except (NativeError, SettingsError) as error:
        if native == "on":
            raise SettingsError(f"--native on: {error} Use --native auto.") from error
        report_once("answers", f"transformers generates the answers, which is slower: {error}")
        return None


def continue_greedily(
    network: Network,
    depth: int,
    prompts: Sequence[list[int]],
    limits: Limits,
    batch_size: int,
    title: str | None = None,
) -> list[list[int]]:
    """Return the tokens that an exit adds to each prompt, up to and including an end.

    Prompts of similar length form a batch.

    Args:
        network: The model.
        depth: Depth of the exit.
        prompts: Tokens of each prompt.
        limits: Where texts end.
        batch_size: Number of prompts in a batch.
        title: Title of the progress bar; None for no bar.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    added: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=title, unit="question", disable=title is None) as bar:
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            texts = generate(
                network, [prompts[number] for number in numbers], Fixed(depth), limits=limits
            )
            for number, text in zip(numbers, texts, strict=True):
                added[number] = text.tokens
            bar.update(len(numbers))
    return added
