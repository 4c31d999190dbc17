"""The loss of every exit on prepared data (PREFIX.bin, PREFIX.idx), with training's own samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.conversion.directory_kind import is_hugging_face
from megatron_sorted.data.batches import Batch, collate, make_document_masks, make_eval_sets
from megatron_sorted.data.prepared import check_same_tokenizer, stored_options
from megatron_sorted.data.samples.dataset import EvaluationSet, InstructionSamples
from megatron_sorted.evaluation.held_out import HeldOut, score_exits
from megatron_sorted.evaluation.nested_model import NestedModel
from megatron_sorted.settings.derived import MASKS
from megatron_sorted.settings.run import Settings
from megatron_sorted.text.tokenizer.contract import Tokenizer


@dataclass(frozen=True)
class PreparedData:
    """Files of prepared data, and how samples are taken from them.

    Attributes:
        prefixes: Names of the files as in ``--data-path``.
        settings: Settings of the run whose evaluation this is: share of each file, length of a
            sample, masks of documents.
        limit: Maximum number of samples of each file; None for all.
    """

    prefixes: tuple[str, ...]
    settings: Settings
    limit: int | None = None


def settings_of_checkpoint(path: Path) -> dict:
    """Return the settings of samples in a checkpoint directory; {} for any other directory."""
    if is_hugging_face(path) or not path.is_dir():
        return {}
    usable = find_candidates(path).usable
    saved = usable[0].manifest["settings"] if usable and not usable[0].weights_only else {}
    if not saved:
        return {}
    # runs of version 0.6.0 or before had no masks
    masks = {name: bool(saved.get(name)) for name in MASKS}
    return {"seq_length": saved["seq_length"], **masks}


def sequence_length(prefixes: Sequence[str]) -> int | None:
    """Return the smallest --seq-length that the data were prepared with; None if unknown.

    Raises:
        DataError: A summary cannot be read.
    """
    lengths = (stored_options(prefix).get("seq_length") for prefix in prefixes)
    return min((length for length in lengths if isinstance(length, int)), default=None)


def open_prepared(
    data: PreparedData, vocab_size: int, tokenizer: Tokenizer | None
) -> dict[str, EvaluationSet]:
    """Return the evaluation sets of a run on these data, by name.

    Args:
        data: The files.
        vocab_size: Size of the model's vocabulary; samples with other tokens are refused.
        tokenizer: Tokenizer of the model, which must have prepared the data and whose eos ends
            documents; None if the model has none.

    Raises:
        DataError: A file is missing or damaged, or was prepared with another tokenizer.
        SettingsError: Two files have the same name.
    """
    if tokenizer is not None:
        check_same_tokenizer(data.prefixes, tokenizer, "the model's tokenizer is")
    return make_eval_sets(data.settings, vocab_size, make_document_masks(data.settings, tokenizer))


@torch.inference_mode()
def measure_prepared(
    model: NestedModel,
    samples: EvaluationSet,
    limit: int | None,
    batch_tokens: int,
    title: str | None = None,
) -> dict[int, HeldOut]:
    """Measure every exit on each document of instructions, or on each sample of text.

    Args:
        model: The model.
        samples: Evaluation set of a run.
        limit: Maximum number of samples; None for all.
        batch_tokens: Maximum number of tokens of a forward pass.
        title: Title of the progress bar; None for no bar.

    Returns:
        {depth: measurements}.
    """
    by_document = isinstance(samples.source, InstructionSamples)
    length, total = samples.source.seq_length, min(limit or len(samples), len(samples))
    size = max(1, batch_tokens // length)
    sums: dict[int, list[Tensor]] = {depth: [] for depth in model.depths}
    with tqdm(
        total=total * length, desc=title, unit="token", unit_scale=True, disable=title is None
    ) as bar:
        for begin in range(0, total, size):
            batch = collate([samples[number] for number in range(begin, min(begin + size, total))])
            for depth, sums_4d in _measure_batch(model, batch, by_document):
                sums[depth].append(sums_4d)
            bar.update(batch.tokens_bs.numel())
    measured = {}
    for depth, rows in sums.items():
        sums_4d = torch.cat(rows, 1)
        nats_d, agreed_d, tokens_d, right_d = sums_4d[:, sums_4d[2] > 0]
        measured[depth] = HeldOut(nats_d, agreed_d, tokens_d, right_d if by_document else None)
    return measured


def _measure_batch(
    model: NestedModel, batch: Batch, by_document: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield (depth, sums [4, d] of each document of a batch: nats, agreed, counted, right)."""
    size, length = batch.tokens_bs.shape
    # documents are numbered in the whole batch; a row has at most length + 1 of them
    document_bs = torch.arange(size)[:, None].expand(size, length) * (length + 1)
    if by_document and batch.pieces_bs is not None:
        document_bs = document_bs + batch.pieces_bs.long()
    counted_bs = batch.loss_mask_bs != 0
    document_n, labels_n = document_bs[counted_bs], batch.labels_bs[counted_bs]
    masks = attention_masks(model.model.config, batch.pieces_bs)
    states = model.hidden_states(batch.tokens_bs, masks, batch.positions_bs)
    hidden = {depth: hidden_bsh[counted_bs] for depth, hidden_bsh in states.items()}
    sums = {
        depth: torch.zeros(4, size * (length + 1), dtype=torch.float64) for depth in model.depths
    }
    for depth, part, nats_n, agrees_n, right_n in score_exits(model, hidden, labels_n):
        columns = (nats_n, agrees_n, torch.ones_like(nats_n), right_n)
        sums_4n = torch.stack([column.double() for column in columns])
        sums[depth].index_add_(1, document_n[part], sums_4n)
    yield from sums.items()


def attention_masks(config, pieces_bs: Tensor | None) -> Tensor | dict[str, Tensor] | None:
    """Return the attention masks that keep packed documents apart; None for plain causal attention.

    Masks are [b, 1, s, s] and True where a token may attend, as transformers takes them: one, or
    one for each kind of layer.
    """
    if pieces_bs is None:
        return None
    length = pieces_bs.size(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (pieces_bs[:, None, :, None] == pieces_bs[:, None, None, :]) & causal
    window = getattr(config, "sliding_window", None)
    windowed = same if window is None else same & causal.triu(1 - window)
    if config.model_type in ("qwen2", "qwen3"):
        return {"full_attention": same, "sliding_attention": windowed}
    return windowed if config.model_type == "mistral" else same
