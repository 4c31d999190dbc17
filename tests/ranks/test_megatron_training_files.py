"""What Megatron-LM's training saves is exported with the very weights that transformers has."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_sorted.checkpoint.plain_objects import check_checkpoint_is_safe
from megatron_sorted.checkpoint.restricted_pickle import read_stored_names
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.importing import import_model
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.origins import RequestedExits
from megatron_sorted.conversion.writing import WriteOptions
from tests.support.hugging_face import global_weights, make_model
from tests.support.layouts import PP2, TP2, UNTIED
from tests.support.megatron_files import make_truth
from tests.support.megatron_training import load_with_core, train_and_save
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCABULARY, tiny

# As it stands, the state of the distributed optimizer is in each of them.
LAYOUTS = {"dp2": (2, {}), "tp2": (2, TP2), "tp2 pp2 untied": (4, {**TP2, **PP2, **UNTIED})}
STEP = 300


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_checkpoint_has_the_weights_of_transformers(layout, tmp_path):
    world_size, changes = LAYOUTS[layout]
    tensor = changes.get("tensor_model_parallel_size", 1)
    settings = tiny(make_vocab_size_divisible_by=8 // tensor, **changes)
    tied = not settings.untie_embeddings_and_output_weights
    model = make_model("Llama", tie_word_embeddings=tied, rms_norm_eps=1e-5)
    seed = str(tmp_path / "seed")
    network = {name: value for name, value in changes.items() if name in UNTIED}
    run_ranks(1, make_truth, tiny(**network), seed, global_weights(model))
    run = tmp_path / "run"
    shared, *_ = run_ranks(world_size, train_and_save, settings, seed, str(run), STEP)
    assert {"args", "content_metadata", "iteration", "optimizer", "opt_param_scheduler"} <= {
        *shared
    }

    directory = run / f"iter_{STEP:07d}"
    stored = read_stored_names(directory)
    assert any(name.startswith("optimizer.distributed.") for name in stored.tensors)
    assert any(name.startswith("rng_state/") for name in stored.objects)
    check_checkpoint_is_safe(directory)
    unverified = WriteOptions(verify=False)
    opened = open_model(run, vocab_size=VOCABULARY)
    import_model(opened, tmp_path / "imported", RequestedExits((2,)), unverified)
    for source in (run, tmp_path / "imported"):
        exported = tmp_path / f"exported from {source.name}"
        vocabulary = VOCABULARY if source == run else None
        export_model(open_model(source, vocab_size=vocabulary), exported, unverified)
        weights = load_file(exported / "model.safetensors")
        expected = model.state_dict()
        if tied:
            del expected["lm_head.weight"]
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), name

    # Megatron's own loader reads what the import wrote; it has more rows of the vocabulary.
    imported = str(tmp_path / "imported" / "iter_0000000")
    ((loaded, *differ),) = run_ranks(1, load_with_core, tiny(**network), imported)
    assert differ == [[], []]
    for name, weight in global_weights(model).items():
        assert torch.equal(loaded[name][: len(weight)], weight), name
