"""Comparison of two models: every tensor bit for bit, the logits of every exit on real text."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import NetworkOrigin
from megatron_sorted.conversion.tensors.memory import same_bits
from megatron_sorted.conversion.tensors.table import TensorPair, check_names
from megatron_sorted.conversion.verifying.nested_logits import nested_exits
from megatron_sorted.conversion.verifying.streamed import StreamedExit
from megatron_sorted.conversion.verifying.transformers_states import transformers_exits
from megatron_sorted.errors import CheckpointError, DataError
from megatron_sorted.settings.derived import exit_depths

TEXT = (
    "A library keeps what people have thought, and lends it to whoever asks. In 1731 a few "
    "friends in Philadelphia put their books\n"
    'together, because none of them could buy many: "By thus clubbing our books to a common '
    "library, we should have the advantage of each\n"
    "other's.\" 12 x 12 = 144; die Bibliothek öffnet um 9 Uhr; def total(prices): return "
    "sum(prices). Once upon a time there was a little girl\n"
    "who liked to read under the big tree. One day she found a map in an old book, and she "
    "went out to look for the place."
)
NUM_TOKENS = 64
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit.

Two correct programs in fp32 differ by about 1e-6 in small models and 1e-5 after eighty layers.
"""


@dataclass(frozen=True)
class TensorRow:
    """The comparison of one tensor."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_different: int
    largest_difference: float


@dataclass(frozen=True)
class ExitRow:
    """The comparison of one exit's logits.

    Attributes:
        depth: The depth of the exit.
        largest_difference: Largest absolute difference of two logits.
        largest_logit: Largest absolute logit, as the scale of the difference.
        agree: Share of positions with the same most likely token.
    """

    depth: int
    largest_difference: float
    largest_logit: float
    agree: float

    def is_same(self, tolerance: float) -> bool:
        """Return whether the difference is within ``tolerance`` of the largest logit."""
        return self.largest_difference <= tolerance * max(1.0, self.largest_logit)


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models."""

    tensors: list[TensorRow]
    exits: list[ExitRow]
    tolerance: float
    computed_by: str

    @property
    def problems(self) -> list[str]:
        """A sentence for every tensor and exit that differs."""
        problems = [
            f"{row.ours}: {row.num_different} of {torch.Size(row.shape).numel()} numbers differ, "
            f"by up to {row.largest_difference:.3g}"
            for row in self.tensors
            if row.num_different
        ]
        return problems + [
            f"exit @{row.depth}: logits differ by up to {row.largest_difference:.3g} (largest "
            f"logit {row.largest_logit:.3g}), more than {self.tolerance:g} of it"
            for row in self.exits
            if not row.is_same(self.tolerance)
        ]

    def table(self) -> str:
        """Format the comparison: a row for each tensor (all layers together) and for each exit."""
        kinds: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            kinds.setdefault(re.sub(r"layers\.\d+\.", "layers.*.", row.ours), []).append(row)
        width = max(map(len, kinds))
        lines = [
            f"{'tensor':<{width}}  {'count':>5}  {'shape':>16}  {'kind':>8}  {'different':>9}  "
            "largest difference"
        ]
        for kind, rows in kinds.items():
            shape = " x ".join(map(str, rows[0].shape))
            lines.append(
                f"{kind:<{width}}  {len(rows):>5}  {shape:>16}  "
                f"{str(rows[0].dtype).removeprefix('torch.'):>8}  "
                f"{sum(row.num_different for row in rows):>9}  "
                f"{max(row.largest_difference for row in rows):.3g}"
            )
        lines += [
            "",
            f"logits of {NUM_TOKENS} tokens of text in fp32: {self.computed_by}",
            f"{'exit':>5}  {'largest difference':>18}  {'largest logit':>13}  same best token",
        ]
        lines += [
            f"{'@' + str(row.depth):>5}  {row.largest_difference:>18.3g}  "
            f"{row.largest_logit:>13.3g}  {100 * row.agree:.1f} %"
            for row in self.exits
        ]
        return "\n".join(lines)


def text_tokens(model: OpenModel) -> torch.Tensor:
    """Return the first tokens of TEXT [1, s], or random tokens if the model has no tokenizer."""
    num_tokens, vocabulary = (
        min(NUM_TOKENS, model.settings.max_position_embeddings or NUM_TOKENS),
        model.settings.vocab_size,
    )
    try:
        tokenizer = model.open_tokenizer()
    except DataError as error:
        raise CheckpointError(
            f"{model.directory}: its tokenizer cannot be read ({error}). Repair it, or remove it."
        ) from error
    ids = [] if tokenizer is None else [i for i in tokenizer.encode(TEXT) if i < vocabulary]
    if len(ids) < num_tokens:
        ids += torch.randint(
            vocabulary, (num_tokens - len(ids),), generator=torch.Generator().manual_seed(0)
        ).tolist()
    return torch.tensor([ids[:num_tokens]])


def compared_depths(model: OpenModel) -> tuple[int, ...]:
    """Return the exits; for an ordinary model also three depths, to locate a difference."""
    depths, layers = exit_depths(model.settings), model.settings.num_layers
    return (
        depths
        if len(depths) > 1
        else tuple(sorted({*(max(1, layers * quarter // 4) for quarter in (1, 2, 3)), layers}))
    )


def _compare_tensor(
    first: OpenModel,
    origin: TensorPair,
    second: OpenModel,
    pair: TensorPair,
    cast: torch.dtype | None,
) -> TensorRow:
    """Compare one tensor bit for bit."""
    expected, actual = first.read_ours(origin), second.read_ours(pair)
    if cast is not None:
        expected = expected.to(actual.dtype)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise CheckpointError(
            f"{pair.ours}: {list(expected.shape)} of {expected.dtype} in {first.directory}, "
            f"{list(actual.shape)} of {actual.dtype} in {second.directory}."
        )
    shape, dtype, num_different, largest = tuple(actual.shape), actual.dtype, 0, 0.0
    expected, actual = expected.reshape(-1), actual.reshape(-1)
    for begin in range(0, actual.numel(), 1 << 22):  # no copies of whole tensors
        one, other = expected[begin : begin + (1 << 22)], actual[begin : begin + (1 << 22)]
        if same_bits(one, other):
            continue
        num_different += int(
            (
                one.view(torch.uint8).view(-1, one.itemsize)
                != other.view(torch.uint8).view(-1, one.itemsize)
            )
            .any(-1)
            .sum()
        )
        largest = max(largest, float((one.float() - other.float()).abs().max()))
    return TensorRow(pair.ours, pair.theirs, shape, dtype, num_different, largest)


def _exits(
    model: OpenModel, tokens_bs: torch.Tensor, depths: tuple[int, ...], cast: torch.dtype | None
) -> dict[int, StreamedExit]:
    """Compute the exits of one model; transformers computes those of a Hugging Face model."""
    if model.kind == "hugging_face":
        return transformers_exits(model, tokens_bs, depths)
    pairs = model.pair_of

    def read(name: str) -> torch.Tensor:
        tensor = model.read_ours(pairs[name])
        return tensor if cast is None else tensor.to(cast)

    return nested_exits(model.settings, read, tokens_bs, depths)


def compare(
    first: OpenModel,
    second: OpenModel,
    tolerance: float = TOLERANCE,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Comparison:
    """Compare two models; the arguments are those of ``compare_network``.

    Raises:
        CheckpointError: The models do not have the same tensors.
    """
    check_names(
        [pair.ours for pair in first.pairs],
        [pair.ours for pair in second.pairs],
        str(second.directory),
    )
    return compare_network(
        NetworkOrigin(first, second.settings, first.pair_of), second, tolerance, progress
    )


def compare_network(
    network: NetworkOrigin, second: OpenModel, tolerance: float, progress: Callable[[int], None]
) -> Comparison:
    """Compare a model with the network it was converted from.

    Args:
        network: The network and its origin.
        second: The result of the conversion.
        tolerance: Largest difference of logits, relative to the largest logit.
        progress: A function called with the number of bytes of each compared tensor.

    Raises:
        CheckpointError: A tensor has another shape or data type.
    """
    first, rows = network.model, []
    for pair in second.pairs:
        rows.append(_compare_tensor(first, network.origins[pair.ours], second, pair, network.cast))
        progress(torch.Size(pair.shape).numel() * rows[-1].dtype.itemsize)
    tokens_bs = text_tokens(second if second.files else first)
    # Below a sub-model's end its norm differs from that of the first model's exits.
    depths = (
        exit_depths(second.settings)
        if any(pair.is_own_exit for pair in first.pairs)
        else compared_depths(second)
    )
    origin = {depth: network.exits.get(depth, depth) for depth in depths}
    expected = _exits(first, tokens_bs, tuple(origin.values()), network.cast)
    actual = _exits(second, tokens_bs, depths, None)
    exits = []
    for depth in depths:
        one, other = expected[origin[depth]].logits(), actual[depth].logits()
        exits.append(
            ExitRow(
                depth,
                float((one - other).abs().max()),
                float(one.abs().max()),
                float((one.argmax(-1) == other.argmax(-1)).float().mean()),
            )
        )
    computed_by = " against ".join(
        "transformers" if model.kind == "hugging_face" else "plain PyTorch"
        for model in (first, second)
    )
    return Comparison(rows, exits, tolerance, computed_by)
