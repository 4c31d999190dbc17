"""Held-out loss of every exit, against plain PyTorch with transformers' own smaller models."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sorted.evaluation import held_out
from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.held_out import measure_held_out, ratio_standard_error
from megatron_sorted.evaluation.nested_model import load_nested_model
from tests.support.evaluated import VOCAB_SIZE, write_model


def documents():
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (5, 40, 1, 23, 64):
        ids = [1, *torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()]
        made.append(
            EncodedDocument(
                ids, [False] + [length != 23 or place % 3 == 0 for place in range(length)]
            )
        )
    return made


@torch.no_grad()
def plain(directory, depth, document, seq_length, stride):
    """Return {target: (loss, most likely token)}, each from the earliest window that reaches it."""
    model, predictions = (
        AutoModelForCausalLM.from_pretrained(
            directory, num_hidden_layers=depth, dtype=torch.float32
        ),
        {},
    )
    for begin in range(0, len(document.ids) - 1, stride):
        logits = model(torch.tensor([document.ids[begin : begin + seq_length]])).logits[0].double()
        for place, row in enumerate(logits):
            target = begin + place + 1
            if target < len(document.ids) and target not in predictions:
                predictions[target] = (
                    -float(row.log_softmax(-1)[document.ids[target]]),
                    int(row.argmax()),
                )
    return {target: values for target, values in predictions.items() if document.counted[target]}


@pytest.mark.parametrize(
    ("seq_length", "stride", "batch_tokens"), [(64, 64, 64), (16, 16, 50), (16, 5, 200)]
)
def test_every_number_is_that_of_plain_pytorch(
    tmp_path, monkeypatch, seq_length, stride, batch_tokens
):
    directory, made = write_model(tmp_path / "m"), documents()
    monkeypatch.setattr(held_out, "LOGIT_BYTES", 4 * VOCAB_SIZE * 7)  # seven tokens at a time
    measured = measure_held_out(
        load_nested_model(directory), made, seq_length, stride, batch_tokens
    )
    reference = {
        depth: [plain(directory, depth, document, seq_length, stride) for document in made]
        for depth in (1, 2, 3)
    }
    for depth, held in measured.items():
        assert (
            held.tokens_d.tolist()
            == [sum(document.counted) for document in made]
            == [5, 40, 1, 8, 64]
        )
        sums = [sum(loss for loss, _ in one.values()) for one in reference[depth]]
        assert held.nats_d.tolist() == pytest.approx(sums, rel=1e-6)
        assert held.loss == pytest.approx(sum(sums) / 118, rel=1e-6)
        assert held.bits_per_byte(500) == pytest.approx(sum(sums) / math.log(2) / 500, rel=1e-6)
        agreed = [
            sum(best == last[target][1] for target, (_, best) in one.items())
            for one, last in zip(reference[depth], reference[3], strict=True)
        ]
        assert held.agreed_d.tolist() == agreed and held.agreement == sum(agreed) / 118
    assert measured[3].agreement == 1.0 and measured[1].agreement < 1.0


def test_standard_error():
    # equal lengths: the textbook standard error of a mean
    sums, counts = torch.tensor([2.0, 4.0, 9.0]), torch.tensor([10.0, 10.0, 10.0])
    assert ratio_standard_error(sums, counts) == pytest.approx(
        torch.tensor([0.2, 0.4, 0.9]).std().item() / math.sqrt(3)
    )
    # unequal ones: r = 12 / 10, residuals 3 - 2 * 1.2 = 0.6 and 9 - 8 * 1.2 = -0.6
    assert ratio_standard_error(
        torch.tensor([3.0, 9.0]), torch.tensor([2.0, 8.0])
    ) == pytest.approx(math.sqrt(2 * 0.72) / 10)
    assert ratio_standard_error(torch.tensor([3.0]), torch.tensor([2.0])) is None
