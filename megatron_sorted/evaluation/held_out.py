"""Loss of every exit on held-out text, and its agreement with the last exit: one forward pass for all exits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.evaluation.windows import Window, batch_windows, cut_documents

LOGIT_BYTES = 64 << 20
"""Of the logits that exist at a time."""


@dataclass(frozen=True)
class HeldOut:
    """What one exit does on every document.

    Attributes:
        nats_d: Sum of the losses of the document's counted tokens, float64.
        agreed_d: For how many of them exit and last exit find the same token most likely (of equally likely ones the lowest id).
        tokens_d: How many there are.
        right_d: For how many of them the right token is the most likely one; None where documents are not counted one by one.
    """

    nats_d: Tensor
    agreed_d: Tensor
    tokens_d: Tensor
    right_d: Tensor | None = None

    @property
    def exact_match(self) -> float | None:
        """Return the share of documents of which every counted token is the most likely one, as a run's evaluation has it."""
        return (
            None if self.right_d is None else float((self.right_d == self.tokens_d).double().mean())
        )

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

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return total nats / ln 2 / bytes of the counted text."""
        return float(self.nats_d.sum()) / math.log(2) / num_bytes


def ratio_standard_error(sums_d: Tensor, counts_d: Tensor) -> float | None:
    """Return the standard error of r = sum(sums) / sum(counts) where documents are drawn at random; None for fewer than two.

    The linearised ratio estimator (W. G. Cochran, Sampling Techniques, 3rd ed., 2.11):
    sqrt(D / (D - 1) * sum_d (sums_d - r counts_d)^2) / sum_d counts_d.
    """
    number = len(sums_d)
    if number < 2:
        return None
    residual_d = sums_d.double() - sums_d.double().sum() / counts_d.sum() * counts_d
    return math.sqrt(number / (number - 1) * float(residual_d.square().sum())) / float(
        counts_d.sum()
    )


@torch.inference_mode()
def measure_held_out(
    model: NestedModel,
    documents: Sequence[EncodedDocument],
    seq_length: int,
    stride: int | None = None,
    batch_tokens: int = 8192,
    title: str | None = None,
) -> dict[int, HeldOut]:
    """Return {depth: what the exit does on every document}.

    Args:
        batch_tokens: Tokens of one forward pass, with padding.
        title: Of the progress bar; None for no bar.
    """
    batches = batch_windows(
        cut_documents(documents, seq_length, stride or seq_length), batch_tokens
    )
    zero = torch.zeros(len(documents), dtype=torch.float64)
    found = {depth: HeldOut(zero.clone(), zero.clone(), zero.clone()) for depth in model.depths}
    total = sum(window.num_read for batch in batches for window in batch)
    with tqdm(total=total, desc=title, unit="token", unit_scale=True, disable=title is None) as bar:
        for batch in batches:
            place_n, labels_n, hidden = read_batch(model, documents, batch)
            for depth, part, nats_n, agrees_n, _ in score_exits(model, hidden, labels_n):
                sums, ones_n = found[depth], torch.ones_like(nats_n)
                for sum_d, value_n in (
                    (sums.nats_d, nats_n),
                    (sums.agreed_d, agrees_n),
                    (sums.tokens_d, ones_n),
                ):
                    sum_d.index_add_(0, place_n[part], value_n.double())
            bar.update(sum(window.num_read for window in batch))
    return found


def score_exits(
    model: NestedModel, hidden: dict[int, Tensor], labels_n: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Yield (depth, which tokens, nats_n, agrees_n, right_n) of chunks of tokens, for every exit.

    Args:
        model: The model.
        hidden: {depth: hidden_nh} of the tokens that are counted.
        labels_n: What follows each of them.
    """
    chunk = max(1, LOGIT_BYTES // (4 * model.model.config.vocab_size))
    for begin in range(0, len(labels_n), chunk):
        part = slice(begin, begin + chunk)
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


def read_batch(
    model: NestedModel, documents: Sequence[EncodedDocument], batch: Sequence[Window]
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Return document_n, labels_n and {depth: hidden_nh} of the batch's counted tokens, from one forward pass.

    Shorter windows are filled at the right: attention is causal, so nothing that is counted sees the filling.
    """
    length = max(window.num_read for window in batch)
    input_ids_bs = torch.tensor(
        [
            (ids := documents[window.document].ids[window.first : window.last])
            + ids[-1:] * (length - len(ids))
            for window in batch
        ]
    )
    rows, columns, labels, places = [], [], [], []
    for row, window in enumerate(batch):
        document = documents[window.document]
        for target in range(window.first_target, window.last + 1):
            if document.counted[target]:
                rows.append(row)
                columns.append(target - 1 - window.first)
                labels.append(document.ids[target])
                places.append(window.document)
    hidden = model.hidden_states(input_ids_bs)
    where = (torch.tensor(rows), torch.tensor(columns))
    return (
        torch.tensor(places),
        torch.tensor(labels),
        {depth: hidden_bsh[where] for depth, hidden_bsh in hidden.items()},
    )
