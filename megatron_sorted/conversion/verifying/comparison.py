"""Whether two directories hold the same model: every tensor bit for bit, and the logits of every exit on real text."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import Part
from megatron_sorted.conversion.tensors.memory import same_bits
from megatron_sorted.conversion.tensors.table import TensorPair, check_names
from megatron_sorted.conversion.verifying.nested_logits import nested_exits
from megatron_sorted.conversion.verifying.streamed import ReadExit
from megatron_sorted.conversion.verifying.transformers_states import transformers_exits
from megatron_sorted.errors import CheckpointError, DataError
from megatron_sorted.settings.derived import exit_depths

TEXT = """A library keeps what people have thought, and lends it to whoever asks. In 1731 a few friends in Philadelphia put their books
together, because none of them could buy many: "By thus clubbing our books to a common library, we should have the advantage of each
other's." 12 x 12 = 144; die Bibliothek öffnet um 9 Uhr; def total(prices): return sum(prices). Once upon a time there was a little girl
who liked to read under the big tree. One day she found a map in an old book, and she went out to look for the place."""
NUM_TOKENS = 64
TOLERANCE = 1e-4
"""Of logits, relative to the largest: two right programs in fp32 differ by about 1e-6 in small models and 1e-5 after eighty layers."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor, compared."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_different: int
    largest_difference: float


@dataclass(frozen=True)
class ExitRow:
    """The logits of one exit, compared. ``largest_logit`` is what the difference is to be seen beside."""

    depth: int
    largest_difference: float
    largest_logit: float
    agree: float

    def is_same(self, tolerance: float) -> bool:
        """Return whether the difference is within the rounding of fp32."""
        return self.largest_difference <= tolerance * max(1.0, self.largest_logit)


@dataclass(frozen=True)
class Comparison:
    """What was found."""

    tensors: list[TensorRow]
    exits: list[ExitRow]
    tolerance: float
    computed_by: str

    @property
    def problems(self) -> list[str]:
        """Return a sentence for everything that differs."""
        found = [
            f"{row.ours}: {row.num_different} of {torch.Size(row.shape).numel()} numbers differ, by up to {row.largest_difference:.3g}"
            for row in self.tensors
            if row.num_different
        ]
        return found + [
            f"exit @{row.depth}: logits differ by up to {row.largest_difference:.3g} (largest logit {row.largest_logit:.3g}), more than "
            f"{self.tolerance:g} of it"
            for row in self.exits
            if not row.is_same(self.tolerance)
        ]

    def table(self) -> str:
        """Return the comparison as text: a row for every kind of tensor (layers together) and one for every exit."""
        kinds: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            kinds.setdefault(re.sub(r"layers\.\d+\.", "layers.*.", row.ours), []).append(row)
        width = max(map(len, kinds))
        lines = [
            f"{'tensor':<{width}}  {'count':>5}  {'shape':>16}  {'kind':>8}  {'different':>9}  largest difference"
        ]
        for kind, rows in kinds.items():
            shape = " x ".join(map(str, rows[0].shape))
            lines.append(
                f"{kind:<{width}}  {len(rows):>5}  {shape:>16}  {str(rows[0].dtype).removeprefix('torch.'):>8}  "
                f"{sum(row.num_different for row in rows):>9}  {max(row.largest_difference for row in rows):.3g}"
            )
        lines += [
            "",
            f"logits of {NUM_TOKENS} tokens of text in fp32: {self.computed_by}",
            f"{'exit':>5}  {'largest difference':>18}  {'largest logit':>13}  same best token",
        ]
        lines += [
            f"{'@' + str(row.depth):>5}  {row.largest_difference:>18.3g}  {row.largest_logit:>13.3g}  {100 * row.agree:.1f} %"
            for row in self.exits
        ]
        return "\n".join(lines)


def text_tokens(model: OpenModel) -> torch.Tensor:
    """Return the first tokens of TEXT [1, s]; of a model without a tokenizer, made-up ones over the whole vocabulary."""
    num_tokens, vocabulary = (
        min(NUM_TOKENS, model.settings.max_position_embeddings or NUM_TOKENS),
        model.settings.vocab_size,
    )
    try:
        tokenizer = model.open_tokenizer()
    except DataError as error:
        raise CheckpointError(
            f"{model.directory}: its tokenizer cannot be read ({error}). Mend it, or take it away."
        ) from error
    ids = [] if tokenizer is None else [i for i in tokenizer.encode(TEXT) if i < vocabulary]
    if len(ids) < num_tokens:
        ids += torch.randint(
            vocabulary, (num_tokens - len(ids),), generator=torch.Generator().manual_seed(0)
        ).tolist()
    return torch.tensor([ids[:num_tokens]])


def compared_depths(model: OpenModel) -> tuple[int, ...]:
    """Return the model's exits; of an ordinary model also three depths on the way, so that a mistake shows where it begins."""
    depths, layers = exit_depths(model.settings), model.settings.num_layers
    return (
        depths
        if len(depths) > 1
        else tuple(sorted({*(max(1, layers * part // 4) for part in (1, 2, 3)), layers}))
    )


def _compare_tensor(
    first: OpenModel,
    origin: TensorPair,
    second: OpenModel,
    pair: TensorPair,
    cast: torch.dtype | None,
) -> TensorRow:
    wanted, got = first.read_ours(origin), second.read_ours(pair)
    if cast is not None:
        wanted = wanted.to(got.dtype)
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        raise CheckpointError(
            f"{pair.ours}: {list(wanted.shape)} of {wanted.dtype} in {first.directory}, {list(got.shape)} of {got.dtype} "
            f"in {second.directory}."
        )
    shape, dtype, num_different, largest = tuple(got.shape), got.dtype, 0, 0.0
    wanted, got = wanted.reshape(-1), got.reshape(-1)
    for begin in range(0, got.numel(), 1 << 22):  # no copies of whole tensors
        one, other = wanted[begin : begin + (1 << 22)], got[begin : begin + (1 << 22)]
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
) -> dict[int, ReadExit]:
    """Return the exits of one side; a Hugging Face model is always computed by transformers."""
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
    """Return how two models differ; arguments as for ``compare_part``.

    Raises:
        CheckpointError: They have not the same tensors.
    """
    check_names(
        [pair.ours for pair in first.pairs],
        [pair.ours for pair in second.pairs],
        str(second.directory),
    )
    return compare_part(Part(first, second.settings, first.pair_of), second, tolerance, progress)


def compare_part(
    part: Part, second: OpenModel, tolerance: float, progress: Callable[[int], None]
) -> Comparison:
    """Return how a model differs from what it was made of.

    Args:
        part: What there was.
        second: What was made of it.
        tolerance: Of logits, relative to the largest.
        progress: Called with the bytes of each tensor once it is compared.

    Raises:
        CheckpointError: A tensor has another shape or kind of numbers.
    """
    first, rows = part.model, []
    for pair in second.pairs:
        rows.append(_compare_tensor(first, part.origins[pair.ours], second, pair, part.cast))
        progress(torch.Size(pair.shape).numel() * rows[-1].dtype.itemsize)
    tokens_bs = text_tokens(second if second.files else first)
    # on the way to a sub-model's end no exit of the first reads as its own norm does
    depths = (
        exit_depths(second.settings)
        if any(pair.is_own_exit for pair in first.pairs)
        else compared_depths(second)
    )
    origin = {depth: part.exits.get(depth, depth) for depth in depths}
    wanted = _exits(first, tokens_bs, tuple(origin.values()), part.cast)
    got = _exits(second, tokens_bs, depths, None)
    exits = []
    for depth in depths:
        one, other = wanted[origin[depth]].logits(), got[depth].logits()
        exits.append(
            ExitRow(
                depth,
                float((one - other).abs().max()),
                float(one.abs().max()),
                float((one.argmax(-1) == other.argmax(-1)).float().mean()),
            )
        )
    who = " against ".join(
        "transformers" if model.kind == "hugging_face" else "plain PyTorch"
        for model in (first, second)
    )
    return Comparison(rows, exits, tolerance, who)
