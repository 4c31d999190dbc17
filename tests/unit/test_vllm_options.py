"""The plug-in's options for vLLM and its sorted drafts, without vLLM."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.serving.vllm.drafting import DraftExits
from megatron_sorted.serving.vllm.exits import read_exits_of
from megatron_sorted.serving.vllm.metadata import queries, select_texts
from megatron_sorted.serving.vllm.options import (
    KEY,
    EngineOptions,
    command_line,
    engine_arguments,
    environment,
)

CONFIG = {"model_type": "llama", "num_hidden_layers": 8, "exit_layer_indices": [2, 4, 8]}


def directory_with(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "tree"}, "strategy: 'tree' is unknown here. Use one of full, fixed"),
        ({"strategy": "fixed"}, "depths: none for the strategy fixed, which takes one"),
        ({"depths": (2,)}, "depths: 2 for the strategy full, which takes none"),
        ({"strategy": "self_speculative", "depths": (2, 4)}, "takes one. Change them"),
        ({"strategy": "sorted_speculative"}, "takes one or more"),
        (
            {"strategy": "sorted_speculative", "depths": (4, 2), "thresholds": (0.5, 0.5)},
            "depths: 4, 2 do not increase. Sort them",
        ),
        (
            {"strategy": "sorted_speculative", "depths": (2, 4), "thresholds": (0.5,)},
            "thresholds: 1 values for the strategy sorted_speculative with 2 exits. Give 2, one",
        ),
        (
            {"strategy": "self_speculative", "depths": (2,), "thresholds": (0.5,)},
            "thresholds: 1 values .* Give none",
        ),
        (
            {"strategy": "sorted_speculative", "depths": (2,), "thresholds": (1.5,)},
            "thresholds: 1.5 is not in 0..1",
        ),
        (
            {"strategy": "self_speculative", "depths": (2,), "num_draft_tokens": 0},
            "num_draft_tokens: 0 is not in 1..64",
        ),
        (
            {"strategy": "self_speculative", "depths": (2,), "draft_schedule": ((1, 2),)},
            r"draft_schedule: \(1, 2\) is not a row of three numbers",
        ),
        ({"measure": "luck"}, "measure: 'luck' is unknown here"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(SettingsError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, f"{KEY} is None, not an object"),
        ({"depth": 2}, f"{KEY} has 'depth', which is no option. Use some of strategy, depths"),
        ({"depths": 2}, "depths: 2 is not a list"),
        ({"depths": [2.5]}, "depths: 2.5 is not of the kind int"),
        ({"depths": [True]}, "depths: True is not of the kind int"),
        ({"strategy": 3}, "strategy: 3 is not of the kind str"),
        ({"draft_schedule": [1]}, "draft_schedule: 1 is not a list"),
    ],
)
def test_json_that_is_no_options(values, message):
    with pytest.raises(SettingsError, match=message):
        EngineOptions.from_json(values)


def test_options_survive_json():
    options = EngineOptions(
        "sorted_speculative", (2, 4), (0.5, 1.0), "margin", 6, ((1, 2, 6), (3, 8, 0))
    )
    assert EngineOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert EngineOptions.from_json({}) == EngineOptions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2 is none of llama, mistral, qwen2, qwen3"),
        ({"exit_layer_indices": None}, "names no exit before the last layer"),
        ({"exit_layer_indices": [8]}, "names no exit before the last layer"),
        ({"exit_layer_indices": [2, 9]}, "9 is not a layer of this model"),
        ({"own_exit_norms": True}, "exits.safetensors is missing. Copy the whole directory"),
        ({"layer_types": ["full_attention"]}, "no list of a name for each of the 8 layers"),
    ],
)
def test_directories_that_cannot_be_served(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_exits_of(directory_with(tmp_path, **changes))


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="Give an exported model"):
        read_exits_of(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("strategy", "depth", "changes", "message"),
    [
        ("self_speculative", 3, {}, "3 is no exit of .* below its last layer. Use 2, 4"),
        ("self_speculative", 8, {}, "8 is no exit"),
        ("fixed", 3, {}, "3 is no exit of .* that can be served. Use 2, 4, 8"),
        ("self_speculative", 2, {"exit_block": True}, "has a block of its own, .* Extract it"),
        (
            "fixed",
            2,
            {"exit_block": True, "exit_adapter_rank": 4, "hidden_size": 64},
            "an adapter before its block",
        ),
    ],
)
def test_exits_that_cannot_serve_a_strategy(tmp_path, strategy, depth, changes, message):
    directory = directory_with(tmp_path, **changes)
    (directory / "exits.safetensors").touch()
    with pytest.raises(SettingsError, match=message):
        engine_arguments(directory, EngineOptions(strategy, (depth,)))


def test_what_vllm_is_started_with(tmp_path):
    directory = directory_with(tmp_path)
    options = EngineOptions("sorted_speculative", (2, 4), (0.5, 0.25), draft_schedule=((1, 8, 2),))
    line = command_line(engine_arguments(directory, options))
    assert line[0] == str(directory) and "--no-async-scheduling" in line
    flags = dict(zip(line[1::2], line[2::2], strict=False))
    assert flags["--worker-cls"] == "megatron_sorted.serving.vllm.worker.NestedWorker"
    assert json.loads(flags["--speculative-config"]) == {
        "method": "draft_model",
        "model": str(directory),
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 8, 2]],
    }
    assert EngineOptions.from_json(json.loads(flags["--additional-config"])[KEY]) == options
    assert environment(options) == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert engine_arguments(tmp_path / "anything", EngineOptions()) == {
        "model": str(tmp_path / "anything")
    }
    assert not environment(EngineOptions())


@pytest.mark.parametrize(
    ("depth", "changes", "overrides"),
    [
        (4, {}, {"num_hidden_layers": 4}),
        (4, {"exit_block": True}, {"num_hidden_layers": 5}),
        (4, {"tie_exit_lm_head": False}, {"num_hidden_layers": 4, "tie_word_embeddings": False}),
        (8, {"exit_block": True, "tie_exit_lm_head": False}, {"num_hidden_layers": 8}),
        (
            2,
            {"layer_types": ["full_attention"] * 8},
            {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        ),
        (
            8,
            {"layer_types": ["full_attention"] * 8},
            {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8},
        ),
    ],
)
def test_the_config_of_a_depth(tmp_path, depth, changes, overrides):
    directory = directory_with(tmp_path, **changes)
    (directory / "exits.safetensors").touch()
    arguments = engine_arguments(directory, EngineOptions("fixed", (depth,)))
    assert arguments["hf_overrides"] == {"architectures": ["NestedLlamaForCausalLM"], **overrides}
    assert "speculative_config" not in arguments


def test_options_need_neither_torch_nor_vllm():
    """They are read where vLLM is not installed, and in vLLM's environment without our server."""
    program = (
        "import sys, megatron_sorted.serving.vllm.options\n"
        "print([*{'torch', 'vllm', 'transformers', 'fastapi', 'pydantic'} & sys.modules.keys()])"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@dataclass
class Metadata:
    """The part of vLLM's metadata that passes over drafted tokens set."""

    block_table_tensor: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor | None
    max_seq_len: int = 0
    slot_mapping: torch.Tensor | None = None
    num_reqs: int = 0
    num_actual_tokens: int = 0
    max_query_len: int = 0
    query_start_loc_cpu: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    is_prefilling: torch.Tensor | None = None
    _num_computed_tokens_cache: torch.Tensor | None = None
    _token_to_req_indices_cache: torch.Tensor | None = None

    def replace(self, **changes):
        return replace(self, **changes)


def test_slots_of_drafted_tokens():
    """Three texts in blocks of 4 tokens; the second and third read two tokens each."""
    whole = Metadata(
        torch.tensor([[7, 3, 9], [2, 5, 0], [8, 1, 4]]),
        torch.tensor([5, 6, 9], dtype=torch.int32),
        torch.tensor([0, 1, 2, 3], dtype=torch.int32),
        torch.tensor([5, 6, 9], dtype=torch.int32),
        max_seq_len=9,
    )
    two = select_texts(whole, torch.tensor([1, 2]))
    read = queries(two, torch.tensor([[6, 7], [11, 12]]), 3, block_size=4, max_model_len=12)
    assert read.slot_mapping.tolist() == [5 * 4 + 2, 5 * 4 + 3, 4 * 4 + 3, -1]
    assert read.seq_lens.tolist() == [8, 12] and read.query_start_loc.tolist() == [0, 2, 4]
    assert (read.num_reqs, read.num_actual_tokens, read.max_query_len) == (2, 4, 2)
    assert read.max_seq_len == 12 and read.seq_lens_cpu_upper_bound.tolist() == [9, 12]


class Layers:
    """Two exits whose layers remember what they have read; the states are the tokens themselves.

    The next token after t is t + 1 by the first exit and t + 2 by the second. The first is sure of
    tokens that 3 does not divide, the second of tokens that 5 does not divide.
    """

    def __init__(self):
        self.read_by_exit: list[list[tuple[int, int, int]]] = [[], []]

    def read(self, place, rows, positions, states):
        assert positions.shape == states.shape[:2]
        for row, some, where in zip(
            rows.tolist(), states[..., 0].tolist(), positions.tolist(), strict=True
        ):
            self.read_by_exit[place] += [
                (row, position, int(token)) for position, token in zip(where, some, strict=True)
            ]
        return states

    def logits(self, place, states):
        tokens = states[:, 0].long()
        sure = tokens % (3, 5)[place] != 0
        chosen = (tokens + place + 1) % 64
        return torch.zeros(len(tokens), 64).scatter(
            1, chosen[:, None], torch.where(sure, 20.0, 0.5)[:, None]
        )


def test_sorted_drafts_of_a_batch():
    """By hand: each text's draft is that of the rule, and deep layers read what they missed."""
    layers = Layers()
    exits = DraftExits(
        (0.5, 0.5),
        CONFIDENCE["probability"],
        lambda tokens: tokens[:, None].float(),
        layers.read,
        layers.logits,
    )
    starts, positions = [1, 6, 15], [10, 20, 30]

    def by_hand(token):
        draft = []
        for _ in range(6):
            by_first = token % 3 != 0
            sure = by_first or token % 5 != 0
            token += 1 if by_first else 2
            draft.append(token)
            if not sure:
                break
        return draft

    drafts = exits.draft(torch.tensor(starts), torch.tensor(positions), 6)
    assert drafts == [by_hand(token) for token in starts]
    assert [len(draft) for draft in drafts] == [6, 6, 1]
    for row, (start, position, draft) in enumerate(zip(starts, positions, drafts, strict=True)):
        text = [start, *draft]
        first, second = (
            [(where, token) for which, where, token in one if which == row]
            for one in layers.read_by_exit
        )
        assert first == [(position + i, text[i]) for i in range(len(draft))]
        assert second == first[: len(second)] and second, "out of order, or read twice"
    assert exits.draft(torch.tensor(starts), torch.tensor(positions), 0) == [[], [], []]
