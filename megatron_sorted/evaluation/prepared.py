"""Loss of every exit on prepared data (PREFIX.bin, PREFIX.idx): training's own samples, windows and masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_sorted.checkpoint.candidates import find_candidates
from megatron_sorted.conversion.network import is_hugging_face
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
    """Files of prepared data, and how samples are cut from them.

    Attributes:
        prefixes: As ``--data-path`` of a run names them.
        settings: Of the run whose evaluation this is: share of each file, length of a sample, masks of documents.
        limit: Only the first samples of each file.
    """

    prefixes: tuple[str, ...]
    settings: Settings
    limit: int | None = None


def settings_of_checkpoint(path: Path) -> dict:
    """Return what a directory of checkpoints says of its run's samples, by field name; nothing of any other directory."""
    if is_hugging_face(path) or not path.is_dir():
        return {}
    usable = find_candidates(path).usable
    saved = usable[0].manifest["settings"] if usable and not usable[0].weights_only else {}
    # a run of 0.6.0 or before knows no masks of text, which is to say that it had none
    return (
        {"seq_length": saved["seq_length"], **{name: bool(saved.get(name)) for name in MASKS}}
        if saved
        else {}
    )


def sequence_length(prefixes: Sequence[str]) -> int | None:
    """Return the smallest --seq-length that the data were prepared with; None where no summary names one.

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
        vocab_size: Of the model; other tokens are refused when their sample is read.
        tokenizer: Of the model, if it has one: the data must have been prepared with it, and its eos ends documents.

    Raises:
        DataError: A file is missing or damaged, or was prepared with another tokenizer.
        SettingsError: Two files have one name.
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
    """Return {depth: what the exit does on every document of instructions, on every sample of text}.

    Args:
        model: The model.
        samples: What a run evaluates on.
        limit: Only the first samples; None for all.
        batch_tokens: Tokens of one forward pass.
        title: Of the progress bar; None for no bar.
    """
    by_document = isinstance(samples.source, InstructionSamples)
    length, total = samples.source.seq_length, min(limit or len(samples), len(samples))
    size = max(1, batch_tokens // length)
    parts: dict[int, list[Tensor]] = {depth: [] for depth in model.depths}
    with tqdm(
        total=total * length, desc=title, unit="token", unit_scale=True, disable=title is None
    ) as bar:
        for begin in range(0, total, size):
            batch = collate([samples[number] for number in range(begin, min(begin + size, total))])
            for depth, numbers in _measure_batch(model, batch, by_document):
                parts[depth].append(numbers)
            bar.update(batch.tokens_bs.numel())
    found = {}
    for depth, numbers in parts.items():
        nats_d, agreed_d, tokens_d, right_d = torch.cat(numbers, 1)
        counted = tokens_d > 0
        found[depth] = HeldOut(
            nats_d[counted],
            agreed_d[counted],
            tokens_d[counted],
            right_d[counted] if by_document else None,
        )
    return found


def _measure_batch(
    model: NestedModel, batch: Batch, by_document: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield (depth, sums over the documents of a batch [4, d]: nats, agreed, counted, right)."""
    size, length = batch.tokens_bs.shape
    segments_bs = (
        torch.zeros_like(batch.tokens_bs) if batch.segments_bs is None else batch.segments_bs.long()
    )
    place_bs = torch.arange(size)[:, None] * (length + 1) + (
        segments_bs if by_document else torch.zeros_like(segments_bs)
    )
    counted_bs = batch.loss_mask_bs != 0
    place_n, labels_n = place_bs[counted_bs], batch.labels_bs[counted_bs]
    masks = attention_masks(model.model.config, batch.segments_bs)
    hidden = {
        depth: hidden_bsh[counted_bs]
        for depth, hidden_bsh in model.hidden_states(
            batch.tokens_bs, masks, batch.positions_bs
        ).items()
    }
    sums = {
        depth: torch.zeros(4, size * (length + 1), dtype=torch.float64) for depth in model.depths
    }
    for depth, part, nats_n, agrees_n, right_n in score_exits(model, hidden, labels_n):
        rows = torch.stack(
            (
                nats_n.double(),
                agrees_n.double(),
                torch.ones_like(nats_n, dtype=torch.float64),
                right_n.double(),
            )
        )
        sums[depth].index_add_(1, place_n[part], rows)
    yield from sums.items()


def attention_masks(config, segments_bs: Tensor | None) -> Tensor | dict[str, Tensor] | None:
    """Return where tokens may look within their own piece, as models of transformers take it; None where plain causal attention is right.

    Shapes: segments [b, s]; masks [b, 1, s, s], True where a token may look; by kind of layer where a model has several.
    """
    if segments_bs is None:
        return None
    length = segments_bs.size(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (segments_bs[:, None, :, None] == segments_bs[:, None, None, :]) & causal
    window = getattr(config, "sliding_window", None)
    windowed = same if window is None else same & causal.triu(1 - window)
    if config.model_type in ("qwen2", "qwen3"):
        return {"full_attention": same, "sliding_attention": windowed}
    return windowed if config.model_type == "mistral" else same
