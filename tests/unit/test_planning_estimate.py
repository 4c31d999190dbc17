"""Plans of known models, and of layouts of one."""

import shlex
from dataclasses import replace

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import DEVICES, device_named
from megatron_sorted.planning.estimate import Plan, make_plan, network_parameters
from megatron_sorted.planning.launch import launch_line
from megatron_sorted.planning.page import layout_flags
from megatron_sorted.planning.search import search
from megatron_sorted.settings.costs import train_flops_per_token
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings
from tests.rules.sources import ROOT

SEVEN = Settings(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    seq_length=4096,
    vocab_size=32000,
    untie_embeddings_and_output_weights=True,
    exit_layer_nums=(8, 16, 24),
    bf16=True,
    mock_data=True,
    global_batch_size=64,
    make_vocab_size_divisible_by=1,
)


def plan_of(world_size: int, **changes) -> Plan:
    """Return the plan of LLaMA 2 7B with exits on A100s."""
    settings = replace(SEVEN, **changes)
    check_settings(settings, world_size)
    return make_plan(settings, 32000, world_size, DEVICES["A100"], 2048)


LAYOUTS = {
    "one": (1, {}),
    "tp4 sequence parallel": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "pp4 chunks": (
        4,
        {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 4},
    ),
    "tp2 pp2 dp2": (
        8,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_and_operations_do_not_depend_on_the_layout(name):
    world_size, changes = LAYOUTS[name]
    plan = plan_of(world_size, **changes)
    assert plan.parameters == 6_738_415_616  # as published
    heads = sum(stage.parameters["heads"] > 0 for stage in plan.stages)
    norms = sum(stage.parameters["norms"] > 0 for stage in plan.stages)
    tp = plan.tensor_size
    replicated = (tp - 1) * (65 + norms - 1) * 4096  # norms are whole on every tensor parallel rank
    copies = (heads - 1) * 32000 * 4096 + (norms - 1) * 4096
    assert plan.stored_parameters == 6_738_415_616 + copies + replicated
    # operations of all ranks: attention over all pairs, where MFU's count has half of them
    done = plan.data_size * tp * sum(stage.operations for stage in plan.stages)
    attention = 3 * 2 * 4096 * 4096 * 32
    assert done == plan.tokens * (train_flops_per_token(SEVEN, 32000) + attention)


def test_recomputation_costs_operations_and_saves_memory():
    plain, full = plan_of(1), plan_of(1, recompute_granularity="full")
    forward = plain.tokens * 32 * 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 * 4096)
    assert full.stages[0].operations - plain.stages[0].operations == forward
    assert full.stages[0].memory.activations < plain.stages[0].memory.activations / 10
    assert full.seconds > plain.seconds and full.mfu < plain.mfu


def test_states_are_bytes_a_parameter():
    memory, parameters = plan_of(1).stages[0].memory, 6_738_415_616
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        2 * parameters,
        4 * parameters,
        12 * parameters,
    )
    sharded = plan_of(4, use_distributed_optimizer=True).stages[0].memory
    assert sharded.optimizer == 3 * parameters and sharded.states == 9 * parameters


FULLY = {"data_parallel": "fsdp"}
BYTES = {
    "fp32": (4, {"bf16": False}, 16),
    "bf16": (4, {}, 18),
    "fp16": (4, {"bf16": False, "fp16": True}, 18),
    "fp32, distributed": (4, {"bf16": False, "use_distributed_optimizer": True}, 8 + 8 / 4),
    "bf16, distributed": (4, {"use_distributed_optimizer": True}, 6 + 12 / 4),
    "fp32, fully sharded": (4, {"bf16": False, **FULLY}, 16 / 4),
    "bf16, fully sharded": (4, FULLY, 16 / 4),
    # of 6,738,415,616 parameters 2 x 32,000 x 4096 are rows of tokens, and 65 x 4096 of norms
    "Muon": (4, {"bf16": False, "optimizer": "muon"}, 12 + 4 * 262_410_240 / 6_738_415_616),
    "bf16, distributed, averaged": (
        4,
        {"use_distributed_optimizer": True, "average_weights_from": 0.5},
        6 + 16 / 4,
    ),
    "fp32, fully sharded, averaged": (
        4,
        {"bf16": False, **FULLY, "average_weights_from": 0.5},
        20 / 4,
    ),
    "SGD": (4, {"bf16": False, "optimizer": "sgd"}, 12),
    "SGD without momentum": (4, {"bf16": False, "optimizer": "sgd", "sgd_momentum": 0.0}, 8),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_parameter_takes_what_the_guide_to_sharding_says(name):
    world_size, changes, size = BYTES[name]
    [stage] = plan_of(world_size, **changes).stages
    assert stage.memory.states == pytest.approx(size * 6_738_415_616, rel=1e-8)


# docs/fsdp.md: MB of a step on processes, with the memory of libraries before anything runs;
# running adds the same to those in all cases.
SHARDING = {
    ("ddp", 2): 1508,
    ("distributed", 2): 1401,
    ("fsdp", 2): 976,
    ("ddp", 4): 1506,
    ("distributed", 4): 1237,
    ("fsdp", 4): 662,
}
LIBRARIES = 95


@pytest.mark.parametrize(("form", "processes"), SHARDING)
def test_forms_of_data_parallelism_take_what_was_measured(form, processes):
    settings = Settings(
        num_layers=8,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=16384,
        seq_length=64,
        exit_layer_nums=(2, 4, 6),
        mock_data=True,
        device="cpu",
        untie_embeddings_and_output_weights=True,
        use_distributed_optimizer=form == "distributed",
        data_parallel="fsdp" if form == "fsdp" else "ddp",
    )
    check_settings(settings, processes)
    planned = make_plan(settings, 16384, processes, DEVICES["cpu"], 256).peak_bytes
    assert planned / 1e6 == pytest.approx(SHARDING[form, processes] - LIBRARIES, rel=0.05)


def test_what_a_fully_sharded_run_sends():
    layers, matrix, norms = 6_738_415_616 - 2 * 32000 * 4096 - 4096, 32000 * 4096, 4096
    one, two = (
        plan_of(8, global_batch_size=8 * count, **FULLY).stages[0].messages for count in (1, 2)
    )
    # Layers and embedding for forward and for backward, the output matrix for backward, in bf16;
    # gradients in fp32.
    assert one.parameters == (2 * (2 * (layers + matrix) + matrix) + 2 * norms) * 7 // 8
    assert one.gradients == 4 * (layers + 2 * matrix + norms) * 7 // 8
    assert two.parameters - one.parameters == 2 * (2 * (layers + matrix) + matrix) * 7 // 8
    assert (
        two.gradients - one.gradients == 4 * (layers + matrix) * 7 // 8
    )  # exits are summed once a step
    own = (
        plan_of(8, global_batch_size=16, untie_exit_output_weights=True, **FULLY).stages[0].messages
    )
    assert (
        own.gradients - two.gradients == 4 * 2 * 3 * matrix * 7 // 8
    )  # each for every micro-batch


def test_links_that_are_slow_are_waited_for_when_all_is_gathered_for_every_pass():
    near, far = (plan_of(size, global_batch_size=64, **FULLY) for size in (8, 16))
    assert near.phases["parameters"] + near.phases["gradients"] < 0.1 * near.phases["passes"]
    slow = replace(DEVICES["A100"], far_rate=1e9)
    settings = replace(SEVEN, **FULLY)
    waits = make_plan(settings, 32000, 16, slow, 2048)
    messages = waits.stages[0].messages
    assert waits.seconds > (messages.gradients + messages.parameters) / 1e9 > far.seconds


TP2 = {"tensor_model_parallel_size": 2}
SEQUENCE = {**TP2, "sequence_parallel": True}
# All-gathers and reduce-scatters of a hidden state in a micro-batch, an all-reduce counting two:
# 32 layers, an embedding, 4 exits.
COLLECTIVES = {
    "plain": (TP2, 32 * 8 + 2 + 4 * 2),
    "sequence": (SEQUENCE, 32 * 10 + 2 + 4 * 2),
    "full": ({**TP2, "recompute_granularity": "full"}, 32 * 12 + 2 + 4 * 2),
    "MLPs again": (
        {**SEQUENCE, "recompute_granularity": "selective", "recompute_modules": ("mlp",)},
        32 * 12 + 2 + 4 * 2,
    ),
    "attention again": ({**TP2, "recompute_granularity": "selective"}, 32 * 8 + 2 + 4 * 2),
    "blocks of exits": ({**SEQUENCE, "use_exit_block": True}, (32 + 3) * 10 + 2 + 4 * 2),
    "MLPs of exits": ({**TP2, "use_exit_mlp": True}, 32 * 8 + 3 * 4 + 2 + 4 * 2),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_of_tensor_parallel_ranks(name):
    changes, count = COLLECTIVES[name]
    [stage] = plan_of(2, **changes).stages
    state, losses = 4096 * 4096 * 2, 4 * 3 * 2 * 4096 * 4
    norms = (
        (2 * 32 + 1 + 2 * 3 * (name == "blocks of exits")) * 4096 * 2 * 4
        if "sequence_parallel" in changes
        else 0
    )
    assert stage.messages.tensor == (64 * (count * state + losses) + norms) // 2


RECIPES = (
    "llama2_13b_nested",
    "llama2_13b_soft",
    "llama2_7b_8gpu",
    "llama3_1b_nested",
    "llama3_8b",
    "pangu_38b_16x8",
    "qwen3_8b",
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_their_devices_and_have_a_launch_line(name):
    path = ROOT / "examples" / f"{name}.yaml"
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    settings = load_settings(["--config", str(path)])
    world_size, device = settings.world_size, device_named(settings.planned_device)
    launch = launch_line(settings, f"examples/{name}.yaml", [], world_size, device.per_host)
    # a launcher counts nodes by the line of processes
    assert (
        f"#   {launch}".replace(f"SITE --nodes {world_size // device.per_host}", "mine.site")
        in head.splitlines()
    )
    assert (
        make_plan(settings, settings.vocab_size, world_size, device, 2048).peak_bytes
        < device.memory_bytes
    )


# Parameters by config.json of meta-llama's and Qwen's repositories.
PUBLISHED = {
    "llama2_7b_8gpu": 6_738_415_616,
    "llama2_13b_nested": 13_015_864_320,
    "llama2_13b_soft": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama3_1b_nested": 1_235_814_400,
    "qwen3_8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_number_of_parameters(name):
    settings = load_settings(["--config", str(ROOT / "examples" / f"{name}.yaml")])
    assert network_parameters(settings, settings.vocab_size) == PUBLISHED[name]


def test_the_recipe_of_38_billion_is_what_its_source_says():
    path = str(ROOT / "examples" / "pangu_38b_16x8.yaml")
    settings = load_settings(["--config", path])
    plan = make_plan(settings, 165664, 128, DEVICES["910B2"], 2048)
    assert (
        plan.tensor_size,
        plan.pipeline_size,
        plan.num_chunks,
        plan.data_size,
        plan.num_micro_batches,
    ) == (8, 4, 4, 4, 32)
    assert plan.parameters == pytest.approx(39.1e9, rel=1e-3)
    assert [sum(c.num_layers for c in stage.chunks) for stage in plan.stages] == [16, 16, 16, 14]
    assert {e for stage in plan.stages for c in stage.chunks for e in c.exits} == {16, 32, 46, 62}
    assert plan.stages[0].operations == pytest.approx(
        2038.5e12, rel=1e-4
    )  # counted over Megatron's own model, without exits on stage 0
    assert plan.peak_bytes < DEVICES["910B2"].memory_bytes
    plain = make_plan(replace(settings, exit_layer_nums=()), 165664, 128, DEVICES["910B2"], 2048)
    assert plain.seconds == pytest.approx(11.5, rel=0.2)  # published, without exits


def test_search_finds_layouts_that_fit_the_fastest_first():
    device = DEVICES["A100"]
    proposals, tried, least = search(
        replace(SEVEN, num_layers=8, exit_layer_nums=(2, 4, 6)), 32000, 4, device, 2048, 40 * 10**9
    )
    assert 10 < len(proposals) <= tried and least < 40 * 10**9
    seconds = [proposal.plan.seconds for proposal in proposals]
    assert seconds == sorted(seconds) and all(
        proposal.plan.peak_bytes <= 40 * 10**9 for proposal in proposals
    )
    for proposal in proposals[:3]:
        check_settings(proposal.settings, 4)
        assert make_plan(proposal.settings, 32000, 4, device, 2048) == proposal.plan
    assert (
        search(
            replace(SEVEN, num_layers=8, exit_layer_nums=(2, 4, 6)), 32000, 4, device, 2048, 10**9
        )[0]
        == []
    )


def test_flags_of_a_proposed_layout_make_its_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "num-layers: 8\nhidden-size: 1024\nnum-attention-heads: 8\nseq-length: 512\n"
        "vocab-size: 32000\nmock-data: true\npipeline-model-parallel-size: 2\n"
        "decoder-first-pipeline-num-layers: 3\nrecompute-granularity: full\n"
        "recompute-method: block\nrecompute-num-layers: 2\nmicro-batch-size: 2\n"
        "use-distributed-optimizer: true\n"
        "overlap-grad-reduce: true\noverlap-param-gather: true\nexit-layer-nums: [2]\n"
    )
    settings = load_settings(["--config", str(path)])
    check_settings(settings, 8)
    proposals, _, _ = search(settings, 32000, 8, DEVICES["A100"], 2048, 80 * 10**9)
    kinds = {}
    for proposal in proposals:
        s = proposal.settings
        kinds.setdefault(
            (s.pipeline_model_parallel_size > 1, s.data_parallel, s.recompute_granularity), proposal
        )
    assert len(kinds) == 3 + 3 + 3  # stages, one stage, fully sharded
    for proposal in kinds.values():
        again = load_settings(
            ["--config", str(path), *shlex.split(layout_flags(proposal.settings, settings))]
        )
        assert again == proposal.settings


@pytest.mark.parametrize(
    "changes",
    [{"lora_rank": 4}, {"exit_kd_weight": 0.5}, {"num_experts": 4}, {"exit_adapter_rank": 2}],
)
def test_what_is_not_counted_is_refused(changes):
    with pytest.raises(
        SettingsError, match=f"--{next(iter(changes)).replace('_', '-')}: .* is not counted"
    ):
        make_plan(replace(SEVEN, **changes), 32000, 1, DEVICES["A100"], 2048)


def test_devices_come_from_the_table_or_a_file(tmp_path):
    with pytest.raises(SettingsError, match=r"--planned-device: X100 is not in the table"):
        device_named("X100")
    path = tmp_path / "device.json"
    path.write_text('{"single_flops": 5e10}')
    assert device_named("cpu", path) == replace(DEVICES["cpu"], single_flops=5e10)
    for text in (
        '{"speed": 1}',
        "[1]",
        "{",
        '{"efficiency": 0}',
        '{"efficiency": "x"}',
        '{"far_rate": -1}',
        '{"fused": 1}',
        '{"memory_bytes": true}',
        '{"near_rate": NaN}',
        '{"half_flops": Infinity}',
    ):
        path.write_text(text)
        with pytest.raises(SettingsError, match="--device-file"):
            device_named("cpu", path)
