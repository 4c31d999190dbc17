"""The loss of every exit over the position in a text, in windows of one length."""

from collections.abc import Sequence

import torch

from megatron_sorted.errors import DataError
from megatron_sorted.evaluation.documents import Document, EncodedDocument, encode_documents
from megatron_sorted.evaluation.held_out import HeldOut, Predictions, sum_by_group
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.evaluation.positions import Positions
from megatron_sorted.evaluation.windows import cut_whole_windows, join_documents
from megatron_sorted.text.prompt_form import PromptForm
from megatron_sorted.text.tokenizer.contract import Tokenizer

BLOCK = 64
"""Documents that are encoded at a time to find the first window."""


def measure_by_position(
    model: NestedModel,
    documents: Sequence[EncodedDocument],
    positions: Positions,
    batch_tokens: int = 8192,
    title: str | None = None,
) -> list[dict[int, HeldOut]]:
    """Measure every exit on all whole windows, separately for each bucket of positions.

    A rest that is shorter than a window is not read, so that all buckets see the same texts. The
    unit of standard errors is the document, or the window where documents are joined.

    Args:
        model: The model.
        documents: The documents.
        positions: Windows and buckets.
        batch_tokens: Maximum number of tokens of a forward pass; a longer window is read alone.
        title: Title of the progress bar; None for no bar.

    Returns:
        {depth: measurements} of each bucket, of the documents with counted tokens in it; {} for a
        bucket without any.
    """
    if positions.joined:
        documents = join_documents(documents, positions.length)
    windows = cut_whole_windows(documents, positions.length)
    num_buckets, lasts = len(positions.lasts), torch.tensor(positions.lasts)

    def group_of(read: Predictions) -> torch.Tensor:
        # the bucket is the first one whose last position is not before this one
        bucket_n = torch.searchsorted(lasts, read.position_n)
        return bucket_n * len(documents) + read.document_n

    by_depth = sum_by_group(
        model, documents, windows, group_of, num_buckets * len(documents), batch_tokens, title
    )
    buckets: list[dict[int, HeldOut]] = [{} for _ in positions.lasts]
    for depth, held in by_depth.items():
        sums_4g = torch.stack([held.nats_d, held.agreed_d, held.tokens_d, held.right_d])
        for bucket, sums_4d in zip(buckets, sums_4g.chunk(num_buckets, dim=1), strict=True):
            if sums_4d[2].any():
                bucket[depth] = HeldOut(*sums_4d[:, sums_4d[2] > 0])
    return buckets


def check_length(
    name: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    append_eos: bool,
    form: PromptForm | None,
    positions: Positions,
) -> None:
    """Check that a text has a window of this length; no more is encoded than is needed.

    Raises:
        DataError: It has none.
    """
    longest = total = 0
    kept: list[EncodedDocument] = []
    for begin in range(0, len(documents), BLOCK):
        block = encode_documents(documents[begin : begin + BLOCK], tokenizer, append_eos, form)
        longest = max(longest, *(len(document.ids) - 1 for document in block))
        total += sum(len(document.ids) for document in block)
        kept = [*kept, *block] if positions.joined else block
        cut = join_documents(kept, positions.length) if positions.joined else kept
        if cut_whole_windows(cut, positions.length):
            return
    if positions.joined:
        raise DataError(
            f"--length: {positions.length} tokens are more than the {total - 1:,} of all documents "
            f"of {name} together that are counted. Use less, or give more text."
        )
    raise DataError(
        f"--length: {positions.length} tokens are more than the {longest:,} of the longest "
        f"document of {name} that are counted. Use less, or join documents with --join-documents."
    )
