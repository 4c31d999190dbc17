"""Heads on frozen layers, against plain PyTorch, and saved and read again."""

import json
import math

import pytest
import torch

from megatron_sorted.errors import CheckpointError, DataError, TrainingError
from megatron_sorted.evaluation.documents import EncodedDocument
from megatron_sorted.evaluation.heads import (
    HeadTraining,
    hash_parameters,
    save_with_heads,
    train_heads,
)
from megatron_sorted.evaluation.held_out import measure_held_out
from megatron_sorted.evaluation.nested_model import NestedModel, load_nested_model
from tests.support.evaluated import VOCAB_SIZE, make_model, write_model


def documents(number=6):
    generator = torch.Generator().manual_seed(4)
    return [
        EncodedDocument(
            [1, *torch.randint(3, 40, (20,), generator=generator).tolist()], [False] + [True] * 20
        )
        for _ in range(number)
    ]


def test_training_is_that_of_plain_pytorch_and_changes_no_layer(tmp_path):
    directory = write_model(tmp_path / "m")
    trained = train_heads(
        load_nested_model(directory),
        documents(),
        64,
        HeadTraining(epochs=20, lr=3e-3, batch_size=6),
    )
    reference = load_nested_model(directory)
    before = hash_parameters(reference.model)
    assert (
        trained.base_sha256 == before == hash_parameters(trained.model.model)
        and trained.model.name == "m+ICT"
    )
    assert (
        trained.num_steps == 20
        and trained.num_tokens == 20 * 120
        and trained.num_new_parameters == 2 * 32 * (VOCAB_SIZE + 1)
    )
    # all windows in one batch: the order in which they are drawn does not matter
    ids = torch.tensor([document.ids for document in documents()])
    for depth in (1, 2):
        model = make_model()
        inner = model.model
        inner.layers = inner.layers[:depth]
        model.config.num_hidden_layers = depth
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        own = [inner.norm.weight, model.lm_head.weight]
        optimizer = torch.optim.AdamW(own, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
        losses = []
        for step in range(20):
            optimizer.param_groups[0]["lr"] = 3e-3 * (
                1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 19))
            )
            loss = torch.nn.functional.cross_entropy(
                model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert (
            trained.losses[depth] == pytest.approx(losses, rel=1e-5)
            and losses[-1] < losses[0] - 0.5
        )
        torch.testing.assert_close(
            trained.model.exits[depth].head.weight, own[1].detach(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            trained.model.exits[depth].norm.weight, own[0].detach(), rtol=1e-4, atol=1e-5
        )
    assert trained.model.exits[3].head is trained.model.model.lm_head


def test_saved_heads_give_the_same_numbers_when_loaded(tmp_path):
    source = write_model(tmp_path / "m")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    model = train_heads(load_nested_model(source), documents(), 64, HeadTraining()).model
    save_with_heads(model, source, tmp_path / "new" / "ict")
    config = json.loads((tmp_path / "new" / "ict" / "config.json").read_text())
    assert (config["exit_layer_indices"], config["tie_exit_lm_head"], config["own_exit_norms"]) == (
        [1, 2, 3],
        False,
        True,
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ict"]
    assert not (tmp_path / "new" / "ict" / "pytorch_model.bin").exists()
    again = measure_held_out(load_nested_model(tmp_path / "new" / "ict"), documents(), 64)
    for depth, held in measure_held_out(model, documents(), 64).items():
        assert torch.equal(again[depth].nats_d, held.nats_d)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save_with_heads(model, source, tmp_path / "new" / "ict")
    save_with_heads(model, source, tmp_path / "new" / "ict", overwrite=True)


def test_what_cannot_be_trained():
    with pytest.raises(DataError, match="has no exit before its last layer"):
        train_heads(NestedModel("m", make_model(), (3,)), documents(), 64, HeadTraining())
    with pytest.raises(DataError, match="no token in the text"):
        train_heads(NestedModel("m", make_model(), (1, 3)), [], 64, HeadTraining())
    broken = make_model()
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss of exit 1 of m is nan at step 1"):
        train_heads(NestedModel("m", broken, (1, 3)), documents(), 64, HeadTraining())
