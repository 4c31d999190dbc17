"""The loss of every exit on held-out text and its agreement with the last exit, in one pass."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.evaluation.windows import Window, batch_windows, cut_documents

LOGIT_BYTES = 64 << 20
"""Maximum size of the logits that exist at a time."""


@dataclass(frozen=True)
class HeldOut:
    """The measurements of one exit, by document.

    Attributes:
        nats_d: Sum of the losses of the document's counted tokens, float64.
        agreed_d: Number of them for which exit and last exit have the same most likely token (the
            lowest id of equally likely ones).
        tokens_d: Number of counted tokens.
        right_d: Number of them whose right token is the most likely one; None where it was not
            measured.
    """

    nats_d: Tensor
    agreed_d: Tensor
    tokens_d: Tensor
    right_d: Tensor | None = None

    @property
    def exact_match(self) -> float | None:
        """Return the share of documents in which every counted token is the most likely one."""
        if self.right_d is None:
            return None
        return float((self.right_d == self.tokens_d).double().mean())

    @property
    def loss(self) -> float:
        """Return nats per counted token over all documents."""
        return float(self.nats_d.sum() / self.tokens_d.sum())

    @property
    def loss_standard_error(self) -> float | None:
        """Return the standard error of ``loss`` over documents; None for a single one."""
        return ratio_standard_error(self.nats_d, self.tokens_d)

    @property
    def agreement(self) -> float:
        """Return the share of counted tokens on which exit and last exit agree."""
        return float(self.agreed_d.sum() / self.tokens_d.sum())

    @property
    def accuracy(self) -> float | None:
        """Return the share of counted tokens that are the most likely one; None if not measured."""
        return None if self.right_d is None else float(self.right_d.sum() / self.tokens_d.sum())

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return total nats / ln 2 / bytes of the counted text."""
        return float(self.nats_d.sum()) / math.log(2) / num_bytes


def ratio_standard_error(sums_d: Tensor, counts_d: Tensor) -> float | None:
    """Return the standard error of r = sum(sums) / sum(counts) for documents drawn at random.

    The linearised ratio estimator (W. G. Cochran, Sampling Techniques, 3rd ed., 2.11):
    sqrt(D / (D - 1) * sum_d (sums_d - r counts_d)^2) / sum_d counts_d. None for a single document.
    """
    number = len(sums_d)
    if number < 2:
        return None
    residual_d = sums_d.double() - sums_d.double().sum() / counts_d.sum() * counts_d
    variance = number / (number - 1) * float(residual_d.square().sum())
    return math.sqrt(variance) / float(counts_d.sum())


def measure_held_out(
    model: NestedModel,
    documents: Sequence[EncodedDocument],
    seq_length: int,
    stride: int | None = None,
    batch_tokens: int = 8192,
    title: str | None = None,
) -> dict[int, HeldOut]:
    """Measure every exit on documents.

    Args:
        model: The model.
        documents: The documents.
        seq_length: Length of the windows of long documents.
        stride: Distance of the windows' starts; None for ``seq_length``.
        batch_tokens: Maximum number of tokens of a forward pass, with padding.
        title: Title of the progress bar; None for no bar.

    Returns:
        {depth: measurements}.
    """
    windows = cut_documents(documents, seq_length, stride or seq_length)
    return sum_by_group(
        model,
        documents,
        windows,
        lambda predictions: predictions.document_n,
        len(documents),
        batch_tokens,
        title,
    )


@torch.inference_mode()
def sum_by_group(
    model: NestedModel,
    documents: Sequence[EncodedDocument],
    windows: Sequence[Window],
    group_of: Callable[["Predictions"], Tensor],
    num_groups: int,
    batch_tokens: int,
    title: str | None = None,
) -> dict[int, HeldOut]:
    """Measure every exit on windows, summed by group of tokens instead of by document.

    Args:
        model: The model.
        documents: The documents.
        windows: The windows of them to read.
        group_of: Function from the counted tokens of a batch to the group_n of each.
        num_groups: Number of groups.
        batch_tokens: Maximum number of tokens of a forward pass, with padding.
        title: Title of the progress bar; None for no bar.

    Returns:
        {depth: measurements}, with a group in place of each document.
    """
    sums = {depth: torch.zeros(4, num_groups, dtype=torch.float64) for depth in model.depths}
    total = sum(window.num_read for window in windows)
    with tqdm(total=total, desc=title, unit="token", unit_scale=True, disable=title is None) as bar:
        for batch in batch_windows(windows, batch_tokens):
            read = read_batch(model, documents, batch)
            group_n = group_of(read)
            for depth, part, nats_n, agrees_n, right_n in score_exits(
                model, read.hidden, read.labels_n
            ):
                columns = (nats_n, agrees_n, torch.ones_like(nats_n), right_n)
                sums_4n = torch.stack([column.double() for column in columns])
                sums[depth].index_add_(1, group_n[part], sums_4n)
            bar.update(sum(window.num_read for window in batch))
    return {depth: HeldOut(*sums_4g) for depth, sums_4g in sums.items()}


def score_exits(
    model: NestedModel, hidden: dict[int, Tensor], labels_n: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Yield (depth, which tokens, nats_n, agrees_n, right_n) for blocks of tokens and every exit.

    Args:
        model: The model.
        hidden: {depth: hidden_nh} of the counted tokens.
        labels_n: Token that follows each of them.
    """
    block = max(1, LOGIT_BYTES // (4 * model.model.config.vocab_size))
    for begin in range(0, len(labels_n), block):
        part = slice(begin, begin + block)
        last_n = None
        for depth in reversed(model.depths):
            logits_nv = model.logits(depth, hidden[depth][part]).float()
            best_n = logits_nv.argmax(dim=-1)
            last_n = best_n if last_n is None else last_n
            yield (
                depth,
                part,
                cross_entropy(logits_nv, labels_n[part], reduction="none"),
                best_n == last_n,
                best_n == labels_n[part],
            )


@dataclass(frozen=True)
class Predictions:
    """The counted tokens of a batch of windows, and what predicts them.

    Attributes:
        document_n: Number of the document of each token.
        position_n: Number of tokens of its window that stand before it, at least 1.
        labels_n: The token itself.
        hidden: {depth: hidden_nh} of the position before it.
    """

    document_n: Tensor
    position_n: Tensor
    labels_n: Tensor
    hidden: dict[int, Tensor]


def read_batch(
    model: NestedModel, documents: Sequence[EncodedDocument], batch: Sequence[Window]
) -> Predictions:
    """Run one forward pass on windows.

    Shorter windows are padded at the right, where causal attention never looks.
    """
    length = max(window.num_read for window in batch)
    input_ids_bs = torch.tensor(
        [
            (ids := documents[window.document].ids[window.first : window.last])
            + ids[-1:] * (length - len(ids))
            for window in batch
        ]
    )
    rows, positions, labels, numbers = [], [], [], []
    for row, window in enumerate(batch):
        document = documents[window.document]
        for target in range(window.first_target, window.last + 1):
            if document.counted[target]:
                rows.append(row)
                positions.append(target - window.first)
                labels.append(document.ids[target])
                numbers.append(window.document)
    position_n = torch.tensor(positions)
    read = (torch.tensor(rows), position_n - 1)
    hidden = {depth: one[read] for depth, one in model.hidden_states(input_ids_bs).items()}
    return Predictions(torch.tensor(numbers), position_n, torch.tensor(labels), hidden)
