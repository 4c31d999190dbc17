"""SFT+ICT, the baseline of Sorted LLaMA: a norm and a head for each exit, on frozen layers."""

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
from megatron_sorted.conversion.hugging_face.families import EXITS_FILE, read_config
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExit
from megatron_sorted.conversion.staging import staged_directory
from megatron_sorted.errors import DataError, TrainingError
from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.held_out import LOGIT_BYTES, read_batch
from megatron_sorted.evaluation.nested_model import NestedModel, copy_exit
from megatron_sorted.evaluation.windows import cut_documents

KEPT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a directory that belong to the model and are copied; pickles are not."""
WARMUP_SHARE = 0.05
CLIP_NORM = 1.0
NUM_REPORTS = 20
"""Number of intervals of the training over which losses are averaged."""


@dataclass(frozen=True)
class HeadTraining:
    """The training of heads, by AdamW.

    The learning rate follows a cosine to zero after a short warm-up; the gradient norm of each exit
    is clipped at 1.

    Attributes:
        epochs: Number of epochs.
        lr: Largest learning rate; None for 1 / hidden size, with which one step moves a logit by
            about one, whatever the width.
        batch_size: Number of windows in a batch.
        weight_decay: Weight decay.
        seed: Seed of the order of windows.
    """

    epochs: int = 1
    lr: float | None = None
    batch_size: int = 8
    weight_decay: float = 0.0
    seed: int = 0


@dataclass
class TrainedHeads:
    """The result of training heads.

    Attributes:
        model: The model with the exits' own norms and heads.
        num_steps: Number of optimizer steps.
        num_tokens: Number of counted tokens over all epochs.
        num_new_parameters: Number of parameters of the new norms and heads.
        lr: Largest learning rate.
        base_sha256: Hash of the frozen parameters, the same before and after.
        losses: Mean training loss of each exit in up to twenty intervals.
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
    """Train a norm and a head for every exit before the last layer, from copies of the last exit's.

    All exits learn from one forward pass of the frozen layers, each from its own loss alone; norms
    and heads train in float32.

    Args:
        model: The model.
        documents: Documents to train on.
        seq_length: Length of the windows of long documents.
        training: How heads are trained.
        title: Title of the progress bar; None for no bar.

    Raises:
        DataError: There is nothing to train on, or no exit before the last layer.
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
    modules = {depth: nn.ModuleList([own.norm, own.head]) for depth, own in exits.items()}
    for pair in modules.values():
        pair.float().requires_grad_(True)
    parameters = {depth: list(pair.parameters()) for depth, pair in modules.items()}
    lr = training.lr or 1 / model.model.config.hidden_size
    optimizer = torch.optim.AdamW(
        [parameter for own in parameters.values() for parameter in own],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=training.weight_decay,
    )
    num_steps = training.epochs * math.ceil(len(windows) / training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _lr_factor(step, num_steps)
    )
    order, losses, num_tokens = random.Random(training.seed), _MeanLosses(depths), 0
    with tqdm(total=num_steps, desc=title, unit="step", disable=title is None) as bar:
        for _ in range(training.epochs):
            order.shuffle(windows)
            for begin in range(0, len(windows), training.batch_size):
                with torch.no_grad():
                    read = read_batch(
                        model, documents, windows[begin : begin + training.batch_size]
                    )
                optimizer.zero_grad()
                for depth in depths:
                    loss = _backward(exits[depth], read.hidden[depth], read.labels_n)
                    if not math.isfinite(loss):
                        raise TrainingError(
                            f"--train-heads: the loss of exit {depth} of {model.name} is {loss} at "
                            f"step {losses.steps + 1}. Use a smaller --train-heads-lr."
                        )
                    losses.add(depth, loss)
                    nn.utils.clip_grad_norm_(parameters[depth], CLIP_NORM)
                optimizer.step()
                schedule.step()
                num_tokens += len(read.labels_n)
                bar.update()
                losses.end_step(num_steps)
                latest = " ".join(f"{depth}:{losses.last[depth]:.2f}" for depth in depths)
                bar.set_postfix_str(f"loss {latest}", refresh=False)
    if hash_parameters(model.model) != before:
        raise TrainingError(
            f"--train-heads: layers of {model.name} changed, which must not happen. Report this as "
            "a bug."
        )
    for pair in modules.values():
        pair.to(model.model.dtype).requires_grad_(False)
    trained = NestedModel(f"{model.name}+ICT", model.model, model.depths, exits)
    num_new = sum(parameter.numel() for own in parameters.values() for parameter in own)
    return TrainedHeads(trained, num_steps, num_tokens, num_new, lr, before, losses.means)


def hash_parameters(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _backward(own: NestedExit, hidden_nh: Tensor, labels_n: Tensor) -> float:
    """Return the mean loss of one exit, and add its gradients to norm and head.

    It runs in blocks of tokens, so that few logits exist at a time.
    """
    size, total = max(1, LOGIT_BYTES // (4 * own.head.out_features)), 0.0
    for hidden, labels in zip(hidden_nh.split(size), labels_n.split(size), strict=True):
        logits = own.head(own.norm(hidden.float()))
        loss = cross_entropy(logits, labels, reduction="sum") / len(labels_n)
        loss.backward()
        total += float(loss.detach())
    return total


def _lr_factor(step: int, num_steps: int) -> float:
    """Return the factor of the largest learning rate at a step."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class _MeanLosses:
    """The mean losses of the exits in intervals of the training."""

    def __init__(self, depths: Sequence[int]):
        self.last: dict[int, float] = {}
        self.means: dict[int, list[float]] = {depth: [] for depth in depths}
        self._open: dict[int, list[float]] = {depth: [] for depth in depths}
        self.steps = 0

    def add(self, depth: int, loss: float) -> None:
        """Record an exit's loss in a step."""
        self.last[depth] = loss
        self._open[depth].append(loss)

    def end_step(self, num_steps: int) -> None:
        """End a step, and an interval at every twentieth of all steps."""
        self.steps += 1
        if self.steps * NUM_REPORTS // num_steps > (self.steps - 1) * NUM_REPORTS // num_steps:
            for depth, losses in self._open.items():
                self.means[depth].append(sum(losses) / len(losses))
                losses.clear()


def save_with_heads(
    model: NestedModel, source: Path, destination: Path, overwrite: bool = False
) -> None:
    """Write a copy of a model's directory with the exits' norms and heads, atomically.

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
    config = without_exits(read_config(source))
    with staged_directory(destination, overwrite, num_bytes, source) as staged:
        for path in files:
            shutil.copyfile(path, staged / path.name)
        write_config(staged, config | keys_of_exits(model.depths, own_norms=True, own_heads=True))
        save_file(tensors, str(staged / EXITS_FILE), metadata={"format": "pt"})
