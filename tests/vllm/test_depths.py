"""A model served at the depth of an exit is that exit's model, without the weights above."""

import json
from pathlib import Path

import pytest
import torch

from megatron_sorted.serving.vllm.options import EngineOptions
from tests.vllm.engine import engine, frozen, generate, plain_texts, runner_of
from tests.vllm.models import extract_by_hand, prompts, reference, write_model


def parameter_bytes(llm) -> int:
    """Return the bytes of an engine's parameters."""
    return sum(parameter.nbytes for parameter in {*runner_of(llm).model.parameters()})


@pytest.mark.parametrize(
    ("family", "own", "depth"),
    [
        ("llama", (), 1),
        ("llama", (), 3),
        ("llama", (), 4),
        ("mistral", (), 2),
        ("qwen2", (), 2),
        ("qwen3", (), 2),
        ("llama", ("norm", "lm_head"), 2),
        ("qwen2", ("norm", "lm_head"), 2),
        ("qwen3", ("norm", "block"), 2),
        ("llama", ("block",), 1),
    ],
)
def test_texts_and_bytes_are_those_of_the_extracted_model(tmp_path, family, own, depth):
    directory = write_model(tmp_path / "model", family, own)
    extracted = extract_by_hand(directory, tmp_path / "extracted", depth, own)
    some = prompts(12)
    with engine(extracted) as (llm, _):
        wanted, size = generate(llm, some), parameter_bytes(llm)
    with engine(directory, EngineOptions("fixed", (depth,))) as (llm, _):
        assert generate(llm, some) == wanted
        assert parameter_bytes(llm) == size
    if depth < 4:
        assert wanted != plain_texts(directory, frozen(some))


@pytest.mark.parametrize(
    "own", [("adapter",), ("norm", "mlp"), ("norm", "adapter", "mlp")], ids=str
)
def test_exits_that_no_ordinary_model_computes(tmp_path, own):
    """An adapter or MLP of an exit: compared with the directory's own program."""
    directory, depth, some = write_model(tmp_path / "model", "llama", own), 2, prompts(6)
    with engine(directory, EngineOptions("fixed", (depth,))) as (llm, _):
        texts = generate(llm, some, 16)
    model = reference(directory)
    for prompt, text in zip(some, texts, strict=True):
        assert model.generate(torch.tensor([prompt]), depth, 16)[0, len(prompt) :].tolist() == text


def test_two_ranks_serve_a_depth(tmp_path):
    directory = write_model(tmp_path / "model", "llama", ("norm", "lm_head", "adapter"))
    some, texts = prompts(6), []
    for ranks in (1, 2):
        with engine(directory, EngineOptions("fixed", (2,)), tensor_parallel_size=ranks) as (
            llm,
            _,
        ):
            texts.append(generate(llm, some, 16))
    assert texts[0] == texts[1]


def test_files_of_layers_above_are_not_read(tmp_path, monkeypatch):
    """No tensor is taken from files that hold the upper layers alone."""
    from vllm.model_executor.model_loader import default_loader, weight_utils

    if not hasattr(weight_utils, "filter_safetensors_files_by_weight_name"):
        pytest.skip("this vLLM reads every file")
    directory = write_model(tmp_path / "model", max_shard_size=150_000)
    read, given = [], default_loader.safetensors_weights_iterator

    def iterate(files, *arguments, **options):
        read.extend(files)
        return given(files, *arguments, **options)

    monkeypatch.setattr(default_loader, "safetensors_weights_iterator", iterate)
    with engine(directory, EngineOptions("fixed", (2,))) as (llm, _):
        generate(llm, prompts(1), 2)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        file
        for name, file in index.items()
        if not name.startswith(("model.layers.2.", "model.layers.3."))
    }
    assert {Path(file).name for file in read} == needed < {*index.values()}


def test_heads_of_exits_are_not_taken_for_the_head_of_a_tied_model(tmp_path):
    """vLLM alone unties such a model and computes with a head that it never loads."""
    directory = write_model(tmp_path / "model", "qwen2", ("norm", "lm_head"))
    some = prompts(6)
    wanted = [
        reference(directory).generate(torch.tensor([one]), 4, 12)[0, len(one) :].tolist()
        for one in some
    ]
    for options in (
        EngineOptions(),
        EngineOptions("fixed", (4,)),
        EngineOptions("self_speculative", (2,)),
    ):
        with engine(directory, options) as (llm, _):
            assert generate(llm, some, 12) == wanted
