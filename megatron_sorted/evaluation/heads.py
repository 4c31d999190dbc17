"""SFT+ICT, the baseline of Sorted LLaMA: a norm and a head for each intermediate exit, trained on frozen layers."""

import hashlib
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from megatron_sorted.conversion.exporting import write_config
from megatron_sorted.conversion.hugging_face.exit_keys import keys_of_exits, without_exits
from megatron_sorted.conversion.hugging_face.families import EXITS, read_config
from megatron_sorted.conversion.hugging_face.nested_exits import Exit
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.errors import DataError, TrainingError
from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.held_out import LOGIT_BYTES, read_batch
from megatron_sorted.evaluation.nested_model import NestedModel, copy_exit
from megatron_sorted.evaluation.windows import cut_documents

KEPT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a directory that belong to the model; others (pickles above all) stay where they are."""
WARMUP_SHARE = 0.05
CLIP_NORM = 1.0
NUM_REPORTS = 20


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained: AdamW, cosine to nothing after a short warm-up, gradient norm of each exit clipped at 1.

    Attributes:
        lr: None: 1 / hidden size, with which one step moves a logit by about one, whatever the width.
    """

    epochs: int = 1
    lr: float | None = None
    batch_size: int = 8
    weight_decay: float = 0.0
    seed: int = 0


@dataclass
class TrainedHeads:
    """What became of it.

    Attributes:
        model: The same layers with the exits' own norms and heads.
        num_steps, num_tokens: Optimizer steps; tokens whose loss was counted, over all epochs.
        num_new_parameters: Of the norms and heads.
        losses: Mean training loss of each exit over each of up to twenty parts of the training.
        lr: Largest learning rate.
        base_sha256: Of all parameters of the layers, embedding, norm and head, before and after alike.
    """

    model: NestedModel
    num_steps: int
    num_tokens: int
    num_new_parameters: int
    lr: float
    base_sha256: str
    losses: dict[int, list[float]] = field(default_factory=dict)


def train_heads(
    model: NestedModel,
    documents: Sequence[EncodedDocument],
    seq_length: int,
    training: HeadTraining,
    title: str | None = None,
) -> TrainedHeads:
    """Return the model with norms and heads of its own at every intermediate exit, which start as copies of the last exit's.

    All exits learn from one forward pass of the frozen layers, each from its own loss alone; norms and heads train in float32.

    Raises:
        DataError: Nothing to train on, or no intermediate exit.
        TrainingError: A loss is not finite.
    """
    depths = model.depths[:-1]
    windows = cut_documents(documents, seq_length, seq_length)
    if not depths:
        raise DataError(
            f"--train-heads: {model.name} has no exit before its last layer. Give more --depths."
        )
    if not windows:
        raise DataError("--train-heads: no token in the text to train on. Give another file.")
    before = hash_parameters(model.model)
    exits = {depth: copy_exit(model.exits[model.depths[-1]]) for depth in depths}
    for found in exits.values():
        for module in (found.norm, found.head):
            module.float().requires_grad_(True)
    own = {
        depth: [*found.norm.parameters(), *found.head.parameters()]
        for depth, found in exits.items()
    }
    lr = training.lr or 1 / model.model.config.hidden_size
    optimizer = torch.optim.AdamW(
        [p for parameters in own.values() for p in parameters],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=training.weight_decay,
    )
    num_steps = training.epochs * math.ceil(len(windows) / training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _share_of_lr(step, num_steps)
    )
    order, sums, counts = random.Random(training.seed), _Sums(depths), 0
    with tqdm(total=num_steps, desc=title, unit="step", disable=title is None) as bar:
        for _ in range(training.epochs):
            order.shuffle(windows)
            for begin in range(0, len(windows), training.batch_size):
                with torch.no_grad():
                    _, labels_n, hidden = read_batch(
                        model, documents, windows[begin : begin + training.batch_size]
                    )
                optimizer.zero_grad()
                for depth in depths:
                    loss = _backward(exits[depth], hidden[depth], labels_n)
                    if not math.isfinite(loss):
                        raise TrainingError(
                            f"--train-heads: the loss of exit {depth} of {model.name} is {loss} at step {sums.steps + 1}. "
                            "Use a smaller --train-heads-lr."
                        )
                    sums.add(depth, loss)
                    nn.utils.clip_grad_norm_(own[depth], CLIP_NORM)
                optimizer.step()
                schedule.step()
                counts += len(labels_n)
                bar.update()
                sums.close_part(num_steps)
                bar.set_postfix_str(
                    "loss " + " ".join(f"{depth}:{sums.last[depth]:.2f}" for depth in depths),
                    refresh=False,
                )
    after = hash_parameters(model.model)
    if after != before:
        raise TrainingError(
            f"--train-heads: layers of {model.name} changed, which must not happen. Report this as a bug."
        )
    dtype = model.model.dtype
    for found in exits.values():
        for module in (found.norm, found.head):
            module.to(dtype).requires_grad_(False)
    trained = NestedModel(f"{model.name}+ICT", model.model, model.depths, exits)
    num_new = sum(parameter.numel() for parameters in own.values() for parameter in parameters)
    return TrainedHeads(trained, num_steps, counts, num_new, lr, before, sums.parts)


def hash_parameters(model: nn.Module) -> str:
    """Return the SHA-256 of names and bits of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _backward(found: Exit, hidden_nh: Tensor, labels_n: Tensor) -> float:
    """Return the mean loss of one exit; its gradient is added to norm and head, chunk by chunk, so that few logits exist at a time."""
    chunk, total = max(1, LOGIT_BYTES // (4 * found.head.out_features)), 0.0
    for begin in range(0, len(labels_n), chunk):
        part = slice(begin, begin + chunk)
        loss = cross_entropy(
            found.head(found.norm(hidden_nh[part].float())), labels_n[part], reduction="sum"
        ) / len(labels_n)
        loss.backward()
        total += float(loss.detach())
    return total


def _share_of_lr(step: int, num_steps: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class _Sums:
    """Mean losses over parts of the training."""

    def __init__(self, depths: Sequence[int]):
        self.last: dict[int, float] = {}
        self.parts: dict[int, list[float]] = {depth: [] for depth in depths}
        self._open: dict[int, list[float]] = {depth: [] for depth in depths}
        self.steps = 0

    def add(self, depth: int, loss: float) -> None:
        self.last[depth] = loss
        self._open[depth].append(loss)

    def close_part(self, num_steps: int) -> None:
        """End a step, and with it a part at every twentieth of all steps."""
        self.steps += 1
        if self.steps * NUM_REPORTS // num_steps > (self.steps - 1) * NUM_REPORTS // num_steps:
            for depth, losses in self._open.items():
                self.parts[depth].append(sum(losses) / len(losses))
                losses.clear()


def save_with_heads(
    model: NestedModel, source: Path, destination: Path, overwrite: bool = False
) -> None:
    """Write the directory of ``source`` with the exits' norms and heads beside it, whole or not at all.

    Raises:
        CheckpointError: The destination exists or cannot be written.
    """
    from safetensors.torch import save_file

    files = sorted({path for pattern in KEPT for path in source.glob(pattern)})
    tensors = {
        f"exits.{depth}.{part}.weight": module.weight.detach().contiguous()
        for depth in model.depths[:-1]
        for part, module in (
            ("norm", model.exits[depth].norm),
            ("lm_head", model.exits[depth].head),
        )
    }
    num_bytes = sum(path.stat().st_size for path in files) + sum(
        tensor.nbytes for tensor in tensors.values()
    )
    with staged_directory(destination, overwrite, num_bytes, source) as aside:
        for path in files:
            shutil.copyfile(path, aside / path.name)
        write_config(
            aside,
            {
                **without_exits(read_config(source)),
                **keys_of_exits(model.depths, own_norms=True, own_heads=True),
            },
        )
        save_file(tensors, str(aside / EXITS), metadata={"format": "pt"})
